"""send and recv: tags in any order, any source, large mutual messages, beside collectives."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import launch
from tensors import MOVABLE, layouts, outputs_like, random_bytes, same

import dpcomm

PATIENCE = timedelta(seconds=60)
LARGE = 64 << 20  # bytes


def ring(rank: int, world: int) -> None:
    """Every dtype and layout around a ring, by send and recv, and by isend and irecv."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    after, before = (rank + 1) % world, (rank - 1) % world
    for seed, dtype in enumerate(MOVABLE):
        for shape in ((), (0,), (3, 5), (2003,)):
            mine = random_bytes(shape, dtype, 100 * seed + rank)
            wanted = random_bytes(shape, dtype, 100 * seed + before)
            for layout, tensor in layouts(mine):
                got = outputs_like(shape, dtype, layout)
                if rank % 2 == 0:
                    dist.send(tensor, after)
                    assert dist.recv(got, before) == before
                else:
                    request = dist.irecv(got, before)
                    dist.send(tensor, after)
                    request.wait()
                    assert request.is_completed()
                assert same(got, wanted), (dtype, shape, layout)
    z = torch.complex(torch.ones(3), torch.arange(3.0) + rank)
    got = torch.empty(3, dtype=torch.complex64)
    sent = dist.group.WORLD.send([z.conj()], after, 5)
    dist.group.WORLD.recv([got], before, 5).wait()
    sent.wait()
    assert same(got, torch.complex(torch.ones(3), -torch.arange(3.0) - before))
    dist.destroy_process_group()


def tags(rank: int, world: int) -> None:
    """Messages are matched by tag, in order within a tag; sizes that differ name both."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    if rank == 0:
        sends = []
        for tag in range(5):
            for turn in range(3):
                n = 10 if tag % 2 else 100_000
                sends.append(dist.isend(torch.full((n,), 10.0 * tag + turn), 1, tag=tag))
        for send in sends:
            send.wait()
            assert send.is_completed()
            assert send.is_success()
    elif rank == 1:
        for tag in (4, 1, 3, 0, 2):
            for turn in range(3):
                got = torch.zeros(10 if tag % 2 else 100_000)
                request = dist.irecv(got, 0, tag=tag)
                request.wait()
                assert request.result()[0] is got or torch.equal(request.result()[0], got)
                assert bool((got == 10.0 * tag + turn).all())
    dist.barrier()
    if rank == 0:  # futures, and the limits of waits
        late = torch.zeros(4)
        request = dist.group.WORLD.recv([late], 1, 9)
        future = request.get_future()
        assert not request.is_completed()
        assert not future.done()
        started = time.monotonic()
        with pytest.raises(dpcomm.TimeoutError, match=r"recv.*goes on"):
            request.wait(timedelta(milliseconds=200))
        assert 0.15 < time.monotonic() - started < 10
        dist.barrier()
        doubled = future.then(lambda done: done.value()[0] * 2)
        assert doubled.wait().tolist() == [2.0] * 4
        assert request.is_completed()
        assert late.tolist() == [1.0] * 4
        assert request._source_rank() == 1
        assert request._get_duration() >= 100  # milliseconds
    else:
        dist.barrier()
        if rank == 1:
            dist.send(torch.ones(4), 0, tag=9)
    dist.barrier()
    group = dist.new_group(timeout=PATIENCE)
    if rank < 2:
        request = (
            dist.isend(torch.ones(5), 1, group=group)
            if rank == 0
            else dist.irecv(torch.ones(6), 0, group=group)
        )
        with pytest.raises(dpcomm.UsageError, match=r"(20.*24|24.*20)"):
            end_of(request, group)
        with pytest.raises(dpcomm.UsageError):
            dist.send(torch.ones(1), 1 - rank, group=group)
    x = torch.ones(2)
    dist.all_reduce(x)
    assert x.tolist() == [world] * 2
    dist.destroy_process_group()


def end_of(request: dist.Work, group: dist.ProcessGroup) -> None:
    """Raises the error that ends the group; a send may have been complete before."""
    request.wait()
    dist.all_reduce(torch.ones(1), group=group)
    dist.all_reduce(torch.ones(1), group=group)


def any_source(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    for turn in range(5):
        n = 7 if turn % 2 else 300_000
        if rank == 0:
            seen = set()
            for _ in range(world - 1):
                got = torch.zeros(n)
                source = dist.recv(got, tag=turn)
                assert bool((got == source + 10 * turn).all())
                seen.add(source)
            assert seen == set(range(1, world))
        else:
            dist.send(torch.full((n,), float(rank + 10 * turn)), 0, tag=turn)
    if rank == 0:
        got = torch.zeros(3)
        request = dist.group.WORLD.recv_anysource([got], 77)
        dist.barrier()
        request.wait()
        assert request._source_rank() == world - 1
    else:
        dist.barrier()
        if rank == world - 1:
            dist.send(torch.ones(3), 0, tag=77)
    dist.destroy_process_group()


def large(rank: int, world: int) -> None:
    """64 MiB in both directions between all pairs at once, in whatever order they are posted."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    n = LARGE // 4
    after, before = (rank + 1) % world, (rank - 1) % world
    mine = torch.arange(n, dtype=torch.int32) * (rank + 1)
    wanted = torch.arange(n, dtype=torch.int32) * (before + 1)
    got = torch.zeros(n, dtype=torch.int32)
    send = dist.isend(mine, after)  # all send first
    receive = dist.irecv(got, before)
    send.wait()
    receive.wait()
    assert torch.equal(got, wanted)
    got.zero_()
    operations = [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, got, before)]
    if rank % 2:
        operations.reverse()
    requests = dist.batch_isend_irecv(operations)
    total = torch.ones(1000)  # a collective is not behind them
    dist.all_reduce(total)
    assert bool((total == world).all())
    for request in requests:
        request.wait()
    assert torch.equal(got, wanted)
    dist.destroy_process_group()


def side_by_side(rank: int, world: int) -> None:
    """A group whose operation waits for a rank holds up neither another group nor messages, and
    the operations of one group keep their order."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    stuck = dist.new_group(timeout=PATIENCE)
    free = dist.new_group(timeout=PATIENCE)
    x = torch.full((5000,), float(rank + 1))
    total = world * (world + 1) / 2
    works = []
    if rank != 0:
        for _ in range(4):  # each takes the result of the one before
            works.append(dist.all_reduce(x, group=stuck, async_op=True))
        works.append(dist.broadcast(x, 1, group=stuck, async_op=True))
    for turn in range(20):
        y = torch.full((100,), float(rank + turn))
        dist.all_reduce(y, group=free)
        assert bool((y == world * turn + total - world).all())
        if rank == 0:
            dist.send(y, world - 1, tag=turn)
        elif rank == world - 1:
            got = torch.zeros(100)
            dist.recv(got, 0, tag=turn)
            assert torch.equal(got, y)
    if rank != 0:
        assert not any(work.is_completed() for work in works)
    else:
        for _ in range(4):
            works.append(dist.all_reduce(x, group=stuck, async_op=True))
        works.append(dist.broadcast(x, 1, group=stuck, async_op=True))
    done = []
    for number, work in enumerate(works):
        work.get_future().then(lambda _, number=number: done.append(number))
    for work in works:
        work.wait()
    assert bool((x == total * world**3).all())
    dist.barrier()
    assert done == sorted(done)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_every_dtype_around_a_ring(world: int) -> None:
    launch(ring, world)


@pytest.mark.parametrize("world", [2, 3])
def test_tags_futures_and_limits(world: int) -> None:
    launch(tags, world)


@pytest.mark.parametrize("world", [2, 4])
def test_any_source(world: int) -> None:
    launch(any_source, world)


@pytest.mark.parametrize("world", [2, 3])
def test_large_mutual_messages(world: int) -> None:
    launch(large, world)


def test_groups_and_messages_side_by_side() -> None:
    launch(side_by_side, 3)
