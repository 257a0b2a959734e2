"""gather, scatter, all_to_all and blocks of unequal size: every dtype and layout, against values
computed here, and gloo where it has the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import launch
from tensors import MOVABLE, REDUCIBLE, joined, layouts, outputs_like, random_bytes, same

import dpcomm

WHOLE = [torch.float32, torch.bool, torch.bfloat16, torch.complex128]  # in every shape and layout
BYTES_ONLY = [
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.complex32,
    torch.uint4,
    torch.int3,
    torch.bits8,
    torch.bits16,
]
Tensors = list[torch.Tensor]
# A call: its outputs, what they shall hold, and how it is made with a group.
Case = tuple[str, Tensors, Tensors, Callable[[dist.ProcessGroup, bool], object]]


class Values:
    """The tensor that one rank sends to another, known to all."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.seed = seed

    def __call__(self, source: int, to: int, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        shape = self.shape if shape is None else shape
        return random_bytes(shape, self.dtype, 10_000 * self.seed + 100 * source + to)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x if layout == "plain" else dict(layouts(x)).get(layout, x)


def even_cases(rank: int, world: int, value: Values, layout: str) -> Iterator[Case]:
    shape, dtype = value.shape, value.dtype

    def outputs() -> Tensors:
        return [outputs_like(shape, dtype, layout) for _ in range(world)]

    for root in {value.seed % world, world - 1}:
        own = laid_out(value(rank, 0), layout)
        out = outputs() if rank == root else []
        wanted = [value(r, 0) for r in range(world)] if rank == root else []
        yield (
            "gather",
            out,
            wanted,
            lambda group, wait, own=own, out=out, root=root: dist.gather(
                own, out or None, root, group=group, async_op=wait
            ),
        )
        given = [laid_out(value(root, r), layout) for r in range(world)] if rank == root else None
        got = outputs_like(shape, dtype, layout)
        yield (
            "scatter",
            [got],
            [value(root, rank)],
            lambda group, wait, got=got, given=given, root=root: dist.scatter(
                got, given, root, group=group, async_op=wait
            ),
        )
    inputs = [laid_out(value(rank, r), layout) for r in range(world)]
    out = outputs()
    yield (
        "all_to_all",
        out,
        [value(r, rank) for r in range(world)],
        lambda group, wait: dist.all_to_all(out, inputs, group=group, async_op=wait),
    )
    if not shape:
        return
    whole = laid_out(joined([value(rank, r) for r in range(world)]), layout)
    one = outputs_like((world * shape[0], *shape[1:]), dtype, layout)
    yield (
        "all_to_all_single",
        [one],
        [joined([value(r, rank) for r in range(world)])],
        lambda group, wait: dist.all_to_all_single(one, whole, group=group, async_op=wait),
    )


def rows_between(source: int, to: int, world: int) -> int:
    """Rows that one rank sends to another; none from some."""
    return (3 * source + 2 * to) % (world + 1)


def uneven_cases(rank: int, world: int, value: Values, layout: str) -> Iterator[Case]:
    dtype, inner = value.dtype, value.shape[1:]

    def block(source: int, to: int) -> torch.Tensor:
        return value(source, to, (rows_between(source, to, world), *inner))

    sent = [rows_between(rank, r, world) for r in range(world)]
    got = [rows_between(r, rank, world) for r in range(world)]
    wanted = [block(r, rank) for r in range(world)]
    one = outputs_like((sum(got), *inner), dtype, layout)
    whole = laid_out(joined([block(rank, r) for r in range(world)]), layout)
    yield (
        "all_to_all_single",
        [one],
        [joined(wanted)],
        lambda group, wait: dist.all_to_all_single(
            one, whole, got, sent, group=group, async_op=wait
        ),
    )
    out = [outputs_like(tuple(x.shape), dtype, layout) for x in wanted]
    inputs = [laid_out(block(rank, r), layout) for r in range(world)]
    yield (
        "all_to_all",
        out,
        wanted,
        lambda group, wait: dist.all_to_all(out, inputs, group=group, async_op=wait),
    )
    shapes = [(r * r + (r == 0), *inner) for r in range(world)]
    own = laid_out(value(rank, 0, shapes[rank]), layout)
    gathered = [outputs_like(s, dtype, layout) for s in shapes]
    yield (
        "all_gather",
        gathered,
        [value(r, 0, shapes[r]) for r in range(world)],
        lambda group, wait: dist.all_gather(gathered, own, group=group, async_op=wait),
    )
    # Blocks of one buffer: read and written where they are.
    flat = outputs_like((sum(s[0] for s in shapes), *inner), dtype, "plain")
    yield (
        "all_gather",
        [flat],
        [joined([value(r, 0, shapes[r]) for r in range(world)])],
        lambda group, wait: dist.all_gather(
            list(flat.split([s[0] for s in shapes])), own, group=group, async_op=wait
        ),
    )


def run_case(case: Case, group: dist.ProcessGroup, asynchronous: bool, text: object) -> None:
    name, outputs, wanted, call = case
    work = call(group, asynchronous)
    if asynchronous:
        work.wait()
    assert len(outputs) == len(wanted)
    for output, expected in zip(outputs, wanted, strict=True):
        assert same(output, expected), (name, text)


def movement(rank: int, world: int) -> dict[str, int]:
    dist.init_process_group("dpcomm", pg_options=dpcomm.Options(wire="fp16", wire_links="all"))
    gloo = dist.new_group(backend="gloo")
    checks = {"dpcomm": 0, "gloo": 0}
    for seed, dtype in enumerate([*MOVABLE, *BYTES_ONLY]):
        for shape, layout in variants(dtype):
            text = (dtype, shape, layout)
            for number, case in enumerate(cases(rank, world, shape, dtype, seed, layout)):
                run_case(case, dist.group.WORLD, number % 2 == 0, text)
                checks["dpcomm"] += 1
            # The values computed here are those of gloo, where it has the call.
            if dtype not in (torch.float32, torch.int64, torch.uint8) or layout != "plain":
                continue
            for case in cases(rank, world, shape, dtype, seed, layout):
                if shape == (0,) or case[0] in ("all_to_all", "all_gather"):
                    continue  # not there, or only if blocks are of one size
                run_case(case, gloo, False, text)
                checks["gloo"] += 1
    dist.destroy_process_group()
    return checks


def variants(dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], str]]:
    if dtype in BYTES_ONLY:
        yield (3, 5), "plain"
    elif dtype not in WHOLE:
        yield from [((3, 5), "plain"), ((3, 5), "strided"), ((1031,), "offset")]
    else:
        yield from [((), "plain"), ((0,), "plain")]
        for layout in ("plain", "strided", "transposed", "offset"):
            yield from [((3, 5), layout), ((1031,), layout)]


def cases(
    rank: int, world: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str
) -> Iterator[Case]:
    value = Values(shape, dtype, seed)
    yield from even_cases(rank, world, value, layout)
    if shape and 0 not in shape:
        yield from uneven_cases(rank, world, value, layout)


def uneven_reductions(rank: int, world: int) -> int:
    """reduce_scatter of lists of unequal tensors; lists with AVG and PREMUL_SUM."""
    dist.init_process_group("dpcomm")
    checks = 0
    sizes = [5 * r if r != 1 else 70_001 for r in range(world)]
    for dtype in REDUCIBLE:
        for op in ("SUM", "MAX", "AVG", "PREMUL_SUM"):
            if (op == "PREMUL_SUM" and not dtype.is_floating_point) or (
                op == "AVG" and dtype == torch.bool
            ):
                continue
            inputs = [
                [small(r, size, dtype, 17 * to) for to, size in enumerate(sizes)]
                for r in range(world)
            ]
            wanted = reduced([inputs[r][rank] for r in range(world)], op)
            given = [laid_out(x, "strided" if checks % 2 else "plain") for x in inputs[rank]]
            out = outputs_like((sizes[rank],), dtype, "strided" if checks % 3 else "plain")
            chosen = dist._make_nccl_premul_sum(0.5) if op == "PREMUL_SUM" else op
            chosen = getattr(dist.ReduceOp, op) if isinstance(chosen, str) else chosen
            work = dist.reduce_scatter(out, given, op=chosen, async_op=True)
            work.wait()
            assert same(out, wanted), (dtype, op)
            checks += 1
    dist.destroy_process_group()
    return checks


def small(rank: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    return torch.randint(0, 2 if dtype == torch.bool else 4, (size,), generator=generator).to(dtype)


def reduced(inputs: Tensors, op: str) -> torch.Tensor:
    dtype = inputs[0].dtype
    wide = torch.stack([x.double() for x in inputs])
    if op == "MAX":
        return wide.amax(0).to(dtype)
    total = wide.sum(0) * (0.5 if op == "PREMUL_SUM" else 1)
    if op == "AVG":
        if dtype in (torch.float32, torch.float16, torch.bfloat16):
            return (total.float() / len(inputs)).to(dtype)
        total = total / len(inputs)
        return (total if dtype.is_floating_point else total.trunc()).to(dtype)
    return (total.bool() if dtype == torch.bool else total).to(dtype)


def special(rank: int, world: int) -> None:
    """conj and neg bits, leaves, inference tensors, overlapping memory, in-place, refusals."""
    dist.init_process_group("dpcomm")
    group = dist.group.WORLD
    z = torch.complex(torch.arange(4.0) + rank, torch.ones(4))
    blocks = [torch.empty(4, dtype=torch.complex64) for _ in range(world)]
    group.gather([blocks] if rank == 0 else [], [z.conj()], dist.GatherOptions()).wait()
    for r in range(world if rank == 0 else 0):
        assert same(blocks[r], torch.complex(torch.arange(4.0) + r, -torch.ones(4)))
    got = torch.empty(4 * world, dtype=torch.complex64)
    target = got.conj()  # what is written there is stored as its conjugate
    # Not through the dispatcher, which would hand on a copy of it.
    backend = group._get_backend(torch.device("cpu"))
    backend.alltoall_base(target, z.repeat(world).conj(), [], [], dist.AllToAllOptions()).wait()
    wanted = [torch.complex(torch.arange(4.0) + r, torch.ones(4)) for r in range(world)]
    assert same(got, torch.cat(wanted))
    negative = z.conj().imag  # has the neg bit
    assert negative.is_neg()
    parts = [torch.zeros(4) for _ in range(world)]
    dist.all_to_all(parts, [negative] * world)
    assert all(same(part, -torch.ones(4)) for part in parts)

    leaf = torch.zeros(3, requires_grad=True)
    dist.scatter(
        leaf.data, [torch.full((3,), float(r)) for r in range(world)] if rank == 0 else None
    )
    assert leaf.tolist() == [rank] * 3
    with torch.inference_mode():
        turned = torch.zeros(2, 3).t()
        whole = torch.arange(6.0 * world).view(3 * world, 2) + rank
    dist.all_to_all_single(torch.empty(3 * world, 2), whole, async_op=True).wait()
    dist.scatter(turned, [torch.full((3, 2), 7.0)] * world if rank == 1 else None, src=1)
    assert bool((turned == 7).all())

    x = torch.arange(2.0 * world) + 100 * rank  # in place
    dist.all_to_all_single(x, x)
    assert x.tolist() == [100.0 * r + 2 * rank + i for r in range(world) for i in range(2)]
    rows = list((torch.arange(2.0 * world) + 100 * rank).chunk(world))
    dist.all_to_all(rows, rows)
    assert torch.cat(rows).tolist() == x.tolist()
    refusals(rank, world)
    dist.destroy_process_group()


def gathered_into_one(rank: int, world: int) -> int:
    """gather_single, which torch has from 2.14 on: every layout and root."""
    dist.init_process_group("dpcomm", timeout=timedelta(seconds=30))
    checks = 0
    for dtype in WHOLE:
        for shape in ((4,), (3, 5), (0,)):
            value = Values(shape, dtype, 77)
            wanted = joined([value(r, 0) for r in range(world)])
            for layout in ("plain", "strided", "transposed"):
                own = laid_out(value(rank, 0), layout)
                for root in range(world):
                    whole = outputs_like((world * shape[0], *shape[1:]), dtype, layout)
                    output = whole if rank == root else None
                    work = dist.gather_single(own, output, root, async_op=checks % 2 == 0)
                    if work is not None:
                        work.wait()
                    if rank == root:
                        assert same(whole, wanted), (dtype, shape, layout, root)
                    checks += 1
    group = dist.new_group(timeout=timedelta(seconds=30))

    def wrong() -> None:
        output = torch.zeros(4 * world + 1) if rank == 0 else torch.zeros(0)
        group.gather_single(output, torch.ones(4), gather_options(0)).wait()
        dist.barrier(group)

    with pytest.raises(dpcomm.UsageError, match=r"rank 0 .*cannot run gather.*times"):
        wrong()
    dist.destroy_process_group()
    return checks


def refusals(rank: int, world: int) -> None:
    ones = torch.ones(4)
    group = dist.group.WORLD
    peer = (rank + 1) % world
    newer = hasattr(group, "all_to_all_single")  # the method's name from torch 2.13 on
    all_to_all_single = group.all_to_all_single if newer else group.alltoall_base
    refused = {
        "is no rank": lambda: group.gather([], [ones], gather_options(world)),
        "only the root": lambda: group.gather([[ones] * world], [ones], gather_options(peer)),
        "a list of 1 tensors": lambda: group.alltoall([ones], [ones] * world),
        "to itself": lambda: dist.all_to_all(
            [torch.ones(3 if r == rank else 4) for r in range(world)], [ones] * world
        ),
        "split sizes": lambda: all_to_all_single(
            ones, ones, [4] + [0] * world, [], dist.AllToAllOptions()
        ),
        "do not divide": lambda: all_to_all_single(
            torch.ones(2 * world + 1), torch.ones(2 * world + 1), [], [], dist.AllToAllOptions()
        ),
        "negative": lambda: group.send([ones], peer, -1),
        "no other rank": lambda: group.send([ones], rank, 0),
        "no other rank of": lambda: group.recv([ones], world, 0),
        "a list of one": lambda: group.send([ones, ones], peer, 0),
        "mem_allocator": lambda: group._get_backend(torch.device("cpu")).mem_allocator,
        "suspend": lambda: group._get_backend(torch.device("cpu")).suspend(),
        "resume": lambda: group._get_backend(torch.device("cpu")).resume(),
        "memory statistics": lambda: group._get_backend(torch.device("cpu")).memory_stats(),
        "operator SUM": lambda: dist.all_reduce(torch.eye(2).to_sparse(), op=dist.ReduceOp.MAX),
    }
    for text, function in refused.items():
        with pytest.raises(dpcomm.UsageError, match=text):
            function()
    dist.all_reduce(ones)  # nothing was sent: the ranks are still at one
    assert bool((ones == world).all())


def gather_options(root: int) -> dist.GatherOptions:
    options = dist.GatherOptions()
    options.rootRank = root
    return options


def sparse(rank: int, world: int) -> int:
    """all_reduce of sparse tensors, to the bit as gloo."""
    dist.init_process_group("dpcomm")
    gloo = dist.new_group(backend="gloo")
    checks = 0
    for sizes, sparse_dim, entries in (
        ((10,), 1, [4] * world),
        ((7, 5), 2, [9] * world),
        ((7, 5), 1, [3] * world),
        ((100, 4, 2), 1, [50 * (r + 1) for r in range(world)]),
        ((30, 4), 1, [10 * r for r in range(world)]),  # rank 0 has none
        ((8, 2), 1, [0] * world),
    ):
        for dtype in (torch.float32, torch.float64, torch.int64, torch.bfloat16):
            x = sparse_tensor(rank, sizes, sparse_dim, entries[rank], dtype)
            ours, theirs = x.clone(), x.clone()
            if checks % 2:
                dist.all_reduce(ours)
            else:
                dist.all_reduce(ours, async_op=True).wait()
            assert ours.is_coalesced()
            if dtype != torch.bfloat16:  # gloo does not have it
                dist.all_reduce(theirs, group=gloo)
                assert same(ours._indices(), theirs._indices()), (sizes, dtype)
                assert same(ours._values(), theirs._values()), (sizes, dtype)
            every = [
                sparse_tensor(r, sizes, sparse_dim, entries[r], dtype).to_dense()
                for r in range(world)
            ]
            close = torch.stack([y.double() for y in every]).sum(0)
            room = {torch.float32: 1e-4, torch.bfloat16: 0.5}.get(dtype, 1e-9)
            assert torch.allclose(ours.to_dense().double(), close, rtol=room, atol=room)
            checks += 1
    first = dist.all_reduce(torch.ones(3), async_op=True)  # in order with others
    with pytest.raises(dpcomm.UsageError, match="sparse tensors of ranks 0 and 1 differ"):
        dist.all_reduce(torch.eye(3 + (rank == 1)).to_sparse())
    first.wait()
    x = torch.ones(3)
    dist.all_reduce(x)
    assert bool((x == world).all())
    dist.destroy_process_group()
    return checks


def sparse_tensor(
    rank: int, sizes: tuple[int, ...], sparse_dim: int, entries: int, dtype: torch.dtype
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(91 * rank + entries)
    indices = torch.stack(
        [torch.randint(0, n, (entries,), generator=generator) for n in sizes[:sparse_dim]]
    )
    values = torch.randn(entries, *sizes[sparse_dim:], generator=generator) * 8
    return torch.sparse_coo_tensor(indices, values.to(dtype), sizes)  # not coalesced


@pytest.mark.parametrize("world", [2, 3])
def test_movement_of_every_dtype_and_layout(world: int) -> None:
    checks = launch(movement, world).results
    assert checks[0]["dpcomm"] > 500
    assert checks[0]["gloo"] > 10
    assert checks == [checks[0]] * world


@pytest.mark.parametrize("world", [1, 3, 4])
def test_reduce_scatter_of_unequal_blocks(world: int) -> None:
    assert launch(uneven_reductions, world).results[0] > 20


def test_gather_into_one_tensor() -> None:
    if not hasattr(dist, "gather_single"):
        pytest.skip("torch has gather_single from 2.14 on")
    assert launch(gathered_into_one, 3).results == [108] * 3


@pytest.mark.parametrize("world", [2, 3])
def test_special_tensors(world: int) -> None:
    launch(special, world)


@pytest.mark.parametrize("world", [2, 3])
def test_sparse_all_reduce_like_gloo(world: int) -> None:
    assert launch(sparse, world).results[0] == 24
