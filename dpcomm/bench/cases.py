"""What is run: a collective on a dtype and size, the data it runs on, and what has to come out.

Data are periodic: each rank's contribution is a random pattern of a prime number of elements,
repeated. So the reference costs the same at 8 bytes and at 8 gigabytes, while a chunk, slice or
block (multiples of powers of two) that lands in the wrong place does not match.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["COLLECTIVES", "DTYPES", "PERIOD", "REDUCE_OPS", "Case", "Expected", "error_bound"]

COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_list", "reduce_scatter")
REDUCE_OPS = ("sum", "prod", "min", "max", "avg", "premul")
DTYPES = {
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "double": torch.float64,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
}
PREMUL_FACTOR = 2.0
PERIOD = 65537  # prime
_ROWS = 64  # periods that a comparison handles at a time (bounds its memory)
_UNIT_ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    """One collective on one size; the same on every rank."""

    collective: str
    dtype_name: str
    op: str  # of reductions, else "none"
    requested_bytes: int
    world_size: int
    root: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def reduces(self) -> bool:
        return self.collective in ("all_reduce", "reduce_scatter")

    @property
    def gathers(self) -> bool:
        return self.collective in ("all_gather", "all_gather_list")

    @property
    def count(self) -> int:
        """Elements as nccl-tests count them: of the smaller of the two buffers; at least one."""
        elems = self.requested_bytes // self.dtype.itemsize
        if self.gathers or self.collective == "reduce_scatter":
            elems //= self.world_size
        return max(elems, 1)

    @property
    def input_elems(self) -> int:
        return self.count * (self.world_size if self.collective == "reduce_scatter" else 1)

    @property
    def output_elems(self) -> int:
        return self.count * (self.world_size if self.gathers else 1)

    @property
    def size_bytes(self) -> int:
        """Bytes of the larger of the two buffers."""
        return max(self.input_elems, self.output_elems) * self.dtype.itemsize

    def can_be_lossy(self) -> bool:
        """True if a lossy wire format may carry this (DESIGN law 8)."""
        sums = self.reduces and self.op in ("sum", "avg", "premul")
        return sums and self.dtype in (torch.float32, torch.float16, torch.bfloat16)

    def contribution(self, rank: int, seed: int, lossy: bool = False) -> torch.Tensor:
        """One period of what `rank` puts in: small integers, or normal deviates if `lossy`."""
        generator = torch.Generator().manual_seed(seed * 100_003 + rank)
        if lossy:
            return torch.randn(PERIOD, generator=generator).to(self.dtype)
        if self.op == "prod":  # ones and a few twos, so that many ranks stay exact
            ones = torch.randint(0, 4, (PERIOD,), generator=generator)
            return (ones == 0).to(self.dtype) + 1
        low = 0 if self.dtype == torch.uint8 else -4
        return torch.randint(low, low + 9, (PERIOD,), generator=generator).to(self.dtype)


def fill(tensor: torch.Tensor, pattern: torch.Tensor, start: int = 0) -> None:
    """Writes the repeated pattern, from its element `start` on, into a flat tensor."""
    for part, period in _periods(tensor, pattern, start):
        part.copy_(period)


def _periods(
    tensor: torch.Tensor, pattern: torch.Tensor, start: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of a piece of the tensor and what belongs there, broadcastable."""
    pattern = pattern.roll(-(start % PERIOD))
    whole = tensor.numel() // PERIOD
    for row in range(0, whole, _ROWS):
        rows = min(_ROWS, whole - row)
        yield tensor[row * PERIOD : (row + rows) * PERIOD].view(rows, PERIOD), pattern
    tail = tensor.numel() - whole * PERIOD
    if tail:
        yield tensor[whole * PERIOD :], pattern[:tail]


def _count_wrong(
    tensor: torch.Tensor, pattern: torch.Tensor, start: int, tolerance: torch.Tensor | None
) -> int:
    wrong = 0
    if tolerance is None:
        for part, period in _periods(tensor, pattern, start):
            wrong += int((part != period).sum())
        return wrong
    limits = _periods(tensor, tolerance, start)
    for (part, period), (_, limit) in zip(_periods(tensor, pattern, start), limits, strict=True):
        error = (part.double() - period.double()).abs()
        wrong += int((~(error <= limit)).sum())  # NaN compares false, so it counts
    return wrong


@dataclass(frozen=True)
class Expected:
    """What the output has to hold: (one period, elements, first element in the period) in order."""

    segments: list[tuple[torch.Tensor, int, int]]
    tolerance: torch.Tensor | None  # one period of absolute errors; None: exact

    @staticmethod
    def of(case: Case, rank: int, seed: int, wire: str = "native") -> Expected:
        """The result on `rank`, from every rank's contribution, in double or int64."""
        lossy = wire != "native" and case.can_be_lossy()
        inputs = [case.contribution(r, seed, lossy) for r in range(case.world_size)]
        if case.collective == "broadcast":
            return Expected([(inputs[case.root], case.count, 0)], None)
        if case.gathers:
            return Expected([(period, case.count, 0) for period in inputs], None)
        values = _reduce(case, inputs)
        tolerance = None
        if lossy:
            tolerance = error_bound(case, inputs, wire)
        elif case.op == "avg" and case.dtype.is_floating_point:  # one unit in the last place
            tolerance = values.double().abs() * torch.finfo(case.dtype).eps
        start = rank * case.count if case.collective == "reduce_scatter" else 0
        return Expected([(values, case.count, start)], tolerance)

    def count_wrong(self, output: torch.Tensor) -> int:
        """How many elements of a flat output are not what they have to be."""
        wrong = first = 0
        for period, count, start in self.segments:
            part = output[first : first + count]
            wrong += _count_wrong(part, period, start, self.tolerance)
            first += count
        return wrong + abs(output.numel() - first)


def _reduce(case: Case, inputs: list[torch.Tensor]) -> torch.Tensor:
    """The reduction of one period; wraps as the dtype does, integers truncate toward zero."""
    wide = torch.float64 if case.dtype.is_floating_point else torch.int64
    stacked = torch.stack([period.to(wide) for period in inputs])
    if case.op == "prod":
        return stacked.prod(0).to(case.dtype)
    if case.op in ("min", "max"):
        return (stacked.amin(0) if case.op == "min" else stacked.amax(0)).to(case.dtype)
    total = stacked.sum(0)
    if case.op == "avg":
        total = torch.div(
            total,
            case.world_size,
            rounding_mode=None if wide == torch.float64 else "trunc",
        )
    elif case.op == "premul":
        total = total * PREMUL_FACTOR
    return total.to(case.dtype)


def error_bound(case: Case, inputs: list[torch.Tensor], wire: str) -> torch.Tensor:
    """The largest error that a lossy wire format may make, per element of one period.

    The bound of docs/design.md (wire formats) with as many roundings as a ring makes, the most of
    any algorithm, and with the largest magnitude of the whole period in place of the block's.
    """
    world, scale = case.world_size, PREMUL_FACTOR if case.op == "premul" else 1.0
    magnitudes = torch.stack([period.double().abs() * scale for period in inputs])
    total = magnitudes.sum(0)
    if wire == "int8":
        largest = float(magnitudes.amax(1).sum()) + float(total.max())
        bound = torch.full_like(total, largest / 127 * (1 + 2 / 127))
    else:
        rounding = (1 + _UNIT_ROUNDOFF[wire]) ** world - 1
        tiny = 2.0**-134  # half of the smallest bf16 subnormal
        if wire == "fp16":
            tiny = 2.0 ** (int(torch.ceil(torch.log2(total.max()))) - 25)
        bound = total * rounding * (1 + world * 2.0**-24) + world * tiny
    bound += total * world * 2.0**-24
    if case.op == "avg":
        bound, total = bound / world, total / world
    return bound + torch.finfo(case.dtype).eps * (total + bound)
