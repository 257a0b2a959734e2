"""What holds for all tests: nothing may remain of a run, neither in /dev/shm nor as a process.

With several workers (pytest-xdist) they run in two phases, see workers.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

GRACE_S = 5.0
SHM = Path("/dev/shm")
PR_SET_CHILD_SUBREAPER = 36
#: What the workers have to say at the end; each fills in config.workeroutput["lines"].
lines: list[str] = []


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from workers import TwoPhases

    return TwoPhases(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    lines.extend(getattr(node, "workeroutput", {}).get("lines", []))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in lines:
        terminalreporter.write_line(line)


def segments() -> set[str]:
    """Names of dpcomm's segments in /dev/shm."""
    return {path.name for path in SHM.glob("*dpcomm*")} if SHM.is_dir() else set()


def descendants(root: int) -> dict[int, str]:
    """pid -> command line of the living children of `root`, and of theirs.

    Python's own helper processes, which end with their parent, are left out.
    """
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(entry.name)] = int(fields[1])
    found: dict[int, str] = {}
    pending = [root]
    while pending:
        parent = pending.pop()
        for child in [pid for pid, its_parent in parents.items() if its_parent == parent]:
            command = ""
            with contextlib.suppress(OSError):
                command = (Path("/proc") / str(child) / "cmdline").read_bytes().decode().strip("\0")
            if "multiprocessing.resource_tracker" in command:
                continue
            found[child] = command.replace("\0", " ")
            pending.append(child)
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_remains() -> Iterator[None]:
    """Fails the run where segments or processes remain after the last test.

    Of several workers the one that ends last looks at the segments, which may be any worker's.
    """
    # Processes whose parents died become children of this one, so that they are found as well.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ends_last = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    before = segments()

    def new_segments() -> set[str]:
        return segments() - before if ends_last else set()

    yield
    deadline = time.monotonic() + GRACE_S
    while (new_segments() or descendants(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.05)
    processes, names = descendants(os.getpid()), new_segments()
    for pid in processes:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    problems = [f"process {pid}: {command}" for pid, command in processes.items()]
    problems += [f"segment {SHM / name}" for name in sorted(names)]
    assert not problems, "left over from the tests:\n" + "\n".join(problems)
