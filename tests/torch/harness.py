"""Runs a function of a test file once on each of N real processes, as torchrun would.

A scenario is a function ``def scenario(rank: int, world: int) -> object`` at the top of a test
file. It batches many checks, because a process with torch takes seconds to start. What it returns
comes back to the test; what it raises fails the test with the output of all ranks. It makes its
process groups itself, with the environment that torchrun sets; the parent keeps the store, so that
groups can be made again and a rank may die.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

GRACE_S = 15.0  # for the others, once a rank has failed


class Ranks:
    """The processes of one launch.

    Attributes:
        results: what each rank returned; None where it ended otherwise.
        codes: exit codes, negative for signals.
        output: stdout and stderr of each rank.
    """

    def __init__(self, world: int) -> None:
        self.results: list[Any] = [None] * world
        self.codes: list[int] = [0] * world
        self.output: list[str] = [""] * world


def launch(
    scenario: Callable[[int, int], object],
    world: int,
    *,
    env: Mapping[str, str] | None = None,
    deadline_s: float = 100.0,
    may_die: tuple[int, ...] = (),
) -> Ranks:
    """Runs `scenario` on `world` ranks.

    Args:
        scenario: a function at the top of its file.
        world: number of processes.
        env: variables besides those of torchrun.
        deadline_s: after this all ranks are killed and the test fails with their stacks.
        may_die: ranks that may end with another exit code than zero.

    Returns:
        Results, exit codes and output of the ranks.

    Raises:
        AssertionError: a rank failed or was late; holds the output of all.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _start(scenario, rank, world, store.port, Path(folder), env or {})
            for rank in range(world)
        ]
        late = _wait(processes, may_die, deadline_s)
        ranks = Ranks(world)
        for rank, process in enumerate(processes):
            ranks.codes[rank] = process.returncode
            ranks.output[rank] = (Path(folder) / f"{rank}.log").read_text(errors="replace")
            result = Path(folder) / f"{rank}.result"
            if result.exists():
                ranks.results[rank] = pickle.loads(result.read_bytes())
    failed = [rank for rank in range(world) if ranks.codes[rank] != 0 and rank not in may_die]
    if late or failed:
        what = f"late after {deadline_s:g} s" if late else f"failed: rank(s) {failed}"
        logs = "\n".join(
            f"--- rank {rank} (exit code {ranks.codes[rank]})\n{ranks.output[rank]}"
            for rank in range(world)
        )
        raise AssertionError(f"{scenario.__name__} on {world} ranks {what}\n{logs}")
    return ranks


def _start(
    scenario: Callable[[int, int], object],
    rank: int,
    world: int,
    port: int,
    folder: Path,
    env: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    import dpcomm

    package = str(Path(dpcomm.__file__).resolve().parents[1])
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DPCOMM_")},
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **env,
    }
    file = scenario.__code__.co_filename
    with (folder / f"{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, __file__, file, scenario.__name__, str(folder / f"{rank}.result")],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(
    processes: list[subprocess.Popen[bytes]], may_die: tuple[int, ...], deadline_s: float
) -> bool:
    """Waits for all; kills what is late, with a stack first. True if a rank was late."""
    deadline = time.monotonic() + deadline_s
    failing = False
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        if not failing and any(codes[rank] for rank in range(len(codes)) if rank not in may_die):
            failing = True
            deadline = min(deadline, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(signal.SIGABRT)  # faulthandler prints all stacks
            time.sleep(0.5)
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
            return not failing
        time.sleep(0.02)
    return False


def _run(file: str, name: str, result: str) -> None:
    sys.path.insert(0, str(Path(file).parent))  # for what lies beside it
    spec = importlib.util.spec_from_file_location("scenario_file", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenario_file"] = module
    spec.loader.exec_module(module)
    try:
        value = getattr(module, name)(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        Path(result).write_bytes(pickle.dumps(value))
    except BaseException:
        traceback.print_exc()
        # A failed rank ends at once: what it left unfinished is not what is tested.
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    _run(*sys.argv[1:])
