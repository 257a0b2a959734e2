"""Asynchronous calls: works, futures, order, lifetime of tensors, callbacks that call again."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import launch

import dpcomm
import dpcomm.backend

PATIENCE = timedelta(seconds=30)


def works(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert dist.get_backend() == "dpcomm"
    assert backend.name() == "dpcomm"
    x = torch.full((5,), float(rank))
    work = dist.all_reduce(x, async_op=True)
    assert work.wait() is True
    assert work.is_completed()
    assert work.is_success()
    assert work.result()[0].data_ptr() == x.data_ptr()
    assert work.get_future().value()[0].data_ptr() == x.data_ptr()
    future = dist.all_reduce(x, async_op=True).get_future()
    assert future.wait()[0] is not None
    assert future.done()
    outputs = [torch.empty(2) for _ in range(world)]
    gathered = dist.all_gather(outputs, torch.full((2,), float(rank)), async_op=True)
    assert [float(t[0]) for t in gathered.get_future().wait()] == list(range(world))
    assert dist.barrier(async_op=True).get_future().wait() == []
    many_in_order(rank, world)
    lifetime(rank, world)
    callbacks(rank, world)
    waits(rank, world)
    threads(rank, world)
    dist.destroy_process_group()


def many_in_order(rank: int, world: int) -> None:
    """Each operation works on the result of the last, so only the right order gives this."""
    x = torch.ones(1000)
    many = [dist.all_reduce(x, async_op=True) for _ in range(20)]
    many[-1].wait()
    assert all(work.is_completed() for work in many)
    assert bool((x == float(world) ** 20).all())
    generator = torch.Generator().manual_seed(5)
    sizes = torch.randint(0, 5000, (200,), generator=generator).tolist()
    tensors = [torch.full((n,), float(rank + i)) for i, n in enumerate(sizes)]
    many = []
    for i, tensor in enumerate(tensors):
        if i % 7 == 0:  # a synchronous call takes its place among them
            dist.all_reduce(tensor)
        elif i % 7 == 1:
            many.append(dist.broadcast(tensor, i % world, async_op=True))
        else:
            many.append(dist.all_reduce(tensor, async_op=True))
    for work in reversed(many):
        work.wait()
    for i, tensor in enumerate(tensors):
        total = world * i + world * (world - 1) / 2
        wanted = float(i % world + i) if i % 7 == 1 else total
        assert bool((tensor == wanted).all()), i


class Array(np.ndarray):
    """An array that can be referred to weakly; a tensor made of it keeps it alive."""


def lifetime(rank: int, world: int) -> None:
    """Tensors that nobody else holds live until their operation is complete, and no longer."""
    store = dist.group.WORLD.get_group_store()
    if rank != 0:  # so that rank 0's operations cannot be complete yet
        store.wait(["looked"], PATIENCE)
    array = np.ones(300_000, dtype=np.float32).view(Array)
    alive = weakref.ref(array)
    transposed = np.ones((100, 70), dtype=np.float32).view(Array)
    also_alive = weakref.ref(transposed)
    dist.all_reduce(torch.from_numpy(array), async_op=True)
    dist.all_reduce(torch.from_numpy(transposed).t(), async_op=True)
    del array, transposed
    gc.collect()
    if rank == 0:
        assert alive() is not None
        assert also_alive() is not None
        store.set("looked", "1")
    dist.barrier()
    deadline = time.monotonic() + 20
    while (alive() is not None or also_alive() is not None) and time.monotonic() < deadline:
        time.sleep(0.001)
        gc.collect()
    assert alive() is None
    assert also_alive() is None
    array = np.ones(1000, dtype=np.float32).view(Array)  # the input goes, the result stays
    alive = weakref.ref(array)
    output = torch.empty(1000 * world)
    work = dist.all_gather_into_tensor(output, torch.from_numpy(array), async_op=True)
    work.wait()
    del array
    gc.collect()
    assert alive() is None
    assert work.result()[0].data_ptr() == output.data_ptr()


def callbacks(rank: int, world: int) -> None:
    seen: list[float] = []
    done = threading.Event()
    future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    future.add_done_callback(lambda f: (seen.append(float(f.value()[0][0])), done.set()))
    assert done.wait(20)
    assert seen == [world]
    doubled = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    doubled = doubled.then(lambda f: f.value()[0] * 2).then(lambda f: f.value() + 1)
    assert doubled.wait().tolist() == [2 * world + 1] * 3
    failing = dist.all_reduce(torch.ones(3), async_op=True).get_future()
    failing = failing.then(lambda f: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        failing.wait()

    def again(f: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        """Calls and waits in every way, in the thread that completed the first call."""
        x = f.value()[0]
        x = dist.all_reduce(x, async_op=True).get_future().wait()[0]
        dist.all_reduce(x, async_op=True).wait()
        dist.all_reduce(x)
        then = dist.all_reduce(x, async_op=True).get_future().then(lambda g: g.value()[0] + 1)
        return then.wait()

    for _ in range(20):
        future = dist.all_reduce(torch.ones(3), async_op=True).get_future().then(again)
        assert future.wait().tolist() == [float(world) ** 5 + 1] * 3


def waits(rank: int, world: int) -> None:
    """A wait with a time limit gives up; the operation goes on."""
    store = dist.group.WORLD.get_group_store()
    x = torch.ones(3)
    if rank == 0:
        work = dist.all_reduce(x, async_op=True)
        with pytest.raises(dpcomm.TimeoutError, match="goes on"):
            work.wait(timedelta(milliseconds=20))
        with pytest.raises(dpcomm.UsageError, match="not complete"):
            work.result()
        assert not work.is_completed()
        store.set("waited", "1")
    else:
        store.wait(["waited"], PATIENCE)
        work = dist.all_reduce(x, async_op=True)
    work.wait(PATIENCE)
    assert x.tolist() == [world] * 3


def threads(rank: int, world: int) -> None:
    """Two groups used by two threads at once, both kinds of calls."""
    groups = [dist.new_group(), dist.new_group()]
    errors: list[BaseException] = []

    def use(group: dist.ProcessGroup, value: float) -> None:
        try:
            for i in range(200):
                x = torch.full((1 + 37 * i,), value)
                work = dist.all_reduce(x, group=group, async_op=i % 2 == 0)
                if work is not None:
                    work.wait()
                assert bool((x == world * value).all())
        except BaseException as error:
            errors.append(error)

    users = [threading.Thread(target=use, args=(group, 1.0 + i)) for i, group in enumerate(groups)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert not errors, errors


def interrupts(rank: int, world: int) -> None:
    """Ctrl-C gets through a wait: in a work it leaves the operation alone, in a call it ends it."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    group = dist.new_group(timeout=PATIENCE)
    store = dist.group.WORLD.get_group_store()
    if rank != 0:
        store.wait(["interrupted"], PATIENCE)
        dist.barrier()
        with pytest.raises(dpcomm.PeerError, match=r"rank 0 .*interrupted"):
            dist.all_reduce(torch.ones(3), group=group)
        return
    work = dist.barrier(async_op=True)
    for wait in (work.wait, lambda: dist.all_reduce(torch.ones(3), group=group)):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            wait()
    store.set("interrupted", "1")
    work.wait()


def dropping(rank: int, world: int) -> None:
    """The last reference to a group goes while its thread is about to run Python code."""
    group = dist.distributed_c10d._DistributedBackendOptions()
    group.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    group.group_rank, group.group_size, group.group_id = rank, world, "dropped"
    group.timeout = PATIENCE
    running = threading.Event()
    for _ in range(3):
        backend = dpcomm.backend.binding().create(group, {})
        future = backend.allreduce([torch.ones(3)]).get_future()

        def callback(f: torch.futures.Future[list[torch.Tensor]]) -> float:
            running.set()
            time.sleep(0.2)  # without the GIL, which it then wants back
            return float(f.value()[0][0])

        future = future.then(callback)
        running.wait(20)
        del backend
        assert future.wait() == world
        running.clear()


@pytest.mark.parametrize("scenario", [interrupts, dropping])
def test_signals_and_references(scenario: Callable[[int, int], None]) -> None:
    launch(scenario, 2)


@pytest.mark.parametrize("world", [2, 3])
def test_works_and_futures(world: int) -> None:
    launch(works, world)
