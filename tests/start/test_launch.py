"""dpcomm.launch(): results, errors, and that nothing is left, whatever happens.

Functions made inside of tests are run by fork, as those of a notebook; scripts by spawn.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
import torch.distributed as dist

import dpcomm

HOME = str(Path(dpcomm.__file__).parents[1])


def run_python(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=text,
        env={**os.environ, "PYTHONPATH": HOME},
        capture_output=True,
        text=True,
        timeout=90,
    )


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def all_end(pids: list[int], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def pids_in(folder: Path, count: int, seconds: float = 60.0) -> list[int]:
    """The pids that processes wrote as names of files, once there are `count` of them."""
    deadline = time.monotonic() + seconds
    while len(list(folder.glob("*.pid"))) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    pids = [int(path.stem) for path in folder.glob("*.pid")]
    assert len(pids) == count
    return pids


def test_results_come_by_rank() -> None:
    def on_each(base: float, *, scale: float) -> tuple[dpcomm.Place, float, int]:
        place = dpcomm.init(timeout=30)
        x = torch.full((1000,), base + place.rank)
        dist.all_reduce(x)
        return place, float(x[999]) * scale, torch.get_num_threads()

    before = dict(os.environ)
    results = dpcomm.launch(on_each, 3, (1.0,), {"scale": 2.0}, timeout=60)
    assert results == [(dpcomm.Place(rank, 3, rank, "torchrun"), 12.0, 1) for rank in range(3)]
    assert dict(os.environ) == before


def test_threads_of_the_parent_do_not_matter() -> None:
    """A forked rank computes, though the pool of the parent's threads is not in it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3), torch.nn.Flatten(), torch.nn.Linear(7200, 4)
    )
    network(torch.rand(64, 1, 32, 32)).sum().backward()

    def train() -> float:
        network(torch.rand(64, 1, 32, 32)).sum().backward()
        return float((torch.ones(512, 512) @ torch.ones(512, 512)).mean())

    try:
        assert dpcomm.launch(train, 2, timeout=60) == [512.0, 512.0]
    finally:
        torch.set_num_threads(threads)


SCRIPT = """
    import os, sys
    import torch, torch.distributed as dist
    import dpcomm

    AT_IMPORT = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")

    def total(x, power=1):
        place = dpcomm.init(timeout=30)
        x.mul_((place.rank + 1) ** power)  # each rank has a copy
        dist.all_reduce(x)
        return x.tolist(), AT_IMPORT, os.environ["OMP_NUM_THREADS"]

    if __name__ == "__main__":
        x = torch.ones(2)
        assert dpcomm.launch(total, 2, (x,), {"power": 2}, timeout=60) == [
            ([5.0, 5.0], (str(rank), "2"), "1") for rank in range(2)
        ]
        assert x.tolist() == [1.0, 1.0] and AT_IMPORT == (None, None)
        print("done")
"""


def test_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    done = run_python(str(script))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_script_without_its_guard_says_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import dpcomm\ndef f():\n    pass\ndpcomm.launch(f, 2, timeout=60)\n")
    done = run_python(str(script))
    assert done.returncode == 1
    assert "if __name__ == '__main__':" in done.stderr
    assert "ended with exit code 1 before fn returned" in done.stderr


def test_a_prompt() -> None:
    """Functions typed at a prompt, which no other interpreter finds."""
    lines = """
        import dpcomm
        def square():
            return dpcomm.init(timeout=30).rank ** 2

        print("got", dpcomm.launch(square, 3, timeout=60))
    """
    done = run_python("-i", "-q", text=textwrap.dedent(lines))
    assert "got [0, 1, 4]" in done.stdout, done.stderr


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def in_all_reduce(fail: Callable[[], None]) -> Callable[[], None]:
    """A function in which rank 1 fails while the others wait for it."""

    def on_each() -> None:
        place = dpcomm.init(timeout=30)
        dist.barrier()
        if place.rank == 1:
            time.sleep(0.1)
            fail()
        dist.all_reduce(torch.ones(100))

    return on_each


def boom() -> None:
    raise ValueError("boom")


def other() -> None:
    raise UnpicklableError(1, 2)


@pytest.mark.parametrize(
    ("fail", "error", "text"),
    [
        (boom, ValueError, "^boom"),
        (other, dpcomm.DpcommError, "UnpicklableError: 1 and 2"),
        (lambda: sys.exit("enough"), dpcomm.PeerError, "SystemExit: enough"),
        (lambda: os.kill(os.getpid(), 9), dpcomm.PeerError, r"rank 1 \(pid .*killed by SIGKILL"),
        (lambda: os._exit(7), dpcomm.PeerError, r"rank 1 .* exit code 7 before"),
        (lambda: os._exit(0), dpcomm.PeerError, r"rank 1 .*_exit\(0\) before"),
    ],
)
def test_the_first_real_error(fail: Callable[[], None], error: type[Exception], text: str) -> None:
    """It is the one of rank 1, not those of the ranks that then miss it."""
    with pytest.raises(error, match=text) as caught:
        dpcomm.launch(in_all_reduce(fail), 3, timeout=60)
    if fail in (boom, other):
        assert "in boom" in str(caught.value.__cause__) or "in other" in str(caught.value.__cause__)
        assert "on rank 1" in str(getattr(caught.value, "__notes__", "on rank 1"))


def test_a_failure_ends_all_with_their_children(tmp_path: Path) -> None:
    def on_each() -> None:
        rank = int(os.environ["RANK"])
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "600"])
        for pid in (os.getpid(), child.pid):
            (tmp_path / f"{pid}.pid").touch()
        if rank == 2:
            pids_in(tmp_path, 6)
            raise KeyError("gone")
        time.sleep(600)

    began = time.monotonic()
    with pytest.raises(KeyError, match="gone"):
        dpcomm.launch(on_each, 3, timeout=60)
    assert time.monotonic() - began < 20
    assert all_end(pids_in(tmp_path, 6), 1.0)


def test_children_of_a_rank_that_returned_end(tmp_path: Path) -> None:
    def on_each() -> int:
        child = subprocess.Popen(["sleep", "600"])
        child.returncode = 0  # no warning that it still runs
        return child.pid

    assert all_end(dpcomm.launch(on_each, 2, timeout=60), 1.0)


def test_the_time_limit_names_who_was_late() -> None:
    def on_each() -> None:
        if os.environ["RANK"] != "0":
            time.sleep(600)

    with pytest.raises(dpcomm.TimeoutError, match=r"after 0\.5 s: rank\(s\) 1, 2 of 3"):
        dpcomm.launch(on_each, 3, timeout=0.5)


SLEEPERS = """
    import os, pathlib, signal, subprocess, sys, time
    import dpcomm

    def sleep(folder):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in (os.getpid(), subprocess.Popen(["sleep", "600"]).pid):
            (pathlib.Path(folder) / f"{pid}.pid").touch()
        time.sleep(600)

    if __name__ == "__main__":
        dpcomm.launch(sleep, 2, (sys.argv[1],), start_method=sys.argv[2])
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_ctrl_c(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SLEEPERS))
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), method],
        env={**os.environ, "PYTHONPATH": HOME},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = pids_in(tmp_path, 4)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, errors = process.communicate(timeout=20)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
    assert all_end(pids, 1.0)


def test_ranks_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(SLEEPERS).replace('subprocess.Popen(["sleep", "600"]).pid', "")
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path), "spawn"],
        env={**os.environ, "PYTHONPATH": HOME},
        start_new_session=True,
    )
    pids = pids_in(tmp_path, 2)
    process.kill()
    process.wait()
    assert all_end(pids, 3.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((print, 0), "nprocs=0"),
        ((print, True), "nprocs=True"),
        ((print, 2.0), "nprocs=2.0"),
        (("print", 2), "cannot be called"),
        ((print, 2, (), None, -1), "timeout=-1"),
    ],
)
def test_arguments_that_make_no_sense(arguments: tuple[object, ...], text: str) -> None:
    with pytest.raises(dpcomm.UsageError, match=text):
        dpcomm.launch(*arguments)  # type: ignore[arg-type]


def test_what_cannot_be_started_or_returned() -> None:
    with pytest.raises(dpcomm.UsageError, match="start_method='forkserver'"):
        dpcomm.launch(print, 1, start_method="forkserver")
    with pytest.raises(dpcomm.UsageError, match="must pickle"):
        dpcomm.launch(lambda: 1, 1, start_method="spawn")
    with pytest.raises(dpcomm.DpcommError, match="what rank 0 returned cannot be pickled"):
        dpcomm.launch(lambda: lambda: 1, 1, timeout=60)

    def with_a_group() -> None:
        dpcomm.init(timeout=30)
        with pytest.raises(dpcomm.UsageError, match="has a process group"):
            dpcomm.launch(lambda: 1, 2)

    dpcomm.launch(with_a_group, 1, timeout=60)


def test_an_error_that_only_follows_is_not_the_first() -> None:
    """Though it came first: whoever says that a peer is gone is not where the trouble began."""

    def on_each() -> None:
        if os.environ["RANK"] == "0":
            raise dpcomm.PeerError("rank 1 is gone")
        time.sleep(0.5)
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        dpcomm.launch(on_each, 2, timeout=60)
