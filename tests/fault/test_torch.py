"""The same through torch.distributed: DDP with DataLoader workers, and single collectives."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ranks import Group, Outcome, Stage, expect_error, expect_in_time

pytest.importorskip("torch")
pytest.importorskip("dpcomm._torch", reason="dpcomm is built without torch")

START = """
import datetime, os, torch, torch.distributed as dist
limit = datetime.timedelta(seconds=limit)
dist.init_process_group("dpcomm", init_method=init, rank=rank, world_size=world, timeout=limit)
"""

TRAIN = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.ReLU(),
                                                    torch.nn.Linear(256, 1)))
optimizer = torch.optim.SGD(model.parameters(), 1e-3)
loader = DataLoader(TensorDataset(torch.randn(100_000, 16)), batch_size=8, num_workers=2,
                    persistent_workers=True)
for step, (batch,) in enumerate(loader):
    if step == 3:
        open(marker, "w").close()
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
"""

CALL = "import torch, torch.distributed as dist; x = torch.ones(10); dist.all_reduce(x)"


@pytest.fixture(scope="module")
def torch_stage() -> Iterator[Stage]:
    stage = Stage("torch")
    yield stage
    stage.close()


def start(group: Group, ranks: list[Any] | None = None, limit: float = 20.0) -> None:
    ranks = list(group) if ranks is None else ranks
    init = group.init()
    for number, rank in enumerate(ranks):
        rank.begin("run", START, rank=number, world=len(ranks), init=init, limit=limit)
    for rank in ranks:
        outcome = rank.end()
        assert outcome.error is None, outcome


def again(group: Group) -> None:
    """The survivors leave the group and make another one."""
    group.do("run", "import torch.distributed as dist; dist.destroy_process_group()")
    start(group)
    group.do("run", CALL + "; assert x[0] == dist.get_world_size()")
    group.do("run", "import torch.distributed as dist; dist.destroy_process_group()")
    for rank in group:
        assert rank.do("leftovers")["threads"] == []


def begin_training(group: Group) -> None:
    """Returns when all ranks are in the middle of it."""
    markers = [group.folder / f"marker{rank.number}" for rank in group]
    for rank, marker in zip(group, markers, strict=True):
        rank.begin("run", TRAIN, marker=str(marker))
    deadline = time.monotonic() + 60
    while not all(marker.exists() for marker in markers):
        assert time.monotonic() < deadline, [rank.end(0.1) for rank in group]
        time.sleep(0.02)


@pytest.mark.parametrize("world", [2, 3])
def test_kill_in_training_with_workers(torch_stage: Stage, world: int) -> None:
    with torch_stage.group(world) as group:
        start(group)
        begin_training(group)
        victim = group[world - 1]
        since = victim.kill()
        text = expect_error(group.end(), "PeerError", f"{victim.name} died", since=since)
        assert "all_reduce" in text
        again(group)


def test_stop_in_training(torch_stage: Stage) -> None:
    limit = 2.0
    with torch_stage.group(3) as group:
        start(group, limit=limit)
        begin_training(group)
        group[1].signal(signal.SIGSTOP)
        since = time.monotonic()
        outcomes = group.end(group.others(1))
        expect_error(outcomes, "TimeoutError", group[1].name, f"not complete after {limit:g} s")
        expect_in_time(outcomes, since, limit)
        group[1].kill()
        again(group)


def test_a_short_stop_in_training(torch_stage: Stage) -> None:
    with torch_stage.group(2) as group:
        start(group)
        begin_training(group)
        for rank in group:
            rank.signal(signal.SIGSTOP)
            time.sleep(0.4)
            rank.signal(signal.SIGCONT)
        time.sleep(0.3)
        since = group[0].kill()  # the training went on until now
        expect_error([group[1].end()], "PeerError", f"{group[0].name} died", since=since)


@pytest.mark.parametrize("late", [0, 1])
def test_one_text_where_starts_are_far_apart(torch_stage: Stage, late: int) -> None:
    """Rank 2 never comes, and another one comes late: the first one's time is up first."""
    limit = 1.5
    with torch_stage.group(3) as group:
        init = group.init()
        for number in (0, 1):
            source = f"import time; time.sleep({1.0 if number == late else 0.0})\n{START}"
            group[number].begin("run", source, rank=number, world=3, init=init, limit=limit)
        expect_error(group.end(group.others(2)), "TimeoutError", "rank 2 did not come")


def test_single_collectives(torch_stage: Stage) -> None:
    calls = {
        "synchronous": CALL,
        "asynchronous": CALL.replace("(x)", "(x, async_op=True).wait()"),
        "barrier": "import torch.distributed as dist; dist.barrier()",
    }
    for source in calls.values():
        with torch_stage.group(3) as group:
            start(group)
            group.do("run", CALL)
            for rank in group.others(2):
                rank.begin("run", source)
            time.sleep(0.1)
            since = group[2].kill()
            text = expect_error(group.end(), "PeerError", f"{group[2].name} died", since=since)
            later: list[Outcome] = group.outcomes("run", CALL)
            assert expect_error(later, "PeerError") == text
