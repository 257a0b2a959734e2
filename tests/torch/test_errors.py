"""Each kind of error by each way on which it reaches Python."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import launch
from torch.nn.parallel import DistributedDataParallel

import dpcomm

PATIENCE = timedelta(seconds=30)


def wrong(group: dist.ProcessGroup, rank: int, what: str, asynchronous: bool) -> None:
    """A call in which the ranks do not agree, and one more: where a rank only sends, it may be
    through with its part before the mistake can be seen."""
    dtype = [torch.int32, torch.float32][rank] if what == "dtypes" else torch.float32
    x = torch.ones(3 + rank if what == "sizes" else 4, dtype=dtype)
    op = [dist.ReduceOp.SUM, dist.ReduceOp.MAX][rank if what == "operators" else 0]
    if what == "operations" and rank == 0:
        work = dist.broadcast(x, 0, group=group, async_op=asynchronous)
    else:
        work = dist.all_reduce(x, op=op, group=group, async_op=asynchronous)
    if work is not None:
        work.wait()
    dist.barrier(group)


def disagreement(rank: int, world: int) -> None:
    """Ranks that call different things: a UsageError on each that names both; others go on."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    for what in ("sizes", "dtypes", "operators", "operations"):
        for asynchronous in (False, True):
            group = dist.new_group(timeout=PATIENCE)
            with pytest.raises(dpcomm.UsageError, match=r"rank [01].*rank [01]"):
                wrong(group, rank, what, asynchronous)
    x = torch.ones(3)
    dist.all_reduce(x)  # the group that made no mistake goes on
    assert x.tolist() == [world] * 3
    dist.destroy_process_group()


def death(rank: int, world: int) -> None:
    """kill -9: PeerError with rank and pid, on every path, and a new group of those that live."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    groups = [dist.new_group(timeout=PATIENCE) for _ in range(4)]
    model = DistributedDataParallel(torch.nn.Linear(4, 4), process_group=groups[3])
    living = dist.new_group([0, 1], timeout=PATIENCE)
    pids = [torch.empty(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(pids, torch.tensor([os.getpid()]))
    dist.barrier()
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    text = rf"rank {world - 1} \(pid {int(pids[-1])}, host \S+\)"
    with pytest.raises(dpcomm.PeerError, match=text):
        dist.all_reduce(torch.ones(3))
    work = dist.all_reduce(torch.ones(3), group=groups[0], async_op=True)
    with pytest.raises(dpcomm.PeerError, match=text):
        work.wait()
    assert work.is_completed()
    if not torch.__version__.startswith("2.12."):  # whose exception() cannot give one to Python
        assert isinstance(work.exception(), Exception | None)
    with pytest.raises(dpcomm.PeerError, match=text):
        dist.all_reduce(torch.ones(3), group=groups[1], async_op=True).get_future().wait()
    chained = dist.all_reduce(torch.ones(3), group=groups[1], async_op=True).get_future()
    with pytest.raises(RuntimeError, match=text):  # torch turns errors of callbacks into text
        chained.then(lambda f: f.value()).wait()
    with pytest.raises(dpcomm.PeerError, match=text):
        dist.barrier(group=groups[2])
    with pytest.raises(dpcomm.PeerError, match=text):
        model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(dpcomm.PeerError):  # a group that failed stays so
        dist.all_reduce(torch.ones(3))
    x = torch.ones(3)
    dist.all_reduce(x, group=living)
    assert x.tolist() == [2] * 3
    dist.destroy_process_group()


def lists_of_the_root(rank: int, world: int) -> list[str]:
    """Lists that only the root can see to be wrong: every rank gets the same UsageError, and does
    not wait. Returns the texts."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    root = world - 1
    own, whole = torch.ones(4), [torch.ones(4) for _ in range(world)]
    few, unequal = whole[1:], [*whole[1:], torch.ones(5)]
    integers = [x.int() for x in whole]
    shared = [torch.ones(1).expand(4), *whole[1:]]
    texts = []
    for scatters, lists in (
        (False, [[few], [unequal], [integers], [shared], [whole, whole], [[]], []]),
        (True, [[few], [unequal], [integers], [whole, whole], [[]], []]),
    ):
        for number, given in enumerate(lists):
            group = dist.new_group(timeout=PATIENCE)
            before = torch.full((50_000,), 1.0)
            pending = dist.all_reduce(before, group=group, async_op=True)
            options = dist.ScatterOptions() if scatters else dist.GatherOptions()
            options.rootRank = root
            options.asyncOp = number % 2 == 1

            def call(group=group, options=options, given=given, scatters=scatters) -> None:
                lists = given if rank == root else []
                arguments = ([own], lists) if scatters else (lists, [own])
                work = (group.scatter if scatters else group.gather)(*arguments, options)
                if work is not None:
                    work.wait()
                dist.barrier(group)  # of a short gather others see the end only here

            with pytest.raises(dpcomm.UsageError, match=rf"rank {root} \(pid.*cannot run") as error:
                call()
            if rank == root:  # what was given before is complete; others may not be so far
                pending.wait()
                assert bool((before == world).all())
            with pytest.raises(dpcomm.UsageError, match="cannot run"):
                dist.barrier(group)
            texts.append(str(error.value))
    dist.barrier()
    dist.destroy_process_group()
    return texts


def root_alone(rank: int, world: int) -> None:
    """Nobody has to be told: the group of one goes on."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    with pytest.raises(dpcomm.UsageError, match="a list of 2 tensors"):
        dist.gather(torch.ones(3), [torch.ones(3)] * 2)
    dist.barrier()
    dist.destroy_process_group()


def aborting(rank: int, world: int) -> None:
    """abort() on one rank ends the waits of all."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    group = dist.new_group(timeout=PATIENCE)
    if rank == 0:
        work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
        group.abort()
        with pytest.raises(dpcomm.PeerError, match="abort"):
            work.wait()
    else:
        with pytest.raises(dpcomm.PeerError, match="abort"):
            dist.barrier(group=group)
    dist.barrier()
    dist.destroy_process_group()
    with pytest.raises(ValueError, match="not been initialized"):
        dist.all_reduce(torch.ones(1))


def how_it_ended(wait: Callable[[], object]) -> str:
    try:
        wait()
    except dpcomm.PeerError as error:
        return str(error)
    return "no error"


def aborting_many(rank: int, world: int) -> None:
    """Threads of each rank that wait, for one work or for several, all hear of one abort() from a
    thread that does not wait; so they do of torch's own way to abort, which forgets the group."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    forget = dist.distributed_c10d._abort_process_group
    for turn, end in enumerate([dist.ProcessGroup.abort, forget, forget]):
        group = dist.new_group(timeout=PATIENCE) if turn < 2 else dist.group.WORLD
        assert group is not None
        store = dist.distributed_c10d._get_default_store()
        works: list[dist.Work | None] = []
        if rank != 0:  # rank 0 never calls
            works += [dist.all_reduce(torch.ones(3), group=group, async_op=True) for _ in range(2)]
        works.append(dist.irecv(torch.ones(3), (rank + 1) % world, group=group))
        waits = [work.wait for work in works for _ in range(2) if work is not None]
        if rank != 0:
            waits.append(lambda group=group: dist.barrier(group))
        with ThreadPoolExecutor(len(waits) + 1) as pool:
            waiting = [pool.submit(how_it_ended, wait) for wait in waits]
            store.add(f"waiting{turn}", 1)
            if rank == 0:
                while store.add(f"waiting{turn}", 0) < world:
                    time.sleep(0.01)
                time.sleep(0.1)
                pool.submit(end, group).result()
            texts = {each.result() for each in waiting}
        assert texts == {"rank 0 called abort()"}
        if end is forget and rank != 0:
            dist.destroy_process_group(group)
    assert not dist.is_initialized()


def kinds() -> dict[str, type[BaseException]]:
    return {"Peer": dpcomm.PeerError, "Timeout": dpcomm.TimeoutError, "Usage": dpcomm.UsageError}


def test_kinds_are_what_users_catch() -> None:
    for kind in kinds().values():
        assert issubclass(kind, RuntimeError)
        assert issubclass(kind, dpcomm.DpcommError)
    assert issubclass(dpcomm.TimeoutError, TimeoutError)


def test_ranks_that_disagree() -> None:
    launch(disagreement, 2)


def test_a_rank_that_is_killed() -> None:
    launch(death, 3, may_die=(2,))


def test_wrong_lists_of_a_root_end_the_call_of_all() -> None:
    texts = launch(lists_of_the_root, 3).results
    assert len(texts[0]) == 13
    assert texts == [texts[0]] * 3
    launch(root_alone, 1)


def test_abort() -> None:
    launch(aborting, 2)


def test_abort_of_many_waits() -> None:
    launch(aborting_many, 3)
