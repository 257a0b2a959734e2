"""Groups: subgroups side by side, destroying and making them again, ranks that come late."""

from __future__ import annotations

import gc
import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch

import dpcomm
import dpcomm.backend

PATIENCE = timedelta(seconds=30)


def total(group: dist.ProcessGroup | None, value: float) -> float:
    x = torch.full((5000,), value)  # enough for a lossy wire
    dist.all_reduce(x, group=group)
    return float(x[4999])


def subgroups(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    pairs = [(0, 1), (1, 2), (0, 2)]
    groups = [dist.new_group(list(pair), timeout=PATIENCE) for pair in pairs]
    exact = dist.new_group(pg_options=dpcomm.Options(wire="native"))
    lossy = dist.new_group(pg_options=dpcomm.Options(wire="bf16", wire_links="all"))
    for pair, group in zip(pairs, groups, strict=True):
        assert (group is dist.GroupMember.NON_GROUP_MEMBER) == (rank not in pair)
    works = []
    for turn in range(30):  # all groups in flight at once
        for pair, group in zip(pairs, groups, strict=True):
            if rank in pair:
                x = torch.full((1 + 100 * turn,), float(rank + turn))
                works.append((dist.all_reduce(x, group=group, async_op=True), x, pair, turn))
        assert total(None, rank) == sum(range(world))
    for work, x, pair, turn in works:
        work.wait()
        assert bool((x == sum(pair) + 2 * turn).all())
    assert total(exact, 0.7) == pytest.approx(0.7 * world, rel=2**-22)
    assert total(lossy, 0.7) != pytest.approx(0.7 * world, rel=2**-12)  # 0.7 is no bf16
    assert total(lossy, 0.7) == pytest.approx(0.7 * world, rel=2**-6)
    if rank in (0, 1):  # a subgroup alone goes; the others stay
        dist.destroy_process_group(groups[0])
    assert total(None, 1.0) == world
    if rank != 0:
        assert total(groups[1], 1.0) == 2
    # Every new group has a name of its own, also where torch gives the same ranks the same name.
    for _ in range(5):
        group = dist.new_group([0, 1], timeout=PATIENCE)
        if rank in (0, 1):
            assert total(group, 1.0) == 2
            dist.destroy_process_group(group)
    dist.destroy_process_group()


def again(rank: int, world: int) -> None:
    """The same process makes the group again, in the store that torchrun keeps."""
    for generation in range(4):
        dist.init_process_group("dpcomm", timeout=PATIENCE)
        assert total(None, float(generation + rank)) == sum(range(world)) + world * generation
        sub = dist.new_group([0, 1])
        if rank < 2:
            assert total(sub, 1.0) == 2
        if generation % 2 == 0:
            dist.all_reduce(torch.ones(100_000), async_op=True)  # nobody waits for it
            dist.barrier()
        dist.destroy_process_group()
    # And with a store of the group's own, at one and the same port.
    shared = store()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ["MASTER_PORT"] = os.environ["DPCOMM_TEST_PORT"]
    for generation in range(3):
        dist.init_process_group("dpcomm", timeout=PATIENCE)
        assert total(None, 1.0) == world
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        shared.add("gone", 1)  # the old server must be gone before the new one is asked
        while shared.add("gone", 0) < world * (generation + 1):
            time.sleep(0.01)


def store() -> dist.Store:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def join(shared: dist.Store, rank: int, world: int, seconds: float) -> Any:
    """Makes a group without torch's registry, whose names differ after a start that failed."""
    group = dist.distributed_c10d._DistributedBackendOptions()
    group.store = dist.PrefixStore("meeting", shared)
    group.group_rank = rank
    group.group_size = world
    group.timeout = timedelta(seconds=seconds)
    group.group_id = "meeting"
    return dpcomm.backend.binding().create(group, {})


def late(rank: int, world: int) -> None:
    """Who did not come is named, and the group can be made once all are there."""
    shared = store()
    if rank != 1:
        with pytest.raises(dpcomm.TimeoutError, match="rank 1 did not come"):
            join(shared, rank, world, 1.5)
        shared.add("gave up", 1)
    else:
        while shared.add("gave up", 0) < world - 1:
            time.sleep(0.01)
    for _ in range(2):
        group = join(shared, rank, world, 30)
        x = torch.ones(3)
        group.allreduce([x]).wait()
        assert x.tolist() == [world] * 3
        group.barrier().wait()
        group.shutdown()
    if rank == 1:  # and the other way round: rank 0 is the one that is late
        with pytest.raises(dpcomm.TimeoutError, match="ranks 0, 2 did not come"):
            join(shared, rank, world, 1.5)
        shared.set("gave up too", "1")
        time.sleep(0.5)  # so that the others would answer what was given up
    else:
        shared.wait(["gave up too"], PATIENCE)
    group = join(shared, rank, world, 30)
    group.barrier().wait()
    group.shutdown()
    with pytest.raises(dpcomm.TimeoutError, match="rank 3 did not come"):
        dist.init_process_group(
            "dpcomm", store=shared, rank=rank, world_size=world + 1, timeout=timedelta(seconds=0.5)
        )
    assert not dist.is_initialized()


def leaving(rank: int, world: int) -> None:
    """destroy_process_group waits for nobody: the peer learns of it only afterwards."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    shared = store()
    assert total(None, 1.0) == world
    if rank == 0:
        dist.all_reduce(torch.ones(5000), async_op=True)  # nobody waits for it
        dist.destroy_process_group()
        shared.set("left", "1")
        return
    shared.wait(["left"], PATIENCE)
    with pytest.raises(dpcomm.PeerError, match="rank 0"):
        total(None, total(None, 1.0))  # the first may have its message
    dist.destroy_process_group()


def timeouts(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert dpcomm.backend.binding().options(backend)["timeout_ms"] == 30_000
    group = dist.new_group(timeout=timedelta(seconds=0.3))
    chosen = dist.new_group(pg_options=dpcomm.Options(timeout=0.3), timeout=PATIENCE)
    changed = dist.new_group(timeout=PATIENCE)
    changed._get_backend(torch.device("cpu")).set_timeout(timedelta(seconds=0.3))
    if rank == 0:
        for each in (group, chosen, changed):
            with pytest.raises(dpcomm.TimeoutError, match=r"all_reduce.*rank 1"):
                dist.all_reduce(torch.ones(3), group=each)
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
        with pytest.raises(dpcomm.TimeoutError):
            work.wait()
    assert total(None, 1.0) == world  # the group with patience is untouched
    dist.destroy_process_group()


def test_subgroups_side_by_side() -> None:
    launch(subgroups, 3)


def test_making_groups_again() -> None:
    launch(again, 3, env={"DPCOMM_TEST_PORT": str(free_port())})


def test_ranks_that_come_late() -> None:
    launch(late, 3)


def test_leaving_waits_for_nobody() -> None:
    launch(leaving, 2)


def test_timeouts() -> None:
    launch(timeouts, 2)


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
