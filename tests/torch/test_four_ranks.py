"""Four ranks, in groups of four, three and two: calls drawn at random, each made on dpcomm and on
gloo, or, where gloo does not have it, compared with what its other calls give. To the bit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from harness import launch
from tensors import joined, poisoned, same

import dpcomm  # noqa: F401

PATIENCE = timedelta(seconds=60)
TURNS = 12  # of each call
MEMBERS = [[0, 1, 2, 3], [3, 1, 0], [1, 3]]  # in this order they count in their groups
DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]
OPERATORS = [dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT]
Tensors = list[torch.Tensor]


class Drawn:
    """What a turn is made of: alike on all members of the group, but for their values."""

    def __init__(self, seed: int, rank: int, world: int) -> None:
        self.dice = random.Random(seed)
        self.seed, self.rank, self.world = seed, rank, world
        self.dtype = self.dice.choice(DTYPES)
        self.op = self.dice.choice(OPERATORS)
        self.root = self.dice.randrange(world)
        self.columns = self.dice.choice([1, 3, 17])
        self.strided = self.dice.random() < 0.5
        self.asynchronous = self.dice.random() < 0.5
        self.rows = [
            [self.dice.choice([0, 1, 2, 5, 40, 300]) for _ in range(world)] for _ in range(world)
        ]  # from one rank to another

    def value(self, rank: int, salt: int, rows: int) -> torch.Tensor:
        """Small integers: exact in every dtype and order."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + 100 * rank + salt)
        x = torch.randint(0, 4, (rows, self.columns), generator=generator).to(self.dtype)
        return self.laid_out(x)

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        if not self.strided:
            return x
        wide = torch.zeros((x.shape[1], 2 * x.shape[0] + 1), dtype=x.dtype)
        return wide.t()[1::2].copy_(x)

    def output(self, rows: int) -> torch.Tensor:
        if not self.strided:
            return poisoned((rows, self.columns), self.dtype)
        return poisoned((self.columns, 2 * rows + 1), self.dtype).t()[1::2]


class Call:
    """Makes calls on one of the two groups of a turn."""

    def __init__(self, group: dist.ProcessGroup, asynchronous: bool) -> None:
        self.group = group
        self.asynchronous = asynchronous

    def __call__(self, function: Callable[..., dist.Work | None], *args: object, **kw: object):
        work = function(*args, group=self.group, async_op=self.asynchronous, **kw)
        if work is not None:
            work.wait()


def even(drawn: Drawn) -> int:
    return drawn.rows[0][0]


def all_reduce(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    x = drawn.value(drawn.rank, 0, even(drawn))
    call(dist.all_reduce, x, op=drawn.op)
    return [x]


def reduce(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    x = drawn.value(drawn.rank, 0, even(drawn))
    call(dist.reduce, x, op=drawn.op, group_dst=drawn.root)
    # gloo leaves what it needed on the way in the tensors of the others.
    return [x if drawn.rank == drawn.root else drawn.value(drawn.rank, 0, even(drawn))]


def broadcast(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    rows = even(drawn)
    x = drawn.value(drawn.rank, 0, rows) if drawn.rank == drawn.root else drawn.output(rows)
    call(dist.broadcast, x, group_src=drawn.root)
    return [x]


def all_gather(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    """Of blocks of unequal size; with gloo each is a broadcast."""
    sizes = drawn.rows[0]
    own = drawn.value(drawn.rank, 0, sizes[drawn.rank])
    outs = [drawn.output(n) for n in sizes]
    if not gloo:
        call(dist.all_gather, outs, own)
        return outs
    outs[drawn.rank] = own
    for rank, out in enumerate(outs):
        call(dist.broadcast, out, group_src=rank)
    return outs


def all_gather_into_tensor(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    out = drawn.output(drawn.world * even(drawn))
    own = drawn.value(drawn.rank, 0, even(drawn))
    call(dist.all_gather_into_tensor, out, own)
    return [out]


def reduce_scatter(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    """Of blocks of unequal size; with gloo the own part of an all_reduce."""
    sizes = drawn.rows[0]
    blocks = [drawn.value(drawn.rank, rank, n) for rank, n in enumerate(sizes)]
    if gloo:
        whole = joined(blocks)
        call(dist.all_reduce, whole, op=drawn.op)
        return [whole.split(sizes)[drawn.rank]]
    out = drawn.output(sizes[drawn.rank])
    call(dist.reduce_scatter, out, blocks, op=drawn.op)
    return [out]


def gather(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    outs = [drawn.output(even(drawn)) for _ in range(drawn.world)]
    own = drawn.value(drawn.rank, 0, even(drawn))
    is_root = drawn.rank == drawn.root
    call(dist.gather, own, outs if is_root else None, group_dst=drawn.root)
    return outs if is_root else []


def scatter(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    out = drawn.output(even(drawn))
    blocks = [drawn.value(drawn.rank, rank, even(drawn)) for rank in range(drawn.world)]
    is_root = drawn.rank == drawn.root
    call(dist.scatter, out, blocks if is_root else None, group_src=drawn.root)
    return [out]


def splits(drawn: Drawn) -> tuple[list[int], list[int]]:
    return drawn.rows[drawn.rank], [row[drawn.rank] for row in drawn.rows]


def all_to_all_single(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    sent, got = splits(drawn)
    whole = joined([drawn.value(drawn.rank, rank, n) for rank, n in enumerate(sent)])
    out, given = drawn.output(sum(got)), drawn.laid_out(whole)
    call(dist.all_to_all_single, out, given, got, sent)
    return [out]


def all_to_all(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    """Lists; with gloo an all_to_all_single."""
    if gloo:
        return list(all_to_all_single(drawn, call, gloo)[0].split(splits(drawn)[1]))
    sent, got = splits(drawn)
    outs = [drawn.output(n) for n in got]
    call(dist.all_to_all, outs, [drawn.value(drawn.rank, r, n) for r, n in enumerate(sent)])
    return outs


def messages(drawn: Drawn, call: Call, gloo: bool) -> Tensors:
    """From each to each, tags from last to first; all posted, then all received."""
    sent, got = splits(drawn)
    others = [rank for rank in range(drawn.world) if rank != drawn.rank]
    works, outs = [], []
    for rank in others:
        for tag in (0, 1):
            x = drawn.value(drawn.rank, 10 * rank + tag, sent[rank] + tag)
            works.append(dist.isend(x, group=call.group, group_dst=rank, tag=tag))
    for rank in others:
        for tag in (1, 0):
            out = drawn.output(got[rank] + tag)
            outs.append(out)
            works.append(dist.irecv(outs[-1], group=call.group, group_src=rank, tag=tag))
    for work in works:
        work.wait()
    return outs


CALLS = [
    all_reduce,
    reduce,
    broadcast,
    all_gather,
    all_gather_into_tensor,
    reduce_scatter,
    gather,
    scatter,
    all_to_all_single,
    all_to_all,
    messages,
]


def compared(rank: int, world: int) -> dict[str, int]:
    """How often each call was made on this rank."""
    dist.init_process_group("dpcomm", timeout=PATIENCE)
    pairs = [
        tuple(dist.new_group(m, timeout=PATIENCE, backend=b, sort_ranks=False) for b in BACKENDS)
        for m in MEMBERS
    ]
    seed = torch.tensor([random.randrange(1 << 30)])  # another one each time
    dist.broadcast(seed, 0)
    dice = random.Random(int(seed))
    counts: Counter[str] = Counter()
    for turn in range(TURNS):
        for function in CALLS:
            members = dice.choice(MEMBERS) if turn else MEMBERS[0]
            one = dice.randrange(1 << 30)
            if rank not in members:
                continue
            mine, theirs = pairs[MEMBERS.index(members)]
            drawn = [Drawn(one, members.index(rank), len(members)) for _ in range(2)]
            drawn[1].strided = False  # of a strided tensor gloo takes what lies between
            got = function(drawn[0], Call(mine, drawn[0].asynchronous), False)
            wanted = function(drawn[1], Call(theirs, False), True)
            where = (function.__name__, members, vars(drawn[0]), f"seed {int(seed)}")
            assert len(got) == len(wanted), where
            for a, b in zip(got, wanted, strict=True):
                assert same(a, b), where
            counts[function.__name__] += 1
    dist.destroy_process_group()
    return dict(counts)


BACKENDS = ("dpcomm", "gloo")


def test_calls_at_random_like_gloo() -> None:
    counts = launch(compared, 4).results
    assert set(counts[0]) == {call.__name__ for call in CALLS}
    assert sum(sum(each.values()) for each in counts) > 2 * TURNS * len(CALLS)
