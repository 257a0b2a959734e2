"""What torch asks of a group as a whole: options, groups made from groups, hooks, coalescing,
the monitored barrier, errors; and that no virtual function of the installed torch was forgotten."""

from __future__ import annotations

import copy
import itertools
import os
import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import launch

import dpcomm

PATIENCE = timedelta(seconds=60)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def backend_of(group: dist.ProcessGroup | None = None) -> dist.distributed_c10d.Backend:
    return (group or dist.group.WORLD)._get_backend(CPU)


def total(group: dist.ProcessGroup | None, value: float, n: int = 5000) -> float:
    x = torch.full((n,), value)
    dist.all_reduce(x, group=group)
    return float(x[n - 1])


def options(rank: int, world: int) -> None:
    """Options survive a deep copy, and are torch's own where torch wants those."""
    chosen = dpcomm.Options(wire="fp16", wire_links="all", timeout=timedelta(seconds=45))
    dist.init_process_group("dpcomm", pg_options=copy.deepcopy(chosen), timeout=PATIENCE)
    backend = backend_of()
    assert backend.options.wire == "fp16"
    assert backend.options.wire_links == "all"
    assert backend.options.timeout == 45.0
    backend.set_timeout(timedelta(seconds=50))
    assert copy.deepcopy(backend.options).timeout == 50.0
    assert backend.name() == "dpcomm"
    assert backend.rank() == rank

    world_group = dist.group.WORLD
    exact = dpcomm.Options(wire="native", timeout=40)
    half = list(range(1, world))
    groups = {
        "of the parent": world_group.split_group(half, group_name="a"),
        "its timeout": world_group.split_group(half, group_name="b", timeout=PATIENCE),
        "exact": world_group.split_group(half, group_name="c", opts=exact),
        "of torch": world_group.split_group(
            half, group_name="d", opts=backend.Options("dpcomm", timedelta(seconds=33))
        ),
    }
    if rank == 0:
        assert all(group is None for group in groups.values())
    else:
        had = {name: backend_of(group).options for name, group in groups.items()}
        assert (had["of the parent"].wire, had["of the parent"].timeout) == ("fp16", 50.0)
        assert (had["its timeout"].wire, had["its timeout"].timeout) == ("fp16", 60.0)
        assert (had["exact"].wire, had["exact"].timeout) == ("native", 40.0)
        assert (had["of torch"].wire, had["of torch"].timeout) == ("fp16", 33.0)
        for group in groups.values():
            assert (group.rank(), group.size()) == (rank - 1, world - 1)
            x = torch.full((3,), float(rank))
            group.allreduce([x]).wait()
            assert x.tolist() == [sum(half)] * 3
    whole = world_group.split_group(list(range(world)), group_name="all")
    again = whole.split_group([0, world - 1], group_name="of a part")
    if rank in (0, world - 1):
        assert again.size() == 2
        again.barrier().wait()
    own = torch._C._distributed_c10d
    with pytest.raises(TypeError):
        world_group.split_group(half, opts=object())
    with pytest.raises(dpcomm.UsageError, match="no rank of a group"):
        world_group.split_group([0, world], group_name="e")
    assert backend.get_error() == own.ErrorType.SUCCESS

    merged = world_group.merge_remote_group(
        dist.PrefixStore("merge", world_group.get_group_store()), world, group_name="merged"
    )
    x = torch.ones(4)
    merged.allreduce([x]).wait()
    assert x.tolist() == [world] * 4
    dist.destroy_process_group()


def shrunk(rank: int, world: int) -> None:
    """The ranks that are left go on, in a group of their own, after one has died in a call."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    sub = dist.new_group(list(range(world)), timeout=PATIENCE)
    assert total(sub, 1.0) == world
    if rank == 1:
        time.sleep(0.3)  # the others wait by then
        os._exit(0)
    with pytest.raises(dpcomm.PeerError, match="rank 1"):
        total(sub, 1.0)
    kinds = torch._C._distributed_c10d.ErrorType
    assert backend_of(sub).get_error() == kinds.REMOTE_ERROR
    left = dist.distributed_c10d.shrink_group([1], group=sub)
    assert (left.rank(), left.size()) == (rank - (rank > 1), world - 1)
    assert total(left, float(rank)) == sum(range(world)) - 1
    # The default group: torch destroys all others and makes it the new default.
    default = dist.distributed_c10d.shrink_group([1], shrink_flags=1)
    assert default is dist.group.WORLD
    assert total(None, 1.0) == world - 1
    with pytest.raises(RuntimeError, match="exclu"):
        dist.distributed_c10d.shrink_group([dist.get_rank()])
    dist.destroy_process_group()


def hooks(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    group = dist.group.WORLD
    infos = []
    assert not group._has_hooks()
    group._register_on_completion_hook(lambda info: infos.append((info, threading.get_ident())))
    assert group._has_hooks()
    with pytest.raises(dpcomm.UsageError, match="completion hook already"):
        group._register_on_completion_hook(lambda info: None)
    x = torch.ones(1000)
    dist.all_reduce(x)  # in this thread
    works = [dist.all_reduce(x, async_op=True) for _ in range(5)]
    peer = (rank + 1) % world
    received = dist.irecv(torch.zeros(3), (rank - 1) % world)
    dist.send(torch.ones(3), peer)
    group._wait_for_pending_works()
    assert all(work.is_completed() for work in [*works, received])
    kinds = [str(info.op_type).rpartition(".")[2] for info, _ in infos]
    assert sorted(kinds) == ["ALLREDUCE"] * 6 + ["RECV", "SEND"]
    reduces = [info for info, _ in infos if str(info.op_type).endswith("ALLREDUCE")]
    assert [info.seq for info in reduces] == [1, 2, 3, 4, 5, 6]
    assert infos[0][1] == threading.get_ident()
    for info in reduces:
        assert (
            timedelta(0)
            <= info.active_duration
            <= info.time_finished - info.time_started + (timedelta(milliseconds=1))
        )
    for before, after in itertools.pairwise(reduces):
        assert before.time_finished <= after.time_finished
    group._enable_collectives_timing()
    assert 0 <= works[0]._get_duration() < 60_000
    backend = backend_of()
    assert backend._get_sequence_number_for_group() == 6
    backend._set_sequence_number_for_group()
    late = threading.Event()
    if rank == 0:  # it waits, and others get the interpreter meanwhile
        work = dist.all_reduce(x, async_op=True)
        waiter = threading.Thread(
            target=lambda: (group._wait_for_pending_works(), late.set()), daemon=True
        )
        waiter.start()
        time.sleep(0.3)
        assert not late.is_set()
        dist.send(torch.ones(1), 1, tag=3)
        waiter.join(30)
        assert late.is_set()
        assert work.is_completed()
    else:
        if rank == 1:
            dist.recv(torch.ones(1), 0, tag=3)
            for other in range(2, world):
                dist.send(torch.ones(1), other, tag=4)
        else:
            dist.recv(torch.ones(1), 1, tag=4)
        dist.all_reduce(x)
    assert backend.supports_tensor_alloc(CPU)
    memory = backend.allocate_tensor(17, dtype=torch.bfloat16, device=CPU)
    assert (memory.shape, memory.dtype) == ((17,), torch.bfloat16)
    dist.all_reduce(memory.zero_())
    dist.destroy_process_group()


def coalescing(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    manager: Callable[..., object] = dist.distributed_c10d._coalescing_manager
    sums = world * (world + 1) / 2
    for device in (None, CPU):
        for asynchronous in (False, True):
            xs = [torch.full((n,), float(rank + 1)) for n in (1, 300, 70_000)]
            with manager(device=device, async_ops=asynchronous) as works:
                for x in xs:
                    dist.all_reduce(x)
            if asynchronous:
                works.wait()
            assert all(bool((x == sums).all()) for x in xs)
            outs = [torch.zeros(world * n) for n in (2, 50)]
            with manager(device=device, async_ops=asynchronous) as works:
                for out in outs:
                    n = out.numel() // world
                    dist.all_gather_into_tensor(out, torch.full((n,), float(rank)))
            if asynchronous:
                works.wait()
            for out in outs:
                assert torch.equal(out.view(world, -1)[:, 0], torch.arange(float(world)))
            out = torch.zeros(3)
            with manager(device=device, async_ops=asynchronous) as works:
                dist.reduce_scatter_tensor(out, torch.ones(3 * world))
            if asynchronous:
                works.wait()
            assert out.tolist() == [world] * 3
    # Calls that torch does not gather itself, messages among them, as one work.
    group = dist.group.WORLD
    after, before = (rank + 1) % world, (rank - 1) % world
    x, got, y = torch.full((9,), float(rank)), torch.zeros(200_000), torch.zeros(4)
    group._start_coalescing(CPU)
    dist.broadcast(x, 0, async_op=True)
    dist.isend(torch.full((200_000,), float(rank)), after)
    receive = dist.irecv(got, before)
    dist.broadcast(y, 0)  # a synchronous call stays one
    work = group._end_coalescing(CPU)
    future = work.get_future()
    work.wait(timedelta(seconds=30))
    assert work.is_completed()
    assert work.is_success()
    assert receive.is_completed()
    assert x.tolist() == [0.0] * 9
    assert bool((got == before).all())
    assert len(work.result()) == 3
    assert len(future.wait()) == 3
    group._start_coalescing(CPU)
    empty = group._end_coalescing(CPU)
    empty.wait()
    assert empty.is_completed()
    assert empty.get_future().wait() == []
    with pytest.raises(dpcomm.UsageError, match="without startCoalescing"):
        group._end_coalescing(CPU)
    requests = dist.batch_isend_irecv(
        [
            operation
            for tag in range(4)
            for operation in (
                dist.P2POp(dist.irecv, got[tag * 10 : tag * 10 + 10], before, tag=tag),
                dist.P2POp(dist.isend, torch.full((10,), float(tag)), after, tag=3 - tag),
            )
        ]
    )
    for request in requests:
        request.wait()
    assert got[:40:10].tolist() == [3.0, 2.0, 1.0, 0.0]
    dist.destroy_process_group()


def monitored(rank: int, world: int) -> None:
    """The ranks that are missing are named, by every rank that has come."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    groups = [dist.new_group(timeout=PATIENCE) for _ in range(2)]
    group = dist.group.WORLD
    for _ in range(3):
        group.monitored_barrier(timedelta(seconds=30))
    backend_of().monitored_barrier()
    kinds = torch._C._distributed_c10d.ErrorType
    for each, all_ranks in zip(groups, (False, True), strict=True):
        if rank in (0, 2):
            started = time.monotonic()
            with pytest.raises(dpcomm.TimeoutError, match=r"rank 1 .*not called.*rank 3 .*not c"):
                each.monitored_barrier(timedelta(seconds=0.5), wait_all_ranks=all_ranks)
            assert time.monotonic() - started < 20
            assert backend_of(each).get_error() == kinds.TIMEOUT
    group.monitored_barrier(timedelta(seconds=30))  # another group is as it was
    assert backend_of(group).get_error() == kinds.SUCCESS
    dist.destroy_process_group()


def test_options_and_groups_from_groups() -> None:
    launch(options, 3)


def test_shrinking_after_a_death() -> None:
    launch(shrunk, 3, may_die=(1,))


def test_hooks_and_pending_works() -> None:
    launch(hooks, 3)


def synchronous_beside_others(rank: int, world: int) -> None:
    """A synchronous call in another thread counts as pending, and as time before what follows."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    group = dist.group.WORLD
    x, y = torch.ones(10), torch.ones(10)
    for follows in (False, True):
        dist.barrier()
        if rank != 0:
            time.sleep(0.8)
            dist.all_reduce(x)
            if follows:
                dist.all_reduce(y)
            continue
        caller = threading.Thread(target=lambda: dist.all_reduce(x), daemon=True)
        caller.start()
        time.sleep(0.2)
        begin = time.monotonic()
        work = dist.all_reduce(y, async_op=True) if follows else None
        group._wait_for_pending_works()
        assert time.monotonic() - begin > 0.3
        caller.join(30)
        assert not caller.is_alive()
        if work is not None:
            assert work.is_completed()
            assert work._get_duration() < 300  # milliseconds; given 600 before it could begin
    dist.destroy_process_group()


def test_synchronous_calls_beside_others() -> None:
    launch(synchronous_beside_others, 2)


@pytest.mark.parametrize("world", [2, 3])
def test_coalescing(world: int) -> None:
    launch(coalescing, world)


def test_monitored_barrier_names_who_is_missing() -> None:
    launch(monitored, 4)


def without_comments(header: Path) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)


def virtuals(header: str) -> set[str]:
    body = header[header.index("class TORCH_API Backend") :]
    return set(re.findall(r"\bvirtual\b[^;{(]*?(\w+)\s*\(", body))


def test_no_virtual_function_is_forgotten() -> None:
    """Each is in the group's header, or listed in docs/torch.md."""
    include = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/Backend.hpp"
    known = virtuals(without_comments(include))
    assert {"allreduce", "alltoall_base", "split", "getError", "suspend"} <= known
    ours = without_comments(ROOT / "csrc/torch/process_group.h")
    declared = set(re.findall(r"(\w+)\([^;{]*?\)(?:\s*const)?\s*override", ours, flags=re.DOTALL))
    declared |= set(re.findall(r"virtual \S+ (\w+)\(", ours))
    text = (ROOT / "docs/torch.md").read_text()
    listed = set(re.findall(r"`(\w+)`", text[text.index("## What is left out") :]))
    forgotten = known - declared - listed
    assert not forgotten, f"neither implemented nor listed in docs/torch.md: {sorted(forgotten)}"
    assert len(declared & known) > 40
