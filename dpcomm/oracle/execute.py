"""Executes plans with NumPy: the exact bits that every rank must hold after a collective.

Steps come from the schedules themselves, ranges from the same Partition as the executor's; the
arithmetic is that of `dpcomm.oracle.wire`, written from the specification.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dpcomm.errors import UsageError
from dpcomm.oracle import wire as codecs
from dpcomm.schedule.partition import Partition
from dpcomm.schedule.plans import PlanStep, Primitive, find, plan

__all__ = ["Geometry", "execute", "partition"]

Array = npt.NDArray[Any]
_Key = tuple[int, int, int]

_REDUCING: Final = ("all_reduce", "reduce", "reduce_scatter")
_BLOCKED: Final = ("all_gather", "reduce_scatter", "gather", "scatter", "all_to_all")
_GATHERS: Final = ("all_gather", "gather")
_SCATTERS: Final = ("reduce_scatter", "scatter")
_FROM_ROOT: Final = ("broadcast", "scatter")
_TO_ROOT: Final = ("reduce", "gather")
_MAX_SLICES: Final = 2
_GRAIN_BYTES: Final = 64


@dataclass(frozen=True)
class Geometry:
    """The slots of a channel, as the transport has them."""

    slots: int
    slot_bytes: int


def partition(
    collective: str,
    algorithm: str,
    world: int,
    count: int,
    dtype: str,
    wire: str,
    geometry: Geometry,
) -> Partition:
    """How an operation falls into rounds, chunks and slices (law 5).

    A slot holds as many elements as fit, a multiple of the grain: the wire format's block, and at
    least 64 bytes of the tensor. One slice per chunk if all fits one round so; else two, if the
    algorithm is safe with them.

    Args:
        count: elements of the tensor; where it has blocks (all_gather, reduce_scatter, gather,
            scatter, all_to_all) of the largest one.

    Raises:
        UsageError: a slot is too small for one grain, or the algorithm does not exist.
    """
    itemsize = codecs.tensor_dtype(dtype).itemsize
    grain = max(codecs.BLOCK_ELEMS[wire], _GRAIN_BYTES // itemsize, 1)
    grains = geometry.slot_bytes // grain  # no format takes less than a byte an element
    while grains and codecs.slice_bytes(wire, dtype, grains * grain) > geometry.slot_bytes:
        grains -= 1
    if grains == 0:
        raise UsageError(f"a slot of {geometry.slot_bytes} bytes is too small")
    info = find(algorithm, collective)
    blocked = collective in _BLOCKED
    # A pair of ranks cuts its block of an all_to_all alone: there is no count that all know.
    most = 1 if collective == "all_to_all" else _MAX_SLICES
    for slices in range(1, most + 1):
        found = Partition(count, info.chunks(world), slices, grains * grain, grain, blocked)
        if (
            found.rounds() <= 1
            or slices == most
            or info.min_slots(world, slices + 1) > geometry.slots
        ):
            break
    return found


def execute(
    collective: str,
    algorithm: str,
    inputs: Sequence[Array | None],
    *,
    op: str = "sum",
    dtype: str = "float32",
    wire: str = "native",
    root: int = 0,
    factor: float = 1.0,
    geometry: Geometry = Geometry(4, 1 << 18),
    cut: Partition | None = None,
    counts: Sequence[int] | None = None,
    pairs: Sequence[Sequence[int]] | None = None,
) -> list[Array | None]:
    """Runs a collective for all ranks.

    Args:
        inputs: one flat tensor per rank (bfloat16 as its uint16 bits, bool as uint8). all_reduce,
            broadcast, reduce, all_gather, gather: count elements; reduce_scatter, scatter,
            all_to_all: world * count. None is allowed where a rank has no input (broadcast and
            scatter, but for the root).
        factor: of PREMUL_SUM.
        cut: the partition to use, in place of the one that follows from `geometry`.
        counts: elements of each rank's block, where they differ; not of all_to_all.
        pairs: of an all_to_all with blocks that differ: ``pairs[s][t]`` elements go from rank s
            to rank t.

    Returns:
        The output tensor of every rank, None where a rank has none (reduce and gather, but for the
        root).
        NaN that a reduction makes is canonical.

    Raises:
        UsageError: op, dtype and wire do not go together, or the algorithm does not exist.

    Cost: all ranks' steps in this thread, about 20 us per step and slice.
    """
    reducing = collective in _REDUCING
    _check(op, dtype, wire, reducing)
    world = len(inputs)
    blocks = _Blocks.of(collective, inputs, root, counts, pairs)
    if cut is None:
        cut = partition(collective, algorithm, world, max(blocks.sizes), dtype, wire, geometry)
    run = _Run(collective, inputs, op if reducing else "", dtype, wire, root, factor, cut, blocks)
    if world == 1:
        run.copy_own_input()
        return run.outputs
    order = _in_order(plan(algorithm, world, collective=collective, root=root, slices=cut.slices))
    for round_ in range(cut.rounds()):
        for step in order:
            run.step(step, round_)
    return run.outputs


def _check(op: str, dtype: str, wire: str, reducing: bool) -> None:
    if wire not in codecs.WIRES or dtype not in codecs.DTYPES or op not in codecs.OPS:
        raise UsageError(f"unknown wire format, dtype or operator: {wire}, {dtype}, {op}")
    if wire != "native" and not (reducing and codecs.may_be_lossy(op, dtype)):
        raise UsageError(f"{op} on {dtype} may not go in wire format {wire} here")
    if reducing and not codecs.is_supported(op, dtype):
        raise UsageError(f"{op} makes no sense on {dtype}")


def _count(collective: str, inputs: Sequence[Array | None], root: int) -> int:
    """Elements of the tensor, or of a block."""
    first = inputs[root if collective in _FROM_ROOT else 0]
    if first is None:
        raise UsageError("the rank that the data come from has no input")
    if collective in _SCATTERS or collective == "all_to_all":
        if first.size % len(inputs):
            raise UsageError(f"{collective} needs a block for each rank")
        return first.size // len(inputs)
    return first.size


@dataclass(frozen=True)
class _Blocks:
    """The chunks of a collective as parts of tensors, in elements; for what has no blocks, one."""

    sizes: list[int]
    """Of each chunk; of an all_to_all, the one from rank s to rank t is chunk s * world + t."""
    in_input: list[int]
    """Where it begins in the input of a rank that has it."""
    in_output: list[int]
    unequal: bool

    @classmethod
    def of(
        cls,
        collective: str,
        inputs: Sequence[Array | None],
        root: int,
        counts: Sequence[int] | None,
        pairs: Sequence[Sequence[int]] | None,
    ) -> _Blocks:
        world = len(inputs)
        unequal = counts is not None or pairs is not None
        count = 0 if unequal else _count(collective, inputs, root)
        if collective == "all_to_all":
            table = np.array(pairs if pairs is not None else [[count] * world] * world, np.int64)
            return cls(
                table.reshape(-1).tolist(),
                (np.cumsum(table, axis=1) - table).reshape(-1).tolist(),
                (np.cumsum(table, axis=0) - table).reshape(-1).tolist(),
                unequal,
            )
        if collective not in _BLOCKED:
            return cls([count], [0], [0], False)
        sizes = list(counts) if counts is not None else [count] * world
        first = (np.cumsum(sizes) - sizes).tolist()
        nowhere = [0] * world
        scatters = collective in _SCATTERS
        return cls(sizes, first if scatters else nowhere, nowhere if scatters else first, unequal)

    def output_elems(self, collective: str, rank: int, world: int) -> int:
        if collective == "all_to_all":
            return sum(self.sizes[rank::world])
        if collective in _GATHERS:
            return sum(self.sizes)
        return self.sizes[rank if collective in _SCATTERS else 0]


def _in_order(steps: Sequence[PlanStep]) -> list[PlanStep]:
    """The steps in an order in which every message is sent before it is received."""
    streams: dict[tuple[int, int], deque[PlanStep]] = {}
    for step in steps:
        streams.setdefault((step.rank, step.lane), deque()).append(step)
    waiting: dict[_Key, int] = {}
    order: list[PlanStep] = []
    while len(order) < len(steps):
        before = len(order)
        for stream in streams.values():
            while stream:
                step = stream[0]
                keys = [(peer, step.rank, step.recv_lane) for peer in step.recv_peers]
                if not all(waiting.get(key) for key in keys):
                    break
                for key in keys:
                    waiting[key] -= 1
                for peer in step.send_peers:
                    key = (step.rank, peer, step.send_lane)
                    waiting[key] = waiting.get(key, 0) + 1
                order.append(stream.popleft())
        if len(order) == before:
            raise UsageError("the schedule deadlocks")
    return order


class _Run:
    """Tensors, outputs and messages in flight of one collective."""

    def __init__(
        self,
        collective: str,
        inputs: Sequence[Array | None],
        op: str,
        dtype: str,
        wire: str,
        root: int,
        factor: float,
        cut: Partition,
        blocks: _Blocks,
    ) -> None:
        self.inputs = inputs
        self.world = len(inputs)
        self.op, self.dtype, self.wire, self.factor = op, dtype, wire, factor
        self.cut, self.blocks = cut, blocks
        self.blocked = collective in _BLOCKED
        self.channels: dict[_Key, deque[Array]] = {}
        self.outputs: list[Array | None] = [
            np.zeros(blocks.output_elems(collective, rank, self.world), codecs.tensor_dtype(dtype))
            if collective not in _TO_ROOT or rank == root
            else None
            for rank in range(self.world)
        ]

    def copy_own_input(self) -> None:
        """One rank alone: nothing goes over a wire, so nothing is rounded but PREMUL_SUM."""
        tensor, output = self.inputs[0], self.outputs[0]
        assert tensor is not None
        assert output is not None
        output[:] = tensor
        if self.op == "premul_sum":
            acc = codecs.load(self.dtype, tensor)
            output[:] = codecs.store(self.dtype, codecs.premultiply(self.dtype, acc, self.factor))

    def step(self, step: PlanStep, round_: int) -> None:
        chunk = step.chunk if self.blocked else 0
        cut = self.cut
        if self.blocks.unequal:
            cut = replace(cut, count=self.blocks.sizes[chunk])
            if round_ >= cut.rounds():
                return  # beyond the end of this block
        first, elems = cut.slice(round_, step.chunk, step.slice)
        source = slice(
            self.blocks.in_input[chunk] + first, self.blocks.in_input[chunk] + first + elems
        )
        target = slice(
            self.blocks.in_output[chunk] + first, self.blocks.in_output[chunk] + first + elems
        )
        if Primitive.REDUCE in step.primitive:
            kept, sent = self._reduce(step, source, elems)
        elif Primitive.RECV in step.primitive:
            sent = self._receive(step.recv_peers[0], step)
            kept = self._tensor(sent, elems)
        else:
            kept, sent = self._own(step, source)
        if Primitive.COPY in step.primitive:
            output = self.outputs[step.rank]
            assert output is not None, f"{step} writes where there is no output"
            output[target] = kept
        if Primitive.SEND in step.primitive:
            for peer in step.send_peers:
                self.channels.setdefault((step.rank, peer, step.send_lane), deque()).append(sent)

    def _own(self, step: PlanStep, source: slice) -> tuple[Array, Array]:
        """The own input as a tensor, and as it goes on the wire."""
        tensor = self._input(step.rank, source)
        if not self.op:
            return tensor, tensor.view(np.uint8)
        acc = self._contribution(step.rank, source)
        return tensor, codecs.encode(self.wire, self.dtype, acc)

    def _reduce(self, step: PlanStep, source: slice, elems: int) -> tuple[Array, Array]:
        """The sum as it is kept, and as it goes on the wire (law 2: they are the same value)."""
        acc: Array | None = None
        for rank in sorted((step.rank, *step.recv_peers)):
            if rank == step.rank:
                part = self._contribution(rank, source)
                if step.own_as_sent:
                    part = codecs.as_sent(self.wire, self.dtype, part)
            else:
                data = self._receive(rank, step)
                part = codecs.decode(self.wire, self.dtype, data, elems)
            acc = part if acc is None else codecs.combine(self.op, self.dtype, acc, part)
        assert acc is not None
        if Primitive.COPY in step.primitive:
            acc = codecs.finish(self.op, self.dtype, acc, self.world)
        sent = codecs.encode(self.wire, self.dtype, acc)
        if Primitive.SEND in step.primitive:
            return self._tensor(sent, elems), sent
        return codecs.store(self.dtype, acc), sent

    def _input(self, rank: int, source: slice) -> Array:
        tensor = self.inputs[rank]
        assert tensor is not None, f"rank {rank} has no input"
        part: Array = np.ascontiguousarray(tensor[source])
        return part

    def _contribution(self, rank: int, source: slice) -> Array:
        acc = codecs.load(self.dtype, self._input(rank, source))
        if self.op == "premul_sum":
            acc = codecs.premultiply(self.dtype, acc, self.factor)
        return acc

    def _receive(self, peer: int, step: PlanStep) -> Array:
        return self.channels[(peer, step.rank, step.recv_lane)].popleft()

    def _tensor(self, data: Array, elems: int) -> Array:
        """Received bytes as elements of the tensor; on the native wire they are its bytes."""
        if self.wire == "native":
            return data.view(codecs.tensor_dtype(self.dtype))
        return codecs.store(self.dtype, codecs.decode(self.wire, self.dtype, data, elems))
