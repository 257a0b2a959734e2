"""torch.distributed on a device: from dist.all_reduce and a DDP step down to the kernels.

The device is the stand-in (standin/device.h), whose streams are those of the fake CUDA runtime;
dpcomm's device library is linked against the same runtime. All that lies between torch's own code
and the kernels' is what a machine with GPUs runs. Several checks share a launch, as a process with
torch takes seconds to start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "torch")]

import fake_runtime  # noqa: E402
import standin  # noqa: E402
from harness import launch  # noqa: E402

import dpcomm  # noqa: E402

DEADLINE_S = 30.0
DEVICE = "standin:0"
pytestmark = pytest.mark.timeout(900)  # with what has to be compiled


@pytest.fixture(scope="module")
def device_env() -> dict[str, str]:
    """Environment of ranks that have the stand-in, and dpcomm's device library for it."""
    if why := fake_runtime.missing():
        pytest.skip(why)
    module = standin.build(fake_runtime.fake_cudart())
    return {standin.VARIABLE: str(module), **fake_runtime.variables()}


def begin(device: str | None = None) -> Any:
    """The stand-in's module, with a group that serves it and the CPU."""
    module = standin.load()
    timeout = timedelta(seconds=DEADLINE_S)
    bound = None if device is None else torch.device(device)
    dist.init_process_group("cpu:dpcomm,standin:dpcomm", timeout=timeout, device_id=bound)
    torch.manual_seed(dist.get_rank())
    return module


def end() -> None:
    dist.barrier()
    dist.destroy_process_group()


def store() -> Any:
    """What ranks tell each other on the host, past the group."""
    made = dist.distributed_c10d._get_default_store()
    made.set_timeout(timedelta(seconds=DEADLINE_S))
    return made


def until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


# --- results --------------------------------------------------------------------------------------
def integers(seed: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Small integers: every order of the sum gives the same bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def collectives(rank: int, world: int) -> None:
    begin()
    for dtype in [torch.float32, torch.bfloat16, torch.int64]:
        for count in [1, 1003]:
            check_collectives(rank, world, dtype, count)
    check_operators(rank, world)
    check_layouts(rank, world)
    check_exact_bytes(rank, world)
    check_several(rank, world)
    check_wires(rank, world)
    end()


def check_collectives(rank: int, world: int, dtype: Any, count: int) -> None:
    values = [integers(r, (count,), dtype) for r in range(world)]
    total = sum(values[1:], start=values[0])

    mine = values[rank].to(DEVICE)
    dist.all_reduce(mine)
    assert torch.equal(mine.cpu(), total)

    for root in range(world):
        tensor = values[rank].to(DEVICE)
        dist.broadcast(tensor, root)
        assert torch.equal(tensor.cpu(), values[root])
        tensor = values[rank].to(DEVICE)
        dist.reduce(tensor, root)
        assert torch.equal(tensor.cpu(), total if rank == root else values[rank])

    outputs = [torch.empty(count, dtype=dtype, device=DEVICE) for _ in range(world)]
    dist.all_gather(outputs, values[rank].to(DEVICE))
    assert all(torch.equal(outputs[r].cpu(), values[r]) for r in range(world))
    whole = torch.empty(world * count, dtype=dtype, device=DEVICE)
    dist.all_gather_into_tensor(whole, values[rank].to(DEVICE))
    assert torch.equal(whole.cpu(), torch.cat(values))

    blocks = [[integers(10 * r + b, (count,), dtype) for b in range(world)] for r in range(world)]
    expected = sum((blocks[r][rank] for r in range(1, world)), start=blocks[0][rank])
    output = torch.empty(count, dtype=dtype, device=DEVICE)
    dist.reduce_scatter(output, [block.to(DEVICE) for block in blocks[rank]])
    assert torch.equal(output.cpu(), expected)
    output = torch.empty(count, dtype=dtype, device=DEVICE)
    dist.reduce_scatter_tensor(output, torch.cat(blocks[rank]).to(DEVICE))
    assert torch.equal(output.cpu(), expected)


def check_operators(rank: int, world: int) -> None:
    values = torch.stack([integers(r, (77,), torch.float32) for r in range(world)])
    expected = {
        dist.ReduceOp.MAX: values.amax(0),
        dist.ReduceOp.MIN: values.amin(0),
        dist.ReduceOp.AVG: values.sum(0) / world,
        dist.ReduceOp.PRODUCT: values.prod(0),
    }
    for op, result in expected.items():
        tensor = values[rank].to(DEVICE)
        dist.all_reduce(tensor, op)
        assert torch.equal(tensor.cpu(), result), op
    tensor = values[rank].to(DEVICE)
    dist.all_reduce(tensor, dist._make_nccl_premul_sum(0.5))
    assert torch.equal(tensor.cpu(), values.sum(0) / 2)


def check_layouts(rank: int, world: int) -> None:
    """Tensors that are not contiguous, lists that are, outputs that overlap inputs."""
    values = [integers(r, (6, 8), torch.float32) for r in range(world)]
    tensor = values[rank].to(DEVICE).t()
    assert not tensor.is_contiguous()
    dist.all_reduce(tensor)
    assert torch.equal(tensor.cpu(), sum(values).t())
    work = dist.all_reduce(values[rank].to(DEVICE).t(), async_op=True)
    work.wait()
    assert torch.equal(work.result()[0].cpu(), sum(values).t())

    whole = torch.empty(world, 48, device=DEVICE)
    rows = [whole[r].view(6, 8) for r in range(world)]
    dist.all_gather(rows, values[rank].to(DEVICE).t().contiguous().t())
    assert torch.equal(whole.cpu().view(world, 6, 8), torch.stack(values))
    columns = torch.empty(8, 6, device=DEVICE)
    outputs = [columns.t() if r == rank else torch.empty(6, 8, device=DEVICE) for r in range(world)]
    dist.all_gather(outputs, values[rank].to(DEVICE))
    assert all(torch.equal(outputs[r].cpu(), values[r]) for r in range(world))

    whole[rank] = values[rank].view(-1)
    dist.all_gather_into_tensor(whole.view(-1), whole[rank])
    assert torch.equal(whole.cpu().view(world, 6, 8), torch.stack(values))
    empty = torch.empty(0, device=DEVICE)
    dist.all_reduce(empty)
    assert empty.numel() == 0


def check_exact_bytes(rank: int, world: int) -> None:
    """dtypes that no kernel computes with are moved."""
    for dtype in [torch.bool, torch.uint8, torch.float64, torch.complex64, torch.int16]:
        tensor = integers(rank, (21,), torch.float32).to(dtype).to(DEVICE)
        dist.broadcast(tensor, world - 1)
        assert torch.equal(tensor.cpu(), integers(world - 1, (21,), torch.float32).to(dtype)), dtype


def check_several(rank: int, world: int) -> None:
    """Several tensors in one call, and another group."""
    values = [
        [integers(10 * r + i, (30 + i,), torch.float32) for i in range(3)] for r in range(world)
    ]
    for is_async in [False, True]:
        tensors = [value.to(DEVICE) for value in values[rank]]
        with dist._coalescing_manager(async_ops=is_async) as manager:
            for tensor in tensors:
                dist.all_reduce(tensor)
        if is_async:
            manager.wait()
        for i in range(3):
            assert torch.equal(tensors[i].cpu(), sum(values[r][i] for r in range(world)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dist.all_reduce(tensors[0])
        dist.all_reduce(tensors[0], async_op=True).wait()
    seen = [event.name for event in profile.events() or []]
    assert seen.count("dpcomm:all_reduce") == 2
    others = dist.new_group(list(range(world - 1)), backend="cpu:dpcomm,standin:dpcomm")
    if rank < world - 1:
        tensor = values[rank][0].to(DEVICE)
        dist.all_reduce(tensor, group=others)
        assert torch.equal(tensor.cpu(), sum(values[r][0] for r in range(world - 1)))


def check_wires(rank: int, world: int) -> None:
    """A lossy wire rounds sums, alike on all ranks, and nothing else."""
    values = torch.randn(world, 9001, generator=torch.Generator().manual_seed(5))
    exact = values.double().sum(0)
    magnitude = values.abs().sum(0).double()
    native = values[rank].to(DEVICE)
    dist.all_reduce(native)
    for wire, bound in [("fp16", magnitude * 2**-9), ("bf16", magnitude * 2**-6)]:
        tensor = values[rank].to(DEVICE)
        with dpcomm.wire(wire):
            dist.all_reduce(tensor)
            kept = values[0].to(DEVICE)
            dist.broadcast(kept, 0)
        assert not torch.equal(tensor, native), wire
        assert ((tensor.cpu().double() - exact).abs() <= bound).all(), wire
        assert torch.equal(kept.cpu(), values[0]), wire
        everyone = torch.empty(world, 9001, device=DEVICE)
        dist.all_gather_into_tensor(everyone.view(-1), tensor)
        assert torch.equal(everyone.cpu(), tensor.cpu().expand(world, 9001)), wire


@pytest.mark.parametrize("world", [2, 3])
def test_collectives(world: int, device_env: dict[str, str]) -> None:
    launch(collectives, world, env=device_env)


# --- streams --------------------------------------------------------------------------------------
def streams(rank: int, world: int) -> None:
    module = begin(device=DEVICE)
    check_order(module, rank, world)
    check_host_is_free(rank, world)
    check_other_stream(module, rank, world)
    check_future(module, rank, world)
    check_freed_memory(module, rank, world)
    check_barrier(module, rank, world)
    tensor = torch.ones(10, device=DEVICE)
    works = [dist.all_reduce(tensor, async_op=True) for _ in range(2)]
    works[1].wait(timedelta(seconds=DEADLINE_S))
    end()
    for work in works:  # the group is gone, and its calls were complete
        work.wait()
        assert work.is_completed()
    assert torch.equal(tensor.cpu(), torch.full((10,), float(world**2)))


def check_order(module: Any, rank: int, world: int) -> None:
    """What the caller's stream was given before comes before, what it is given after, after."""
    total = sum(range(1, world + 1))
    for is_async in [False, True]:
        tensor = torch.zeros(500, device=DEVICE)
        module.sleep_ms(50 if rank == 0 else 0)  # the others have to wait for rank 0
        tensor.fill_(rank + 1)
        work = dist.all_reduce(tensor, async_op=is_async)
        if is_async:
            work.wait()
        copy = tensor.clone()
        tensor.fill_(-1)
        assert torch.equal(copy.cpu(), torch.full((500,), float(total))), f"async_op={is_async}"
    strided = torch.zeros(40, 20, device=DEVICE).t()
    module.sleep_ms(50 if rank == 0 else 0)
    strided.fill_(rank + 1)
    work = dist.all_reduce(strided, async_op=True)
    work.wait()
    copy = torch.empty_like(strided).copy_(strided)
    assert torch.equal(copy.cpu(), torch.full((20, 40), float(total)))


def check_host_is_free(rank: int, world: int) -> None:
    """Neither a call nor a wait() blocks the host: the last rank calls after all others did."""
    tensor, other = torch.ones(300, device=DEVICE), torch.ones(300, device=DEVICE)
    if rank == world - 1:
        store().wait([f"went on {r}" for r in range(world - 1)])
    work = dist.all_reduce(tensor, async_op=True)
    if rank != world - 1:
        assert not work.is_completed()
        work.wait()
        dist.all_reduce(other)
        store().set(f"went on {rank}", "")
    else:
        work.wait()
        dist.all_reduce(other)
    assert until(work.is_completed)
    assert work.exception() is None
    assert torch.equal(tensor.cpu(), torch.full((300,), float(world)))
    assert torch.equal(other.cpu(), torch.full((300,), float(world)))


def check_other_stream(module: Any, rank: int, world: int) -> None:
    """wait() orders the stream that is current then; scribbling there harms nobody."""
    side = torch.Stream(device=DEVICE)
    tensor = torch.full((4000,), rank + 1.0, device=DEVICE)
    module.sleep_ms(60 if rank == world - 1 else 0)
    work = dist.all_reduce(tensor, async_op=True)
    with side:
        work.wait()
        copy = tensor.clone()
        tensor.fill_(-1)
        assert torch.equal(copy.cpu(), torch.full((4000,), sum(range(1, world + 1)) * 1.0))
    work.wait()
    side.synchronize()
    assert torch.equal(tensor.cpu(), torch.full((4000,), -1.0))


def check_future(module: Any, rank: int, world: int) -> None:
    """A callback runs at once, on a stream of its own that is behind the call."""
    streams: list[torch.Stream] = []
    tensor = torch.zeros(2, 700, device=DEVICE).t()
    module.sleep_ms(60 if rank == 0 else 0)
    tensor.fill_(rank + 1)

    def twice(future: Any) -> Any:
        streams.append(torch.accelerator.current_stream())
        return torch.empty_like(future.value()[0]).copy_(future.value()[0])

    future = dist.all_reduce(tensor, async_op=True).get_future()
    child = future.then(twice)
    assert child.done(), "the callback waits for the device"
    assert streams[0] != torch.accelerator.current_stream()
    copy = child.wait().clone()
    assert torch.equal(copy.cpu(), torch.full((700, 2), sum(range(1, world + 1)) * 1.0))
    assert torch.equal(future.wait()[0].cpu(), copy.cpu())


def check_freed_memory(module: Any, rank: int, world: int) -> None:
    """Tensors may be freed while the communication stream works on them."""
    if rank == world - 1:
        store().wait(["freed"])
    tensor = torch.full((900,), rank + 1.0, device=DEVICE)
    strided = torch.full((9, 100), rank + 1.0, device=DEVICE).t()
    works = [dist.all_reduce(tensor, async_op=True), dist.all_reduce(strided, async_op=True)]
    assert len(module.recorded_streams(tensor)) == 1
    assert module.recorded_streams(tensor) == module.recorded_streams(strided)
    if rank != world - 1:
        del tensor, strided, works
        torch.zeros(900, device=DEVICE)
        torch.accelerator.current_stream().synchronize()
        assert module.freed_blocks()[0] >= 2  # at least the two wait for the communication stream
        if rank == 0:
            store().set("freed", "")
    else:
        for work in works:
            work.wait()
        total = sum(range(1, world + 1)) * 1.0
        assert torch.equal(tensor.cpu(), torch.full((900,), total))
        assert torch.equal(strided.cpu(), torch.full((100, 9), total))
    dist.barrier()
    assert until(lambda: module.freed_blocks()[0] == 0)


def check_barrier(module: Any, rank: int, world: int) -> None:
    """The host waits for the streams of all ranks."""
    event = torch.Event(device=DEVICE)
    module.sleep_ms(80 if rank == 0 else 0)
    event.record()
    if rank == 0:
        assert not event.query()
    dist.barrier()
    assert event.query()
    work = dist.barrier(async_op=True)
    work.wait()


def test_streams(device_env: dict[str, str]) -> None:
    launch(streams, 3, env=device_env)


def graph(rank: int, world: int) -> None:
    """Calls that a stream captures: no host waits on the way, and replays give new results."""
    module = begin()
    given, taken = torch.zeros(600, device=DEVICE), torch.zeros(4, 600, device=DEVICE)
    whole = torch.zeros(world * 600, device=DEVICE)
    side = torch.Stream(device=DEVICE)
    dist.all_reduce(torch.ones(1, device=DEVICE))  # connects the devices
    module.synchronize()
    with side:
        module.begin_capture()
        taken[0].copy_(given)
        dist.all_reduce(taken[0])
        taken[1].copy_(given)
        work = dist.all_reduce(taken[1], dist.ReduceOp.MAX, async_op=True)
        strided = torch.empty(30, 20, device=DEVICE).t()
        strided.copy_(given.view(20, 30))
        second = dist.all_reduce(strided, async_op=True)
        work.wait()
        second.wait()
        taken[2].view(20, 30).copy_(strided)
        dist.all_gather_into_tensor(whole, given)
        captured = module.end_capture()
        for step in range(3):
            given.fill_(step * 10 + rank)
            module.replay(captured)
            taken[3].copy_(taken[0])
            dist.all_reduce(taken[3])  # between the replays
            total = sum(step * 10 + r for r in range(world))
            expected = torch.tensor([total, step * 10 + world - 1, total, total * world])
            assert torch.equal(taken.cpu(), expected.float()[:, None].expand(4, 600))
            gathered = torch.arange(world).float()[:, None].expand(world, 600) + step * 10
            assert torch.equal(whole.cpu().view(world, 600), gathered)
    end()


def test_graph(device_env: dict[str, str]) -> None:
    launch(graph, 2, env=device_env)


# --- training -------------------------------------------------------------------------------------
def train(device: str, rank: int, wrap: Callable[[nn.Sequential], nn.Module]) -> list[torch.Tensor]:
    """The parameters after some steps."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU())
    model.append(nn.Linear(96, 10))
    images, labels = torch.randn(64, 64), torch.randint(0, 10, (64,))
    parallel = wrap(model.to(device))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    mine = slice(rank * 16, rank * 16 + 16)
    images, labels = images[mine].to(device), labels[mine].to(device)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(images), labels).backward()
        optimizer.step()
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parallel.parameters()]
    return [parameter.detach().cpu() for parameter in whole]


def replicated(model: nn.Sequential) -> nn.Module:
    return DistributedDataParallel(model, bucket_cap_mb=0.02)


def compressed(model: nn.Sequential) -> nn.Module:
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parallel.register_comm_hook(None, fp16_compress_hook)
    return parallel


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("standin", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def training(rank: int, world: int) -> None:
    begin()
    # Of two ranks, either order of a sum gives the same bits.
    on_cpu = {wrap: train("cpu", rank, wrap) for wrap in [replicated, compressed]}
    for wrap in [replicated, compressed, sharded]:
        trained = train(DEVICE, rank, wrap)
        expected = on_cpu.get(wrap, on_cpu[replicated])
        for parameter, wanted in zip(trained, expected, strict=True):
            assert torch.equal(parameter, wanted), wrap
            everyone = [torch.empty_like(parameter) for _ in range(world)]
            dist.all_gather(everyone, parameter)
            assert all(torch.equal(parameter, other) for other in everyone), wrap
    end()


def test_ddp_and_fsdp(device_env: dict[str, str]) -> None:
    launch(training, 2, env=device_env)


# --- errors ---------------------------------------------------------------------------------------
def refusals(rank: int, world: int) -> None:
    begin()
    here = torch.ones(4, device=DEVICE)
    with pytest.raises(dpcomm.UsageError, match=r"on standin:0 and on cpu|on cpu and on standin:0"):
        dist.all_gather([torch.empty(4) for _ in range(world)], here)
    with pytest.raises(dpcomm.UsageError, match="standin:0 and on standin:1"):
        dist.all_gather_into_tensor(torch.ones(4 * world, device="standin:1"), here)
    with pytest.raises(dpcomm.UsageError, match="expanded"):
        dist.all_reduce(torch.ones(1, device=DEVICE).expand(4))
    dist.all_reduce(here)
    with pytest.raises(dpcomm.UsageError, match="this group works on standin:0"):
        dist.all_reduce(torch.ones(4, device="standin:1"))
    assert torch.equal(here.cpu(), torch.full((4,), float(world)))
    end()


def test_refusals(device_env: dict[str, str]) -> None:
    launch(refusals, 2, env=device_env)


def missing_peer(rank: int, world: int) -> str:
    begin()
    check_disagreement(rank)
    tensor = torch.ones(400, device=DEVICE)
    dist.all_reduce(tensor)
    dist.barrier()
    assert dist.group.WORLD is not None
    backend = dist.group.WORLD._get_backend(torch.device(DEVICE))
    backend.set_timeout(timedelta(seconds=2))
    if rank == 1:
        store().wait(["seen"])
        return ""
    work = dist.all_reduce(tensor, async_op=True)
    with pytest.raises(dpcomm.TimeoutError) as short:
        work.wait(timedelta(milliseconds=50))
    assert "goes on" in str(short.value)
    with pytest.raises(dpcomm.TimeoutError) as caught:
        work.wait(timedelta(seconds=DEADLINE_S))
    assert work.exception() is not None
    assert not work.is_success()
    with pytest.raises(dpcomm.TimeoutError):
        work.wait()
    with pytest.raises(dpcomm.TimeoutError):
        dist.all_reduce(tensor)
    tensor.cpu()  # the stream is free again
    store().set("seen", "")
    return str(caught.value)


def check_disagreement(rank: int) -> None:
    """Ranks that call different operations are told so; other groups go on."""
    others = dist.new_group([0, 1], backend="cpu:dpcomm,standin:dpcomm")
    work = dist.all_reduce(torch.ones(400 + rank, device=DEVICE), group=others, async_op=True)
    with pytest.raises(dpcomm.UsageError, match=r"400.*401|401.*400"):
        work.wait(timedelta(seconds=DEADLINE_S))


def test_a_missing_peer_is_named(device_env: dict[str, str]) -> None:
    text = launch(missing_peer, 2, env=device_env).results[0]
    assert "all_reduce" in text
    assert "rank 1" in text


def no_device(rank: int, world: int) -> None:
    begin()
    for _ in range(2):
        with pytest.raises(dpcomm.UsageError, match="no CUDA device: "):
            dist.all_reduce(torch.ones(4, device=DEVICE))
    tensor = torch.ones(4)
    dist.all_reduce(tensor)
    assert torch.equal(tensor, torch.full((4,), float(world)))
    end()


def test_no_device_is_a_usage_error() -> None:
    """With dpcomm as it is built here, and no GPU."""
    if why := fake_runtime.missing(nvcc=False):
        pytest.skip(why)
    launch(no_device, 2, env={standin.VARIABLE: str(standin.build(fake_runtime.fake_cudart()))})
