"""Runs a function of a test file once on each of N processes, with dpcomm on emulated devices.

A scenario is a function ``def scenario(rank: Rank, request: Any) -> Any`` at the top of a test
file. What it returns comes back to the test; what it raises fails the test with everybody's output.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dpcomm

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 10.0  # for the others, once a rank has failed


@dataclass
class Rank:
    """What a scenario knows of its place."""

    rank: int
    world: int
    meeting: str
    """Where the ranks meet: the argument ``init`` of a Communicator."""

    def communicator(self, **options: Any) -> dpcomm.Communicator:
        import dpcomm

        return dpcomm.Communicator(self.rank, self.world, self.meeting, **options)


@dataclass
class Outcome:
    """What became of a rank."""

    code: int
    """Exit code; negative for signals."""
    output: str
    result: Any = None
    report: Any = None
    """The fake runtime's (fake_cudart/README.md), as text."""


def launch(
    scenario: Callable[[Rank, Any], Any],
    world: int,
    environment: Mapping[str, str],
    request: Any = None,
    *,
    deadline_s: float = 90.0,
    may_die: tuple[int, ...] = (),
) -> list[Outcome]:
    """Runs the scenario on `world` ranks; device r belongs to rank r.

    Raises:
        AssertionError: a rank failed or was late; holds the output of all.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "meeting").mkdir()
        (place / "request").write_bytes(pickle.dumps(request))
        processes = [_start(scenario, rank, world, environment, place) for rank in range(world)]
        late = _wait(processes, may_die, deadline_s)
        outcomes = [
            _outcome(process.returncode, rank, place) for rank, process in enumerate(processes)
        ]
    failed = [r for r, outcome in enumerate(outcomes) if outcome.code != 0 and r not in may_die]
    if late or failed:
        what = f"late after {deadline_s:g} s" if late else f"failed: rank(s) {failed}"
        logs = [f"--- rank {r} ({o.code})\n{o.output}" for r, o in enumerate(outcomes)]
        raise AssertionError(f"{scenario.__name__} {what}\n" + "\n".join(logs))
    return outcomes


def results(*arguments: Any, **keywords: Any) -> list[Any]:
    """What the ranks of launch() returned."""
    return [outcome.result for outcome in launch(*arguments, **keywords)]


def _start(
    scenario: Callable[[Rank, Any], Any],
    rank: int,
    world: int,
    environment: Mapping[str, str],
    place: Path,
) -> subprocess.Popen[bytes]:
    paths = [str(Path(__file__).parent), *sys.path]
    variables = {
        **environment,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "FAKE_CUDA_REPORT": str(place / f"{rank}.report"),
    }
    command = [sys.executable, __file__, scenario.__code__.co_filename, scenario.__name__]
    command += [str(rank), str(world), str(place)]
    with (place / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(command, env=variables, stdout=log, stderr=log)


def _wait(
    processes: list[subprocess.Popen[bytes]], may_die: tuple[int, ...], deadline_s: float
) -> bool:
    """True if a rank was late. All processes are over afterwards."""
    deadline = time.monotonic() + deadline_s
    late = False
    while any(process.poll() is None for process in processes):
        failed = [
            process
            for rank, process in enumerate(processes)
            if process.returncode not in (None, 0) and rank not in may_die
        ]
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            late = True
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGABRT)  # faulthandler shows the stacks
            time.sleep(0.5)
            for process in processes:
                process.kill()
                process.wait()
        time.sleep(0.02)
    return late


def _outcome(code: int, rank: int, place: Path) -> Outcome:
    outcome = Outcome(code, (place / f"{rank}.log").read_text(errors="replace"))
    with contextlib.suppress(FileNotFoundError):
        outcome.report = (place / f"{rank}.report").read_text()
    with contextlib.suppress(FileNotFoundError):
        outcome.result = pickle.loads((place / f"{rank}.result").read_bytes())
    return outcome


def main() -> None:
    file, name, rank, world, folder = sys.argv[1:]
    place = Path(folder)
    spec = importlib.util.spec_from_file_location("scenario", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenario"] = module
    spec.loader.exec_module(module)
    request = pickle.loads((place / "request").read_bytes())
    answer = getattr(module, name)(
        Rank(int(rank), int(world), f"file://{place / 'meeting'}"), request
    )
    (place / f"{rank}.result").write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
