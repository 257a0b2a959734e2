"""One collective operation as data, with its inputs, made alike in every process.

Shared by the tests, which compute the expected result, and the workers, which run the operation.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpcomm.oracle import wire as codecs

Array = npt.NDArray[Any]

REDUCING = ("all_reduce", "reduce", "reduce_scatter")
GATHERS = ("all_gather", "gather")
SCATTERS = ("reduce_scatter", "scatter")
BLOCKED = (*GATHERS, *SCATTERS, "all_to_all")
BIT_VIEWS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Case:
    """One operation; the same on all ranks."""

    collective: str
    algorithm: str
    count: int
    """Elements that a rank contributes (all_gather, gather), receives (reduce_scatter, scatter),
    sends to each rank (all_to_all) or both contributes and receives."""
    dtype: str = "float32"
    op: str = "sum"
    wire: str = "native"
    root: int = 0
    factor: float = 1.0
    data: str = "random"
    """exact, random, special (NaN, infinities, denormals, -0, extremes), ill (badly scaled),
    denormal."""
    offset: int = 0
    """Bytes by which the arrays miss a 64-byte boundary."""
    in_place: bool = False
    unequal: bool = False
    """Blocks of sizes drawn by the seed, some of them empty; `count` is the largest possible."""
    seed: int = 0

    def __str__(self) -> str:
        place = "in place" if self.in_place else "out of place"
        return (
            f"{self.collective} {self.algorithm} {self.count} x {self.dtype} {self.op} "
            f"wire {self.wire} root {self.root} {self.data} +{self.offset} bytes {place} "
            f"{'unequal blocks ' if self.unequal else ''}seed {self.seed}"
        )


def _sizes(case: Case, shape: tuple[int, ...]) -> Array:
    if not case.unequal:
        return np.full(shape, case.count, np.int64)
    random = np.random.default_rng([case.seed, 29])
    choices = [0, case.count, case.count // 2, case.count // 3, min(case.count, 1)]
    sizes: Array = random.choice(np.array(choices, np.int64), shape)
    return sizes


def block_sizes(case: Case, world: int) -> list[int]:
    """Elements of each rank's block; not of an all_to_all."""
    return [int(size) for size in _sizes(case, (world,))]


def pair_sizes(case: Case, world: int) -> list[list[int]]:
    """Of an all_to_all: elements that rank s sends to rank t, as [s][t]."""
    return [[int(size) for size in row] for row in _sizes(case, (world, world))]


def counts_of(case: Case, rank: int, world: int) -> tuple[list[int], list[int]]:
    """What the call is given as counts and recv_counts."""
    if not case.unequal:
        return [], []
    if case.collective == "all_to_all":
        pairs = pair_sizes(case, world)
        return pairs[rank], [row[rank] for row in pairs]
    return block_sizes(case, world), []


def input_elems(case: Case, rank: int, world: int) -> int:
    """Elements of the array that a rank gives."""
    if case.collective not in BLOCKED:
        return case.count
    if case.collective == "all_to_all":
        return sum(pair_sizes(case, world)[rank])
    sizes = block_sizes(case, world)
    return sum(sizes) if case.collective in SCATTERS else sizes[rank]


def output_elems(case: Case, rank: int, world: int) -> int:
    """Elements of the array that a rank gets."""
    if case.collective not in BLOCKED:
        return case.count
    if case.collective == "all_to_all":
        return sum(row[rank] for row in pair_sizes(case, world))
    sizes = block_sizes(case, world)
    return sum(sizes) if case.collective in GATHERS else sizes[rank]


def own_block(case: Case, rank: int, world: int) -> tuple[int, int]:
    """First element and elements of a rank's block in the larger array."""
    sizes = block_sizes(case, world)
    return sum(sizes[:rank]), sizes[rank]


def has_input(case: Case, rank: int) -> bool:
    """Whether this rank gives an array (a broadcast has one for both)."""
    return case.collective != "scatter" or rank == case.root


def has_output(case: Case, rank: int) -> bool:
    """Whether this rank gets a result."""
    return case.collective not in ("reduce", "gather") or rank == case.root


def make_input(case: Case, rank: int, world: int) -> Array:
    """The contribution of a rank: bfloat16 as its bits, bool as uint8."""
    random = np.random.default_rng([case.seed, rank, 17])
    elems = input_elems(case, rank, world)
    if case.dtype == "bool":
        return random.integers(0, 2, elems, dtype=np.uint8)
    if case.dtype in ("float32", "float64", "float16", "bfloat16"):
        return _floats(case, random, elems, rank)
    kind = codecs.tensor_dtype(case.dtype)
    if case.data == "exact":
        return random.integers(0, 3, elems).astype(kind)
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    values: Array = random.integers(low, high, elems, dtype=kind, endpoint=True)
    if case.data == "special" and elems:
        values[random.integers(0, elems, elems // 4 + 1)] = low
        values[random.integers(0, elems, elems // 4 + 1)] = high
    return values


def _floats(case: Case, random: np.random.Generator, elems: int, rank: int) -> Array:
    if case.data == "exact":
        values = random.integers(0, 3, elems).astype(np.float64)
    elif case.data == "denormal":
        values = random.integers(-50, 50, elems) * 1e-45
    else:
        values = random.standard_normal(elems)
    if case.data == "ill":  # each stretch of 512 elements and each rank has a scale of its own
        scales = 10.0 ** random.uniform(-8, 4, elems // 512 + 1)
        values = values * np.repeat(scales, 512)[:elems]
    if case.data == "special" and elems:
        _sprinkle(values, random)
    with np.errstate(over="ignore", under="ignore"):
        if case.dtype == "bfloat16":
            return codecs.store("bfloat16", values.astype(np.float32))
        cast: Array = values.astype(codecs.tensor_dtype(case.dtype))
    return cast


def _sprinkle(values: Array, random: np.random.Generator) -> None:
    """A tenth of the elements become special ones; most blocks keep some, some blocks none."""
    special = [
        np.nan,
        np.inf,
        -np.inf,
        -0.0,
        0.0,
        1e-45,
        -1e-40,
        6e-8,
        3e38,
        -3.4e38,
        65504.0,
        1e-30,
    ]
    where = random.random(values.size) < 0.1
    where &= np.repeat(random.random(values.size // 512 + 1) < 0.7, 512)[: values.size]
    values[where] = random.choice(special, int(where.sum()))


def canonical(case: Case, output: Array) -> Array:
    """The bits with every NaN the same, for comparisons of readers that make different ones."""
    if output.size == 0:
        return np.empty(0, np.uint8)
    bits = output.view(BIT_VIEWS.get(output.itemsize, np.uint8)).copy()
    if case.dtype == "bfloat16":
        bits[(bits & 0x7FFF) > 0x7F80] = 0x7FC0
    elif output.dtype.kind == "f":
        bits[np.isnan(output)] = 0x7FC0
    return bits


def digest(array: Array) -> str:
    """Of the bytes."""
    return hashlib.sha1(np.ascontiguousarray(array).tobytes()).hexdigest()
