"""Forked processes and the end of the interpreter: never a hang, a crash or a disturbed group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import launch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import dpcomm

PATIENCE = timedelta(seconds=30)


class Samples(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index))


def check(world: int) -> None:
    x = torch.ones(3)
    dist.all_reduce(x, async_op=True).wait()
    dist.all_reduce(x)
    assert x.tolist() == [world * world] * 3


def exit_code(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def workers(rank: int, world: int) -> None:
    """DataLoader workers that live, end and die during training."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    loader = DataLoader(Samples(), batch_size=8, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        for batch in loader:
            model(batch).sum().backward()
            optimizer.step()
        check(world)
        if epoch == 0 and rank == 0:
            kill_worker()
    check(world)
    forks(rank, world)
    dist.destroy_process_group()
    check_after(rank, world)


def kill_worker() -> None:
    other = iter(DataLoader(Samples(), batch_size=8, num_workers=2))
    next(other)
    pid = other._workers[0].pid  # type: ignore[attr-defined]

    def kill_and_wait() -> None:
        os.kill(pid, signal.SIGKILL)
        time.sleep(20)  # torch's handler of SIGCHLD ends it

    with pytest.raises(RuntimeError, match="DataLoader worker"):
        kill_and_wait()


def forks(rank: int, world: int) -> None:
    """Children that end in every way; none takes part, none takes anything with it."""
    pending = dist.all_reduce(torch.ones(1000), async_op=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for asynchronous in (False, True):
                with pytest.raises(dpcomm.UsageError, match="fork"):
                    dist.all_reduce(torch.ones(3), async_op=asynchronous)
            with pytest.raises(dpcomm.UsageError, match="fork"):
                pending.wait()
            dist.destroy_process_group()
            code = 0
        finally:
            os._exit(code)
    assert exit_code(child) == 0
    pending.wait()
    check(world)
    child = os.fork()
    if child == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    check(world)


def check_after(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    check(world)
    dist.destroy_process_group()


END = """
import os, sys, time, datetime
import torch, torch.distributed as dist
import dpcomm
how = sys.argv[1]
dist.init_process_group("dpcomm", timeout=datetime.timedelta(seconds=30))
x = torch.ones(3)
dist.all_reduce(x, async_op=True).wait()
group = dist.new_group()
if how == "child":  # a fork that goes through the whole end of the interpreter
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status == 0, status
        dist.all_reduce(x)
elif how == "pending":  # never complete: the peer does not take part
    if dist.get_rank() == 0:
        work = dist.all_reduce(x, async_op=True)
elif how == "callback":  # Python code that the group's thread is about to run
    future = dist.all_reduce(x, async_op=True).get_future().then(lambda f: time.sleep(0.05))
elif how == "failed":
    if dist.get_rank() == 0:
        group.abort()
elif how == "kept":
    kept = dist.group.WORLD._get_backend(torch.device("cpu"))
    dist.destroy_process_group()
print("end")
"""


@pytest.mark.parametrize("how", ["plain", "child", "pending", "callback", "failed", "kept"])
def test_end_without_destroying(tmp_path: Path, how: str) -> None:
    """The interpreter ends with groups still there, as torchrun starts it."""
    script = tmp_path / "end.py"
    script.write_text(END)
    package = str(Path(dpcomm.__file__).resolve().parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), how],
        env={**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("end") == (4 if how == "child" else 2)
    assert "terminate called" not in done.stderr


def test_workers_and_forks() -> None:
    launch(workers, 2)
