"""Every collective, dtype and operator of the backend against values computed here, and gloo's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from harness import launch
from tensors import MOVABLE, REDUCIBLE, SHAPES, bits, layouts, poisoned, same

import dpcomm

OPS = ["SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM"]
GLOO_OPS = ["SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"]


def contribution(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small integers, so that every operator is exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    low, high = (0, 2) if dtype == torch.bool else (0, 4) if dtype == torch.uint8 else (-3, 4)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def operator(op: str) -> object:
    return dist._make_nccl_premul_sum(0.5) if op == "PREMUL_SUM" else getattr(dist.ReduceOp, op)


def allowed(op: str, dtype: torch.dtype) -> bool:
    if op in ("BAND", "BOR", "BXOR"):
        return not dtype.is_floating_point
    if op == "PREMUL_SUM":
        return dtype.is_floating_point
    return not (op == "AVG" and dtype == torch.bool)


def expected(inputs: list[torch.Tensor], op: str) -> torch.Tensor:
    """The reduction in a wide type, rounded or wrapped to the dtype once."""
    dtype = inputs[0].dtype
    wide = [x.double() if dtype.is_floating_point else x.long() for x in inputs]
    if op == "PREMUL_SUM":
        wide = [(x * 0.5).to(dtype).double() for x in wide]
    total = wide[0].clone()
    for x in wide[1:]:
        if op in ("SUM", "AVG", "PREMUL_SUM"):
            total = total + x
        elif op == "PRODUCT":
            total = total * x
        elif op == "MIN":
            total = torch.minimum(total, x)
        elif op == "MAX":
            total = torch.maximum(total, x)
        else:
            total = {"BAND": total & x, "BOR": total | x, "BXOR": total ^ x}[op]
    if op == "AVG" and dtype.is_floating_point:
        # What is added in fp32 is divided in fp32.
        wide_type = torch.float64 if dtype == torch.float64 else torch.float32
        total = total.to(wide_type) / len(inputs)
    elif op == "AVG":
        total = torch.div(total, len(inputs), rounding_mode="trunc")
    return total.to(dtype)


def call(function: Callable[..., object], *args: object, asynchronous: bool, **kw: object) -> None:
    work = function(*args, async_op=asynchronous, **kw)
    if asynchronous:
        work.wait()


def reductions(rank: int, world: int) -> int:
    dist.init_process_group("dpcomm")
    checks = 0
    for seed, dtype in enumerate(REDUCIBLE):
        for op in OPS:
            if not allowed(op, dtype):
                with pytest.raises(dpcomm.UsageError, match="no reduction by"):
                    dist.all_reduce(torch.ones(3).to(dtype), op=operator(op))
                continue
            for number, shape in enumerate(SHAPES):
                inputs = [contribution(r, shape, dtype, seed) for r in range(world)]
                for layout, tensor in layouts(inputs[rank]):
                    asynchronous = (checks + number) % 2 == 0
                    call(dist.all_reduce, tensor, op=operator(op), asynchronous=asynchronous)
                    assert same(tensor, expected(inputs, op)), (dtype, op, shape, layout)
                    checks += 1
    dist.destroy_process_group()
    return checks


def like_gloo(rank: int, world: int) -> int:
    """Random values: equal to gloo's where the order of addends cannot differ, else close."""
    dist.init_process_group("dpcomm")
    gloo = dist.new_group(backend="gloo")
    checks = 0
    for dtype in REDUCIBLE:
        for op in GLOO_OPS:
            generator = torch.Generator().manual_seed(17 * rank + checks)
            if dtype.is_floating_point:
                x = torch.randn(3001, generator=generator).to(dtype)
            else:
                x = torch.randint(-(2**31), 2**31, (3001,), generator=generator).to(dtype)
            theirs = x.clone()
            try:
                dist.all_reduce(theirs, op=operator(op), group=gloo)
            except (RuntimeError, ValueError):
                continue  # gloo does not have it
            if not allowed(op, dtype):
                continue
            if dtype == torch.bool:
                theirs = theirs.view(torch.uint8) != 0  # gloo adds bytes
            dist.all_reduce(x, op=operator(op))
            if world == 2 or not dtype.is_floating_point or op in ("MIN", "MAX"):
                assert same(x, theirs), (dtype, op)
            else:
                # gloo rounds 16-bit types at each hop, and each rank adds in an order of its own
                scale = float(x.abs().max().double()) * world**2
                difference = float((x.double() - theirs.double()).abs().max())
                assert difference <= scale * torch.finfo(dtype).eps, (dtype, op, difference)
            checks += 1
    dist.destroy_process_group()
    return checks


def movement(rank: int, world: int) -> int:
    """Broadcast and all-gather move the bytes of every dtype, NaN payloads included."""
    dist.init_process_group("dpcomm", pg_options=dpcomm.Options(wire="fp16", wire_links="all"))
    checks = 0
    for dtype in MOVABLE:
        for shape in SHAPES:
            values = []
            for r in range(world):
                x = torch.zeros(shape, dtype=dtype)
                if x.numel():
                    generator = torch.Generator().manual_seed(31 * r + checks)
                    high = 2 if dtype == torch.bool else 256
                    raw = torch.randint(0, high, bits(x).shape, generator=generator)
                    x = raw.to(torch.uint8).view(dtype).view(shape)
                values.append(x)
            for root in range(world):
                x = values[root].clone() if rank == root else poisoned(shape, dtype)
                for layout, tensor in layouts(x):
                    call(dist.broadcast, tensor, root, asynchronous=checks % 2 == 0)
                    assert same(tensor, values[root]), ("broadcast", dtype, shape, root, layout)
                    checks += 1
            for layout, tensor in layouts(values[rank]):
                outputs = [poisoned(shape, dtype) for _ in range(world)]
                if layout == "transposed":
                    outputs = [torch.zeros((*shape, 3), dtype=dtype)[..., 1] for _ in range(world)]
                call(dist.all_gather, outputs, tensor, asynchronous=checks % 2 == 0)
                for r in range(world):
                    assert same(outputs[r], values[r]), ("all_gather", dtype, shape, layout)
                checks += 1
            if shape:
                joined = torch.cat([bits(v) for v in values]).view(dtype)
                output = poisoned((world * values[0].numel(),), dtype)
                dist.all_gather_into_tensor(output, values[rank].reshape(-1))
                assert same(output, joined), ("all_gather_into_tensor", dtype, shape)
    dist.destroy_process_group()
    return checks


def gathers(rank: int, world: int) -> None:
    """Forms of all-gather, reduce and reduce-scatter; buffers that are parts of each other."""
    dist.init_process_group("dpcomm")
    blocks = [torch.arange(4.0) + 10 * r for r in range(world)]
    whole = torch.cat(blocks)

    output = torch.full((4 * world,), -1.0)  # in place: the input is the own block
    output[4 * rank : 4 * rank + 4] = blocks[rank]
    dist.all_gather_into_tensor(output, output[4 * rank : 4 * rank + 4])
    assert same(output, whole)
    output = torch.full((4 * world,), -1.0)  # the input is another rank's block
    other = (rank + 1) % world
    output[4 * other : 4 * other + 4] = blocks[rank]
    dist.all_gather_into_tensor(output, output[4 * other : 4 * other + 4])
    assert same(output, whole)
    output = torch.full((4 * world,), -1.0)  # a list of blocks of one buffer
    dist.all_gather(list(output.chunk(world)), blocks[rank])
    assert same(output, whole)
    output[4 * rank : 4 * rank + 4] = blocks[rank]
    dist.all_gather(list(output.chunk(world)), output[4 * rank : 4 * rank + 4])
    assert same(output, whole)

    for root in range(world):
        x = blocks[rank].clone()
        dist.reduce(x, root)
        assert same(x, sum(blocks) if rank == root else blocks[rank])
    inputs = [torch.arange(3 * world, dtype=torch.int32) * (r + 1) for r in range(world)]
    wanted = sum(inputs).view(world, 3)[rank].to(torch.int32)
    for source in (inputs[rank].clone(), inputs[rank].view(world, 3).t().contiguous().t()):
        out = torch.full((3,), -1, dtype=torch.int32)
        dist.reduce_scatter_tensor(out, source.reshape(-1) if source.dim() == 1 else source)
        assert same(out, wanted)
    out = torch.full((3,), -1, dtype=torch.int32)
    dist.reduce_scatter(out, list(inputs[rank].chunk(world)))
    assert same(out, wanted)
    dist.reduce_scatter(out, [x.clone() for x in inputs[rank].chunk(world)], op=dist.ReduceOp.MAX)
    assert same(out, torch.stack(inputs).amax(0).view(world, 3)[rank])
    source = inputs[rank].clone()  # in place: the output is the own block
    dist.reduce_scatter_tensor(source[3 * rank : 3 * rank + 3], source)
    assert same(source[3 * rank : 3 * rank + 3], wanted)

    many = [torch.full((n,), float(rank + 1)) for n in (1, 0, 1000, 7)]
    dist.all_reduce_coalesced(many)
    assert all(bool((x == world * (world + 1) / 2).all()) for x in many)
    functional(rank, world)
    for _ in range(3):
        dist.barrier()
        work = dist.barrier(async_op=True)
        work.wait()
    dist.destroy_process_group()


def functional(rank: int, world: int) -> None:
    import torch.distributed._functional_collectives as fc

    group = dist.group.WORLD
    total = fc.all_reduce(torch.full((5,), float(rank + 1)), "sum", group)
    assert bool((total == world * (world + 1) / 2).all())
    many = fc.all_reduce_coalesced([torch.ones(3), torch.ones(4)], "sum", group)
    assert all(bool((x == world).all()) for x in many)
    gathered = fc.all_gather_tensor(torch.full((2,), rank), 0, group)
    assert gathered.tolist() == [r for r in range(world) for _ in range(2)]
    scattered = fc.reduce_scatter_tensor(torch.ones(2 * world), "sum", 0, group)
    assert scattered.tolist() == [world, world]
    assert fc.broadcast(torch.full((2,), rank), 1 % world, group).tolist() == [1 % world] * 2


def special_tensors(rank: int, world: int) -> None:
    """Inference tensors, parameters, and what is refused before anything is sent."""
    dist.init_process_group("dpcomm")
    total = world * (world + 1) / 2
    with torch.inference_mode():
        plain = torch.full((4, 3), float(rank + 1))
        turned = torch.full((4, 3), float(rank + 1)).t()
    for tensor in (plain, turned):
        dist.all_reduce(tensor, async_op=True).wait()
        assert bool((tensor == total).all())
    parameter = torch.nn.Parameter(torch.full((4, 3), float(rank + 1)))
    dist.all_reduce(parameter.data)
    dist.broadcast(parameter.detach().t(), 0)
    assert bool((parameter == total).all())
    leaf = torch.full((3, 2), float(rank), requires_grad=True)
    with torch.no_grad():
        dist.all_reduce(leaf.t())
    assert bool((leaf == total - world).all())
    assert leaf.is_leaf

    x = torch.arange(5).to(torch.complex128) * (1 + 2j) if rank == 0 else torch.zeros(5).cfloat()
    x = x.to(torch.complex128)  # as torch's Python would not pass it on
    dist.group.WORLD.broadcast(x, 0).wait()
    assert same(x, torch.arange(5).to(torch.complex128) * (1 + 2j))

    ones = torch.ones(6)
    whole = torch.ones(6 * world)
    refused = {
        "several elements of an output": lambda: dist.all_reduce(torch.ones(1).expand(4)),
        "dense": lambda: dist.group.WORLD._get_backend(torch.device("cpu")).broadcast(
            [torch.eye(3).to_sparse()], dist.BroadcastOptions()
        ),
        "on meta": lambda: dist.group.WORLD._get_backend(torch.device("cpu")).allreduce(
            [torch.ones(3, device="meta")], dist.AllreduceOptions()
        ),
        "no reduction by sum of UInt16": lambda: dist.all_reduce(ones.to(torch.uint16)),
        "times": lambda: dist.all_gather_into_tensor(torch.ones(6 * world + 1), ones),
        "input and output are": lambda: dist.all_gather_into_tensor(whole.int(), ones),
        "its place in the list": lambda: dist.group.WORLD.allgather(
            [[torch.ones(5)] * world], [ones]
        ),
        "a list of": lambda: dist.group.WORLD.allgather([[ones] * (world + 1)], [ones]),
        "is no rank": lambda: dist.group.WORLD.broadcast(ones, world),
    }
    for text, function in refused.items():
        with pytest.raises(dpcomm.UsageError, match=text):
            function()
    dist.all_reduce(ones)  # nothing was sent: the ranks are still at one
    assert bool((ones == world).all())
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_reductions_of_every_dtype_and_operator(world: int) -> None:
    checks = launch(reductions, world).results
    assert checks[0] > 1000
    assert checks == [checks[0]] * world


@pytest.mark.parametrize("world", [2, 3])
def test_like_gloo(world: int) -> None:
    assert launch(like_gloo, world).results[0] > 40


@pytest.mark.parametrize("world", [1, 2, 3])
def test_movement_of_every_dtype(world: int) -> None:
    assert launch(movement, world).results[0] > 300


@pytest.mark.parametrize("world", [2, 3])
def test_gathers_and_reduce_scatters(world: int) -> None:
    launch(gathers, world)


def test_special_tensors_and_refusals() -> None:
    launch(special_tensors, 2)
