"""What gpu_check.py runs, what has to come out, and the report."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dpcomm import schedule
from dpcomm.oracle import wire as codecs
from dpcomm.oracle.ctas import execute_on_ctas
from dpcomm.oracle.execute import Geometry

Array = npt.NDArray[Any]
FLOATS, WIRES = ("float32", "float16", "bfloat16"), ("native", "fp16", "bf16", "int8")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")


@dataclass
class Check:
    """One line of the report."""

    part: str
    name: str
    ok: bool
    text: str = ""


class Report:
    """Checks and figures; prints as it goes."""

    def __init__(self) -> None:
        self.checks: list[Check] = []
        self.figures: dict[str, Any] = {}

    def add(self, part: str, name: str, ok: bool, text: str = "") -> None:
        self.checks.append(Check(part, name, ok, text))
        print(f"{'ok    ' if ok else 'FAILED'} {part:8} {name}  {text}".rstrip(), flush=True)

    def run(self, part: str, name: str, check: Callable[[], str]) -> None:
        """A check that returns what it has to say, and raises where something does not hold."""
        try:
            self.add(part, name, True, check())
        except Exception as error:
            detail = "" if isinstance(error, AssertionError) else traceback.format_exc()
            self.add(part, name, False, f"{type(error).__name__}: {error}\n{detail}".rstrip())

    def as_dict(self) -> dict[str, Any]:
        return {"checks": [vars(check) for check in self.checks], "figures": self.figures}


@dataclass(frozen=True)
class Operation:
    collective: str
    algorithm: str
    dtype: str = "float32"
    wire: str = "native"
    op: str = "sum"
    count: int = 50_001
    offset: int = 0
    """Elements by which the tensors lie behind an aligned place."""

    def __str__(self) -> str:
        text = f"{self.collective} {self.algorithm} {self.dtype} {self.wire} {self.op} {self.count}"
        return text + (f" +{self.offset}" if self.offset else "")


def operations(quick: bool) -> Iterator[Operation]:
    """Every kernel with every schedule that it serves; operators, sizes and alignments besides."""
    reducing = [(c, a.name) for c in REDUCING for a in schedule.algorithms(c)]
    some = reducing[:: 5 if quick else 1]
    for (collective, name), dtype, wire in itertools.product(some, FLOATS, WIRES):
        yield Operation(collective, name, dtype, wire)
    for (collective, name), dtype in itertools.product(some, ("int32", "int64", "float64")):
        yield Operation(collective, name, dtype)
    for collective in ("broadcast", "all_gather"):
        for algorithm in schedule.algorithms(collective):
            yield Operation(collective, algorithm.name, "uint8", count=70_003)
    for op, dtype in itertools.product(("avg", "premul_sum", "product", "min", "max"), FLOATS):
        yield Operation("all_reduce", "two_shot", dtype, op=op)
        yield Operation("all_reduce", "one_shot", dtype, op=op, count=3001)
    for count in (1, 2, 127, 1024, 65_536) if quick else (1, 2, 3, 127, 512, 1024, 65_536, 999_999):
        for name in ("ring", "double_tree", "two_shot", "one_shot"):
            yield Operation("all_reduce", name, wire="fp16", count=count)
            yield Operation("all_reduce", name, count=count, offset=1)


def random_input(operation: Operation, world: int, random: np.random.Generator) -> Array:
    count = operation.count * (world if operation.collective == "reduce_scatter" else 1)
    dtype = codecs.tensor_dtype(operation.dtype)
    if operation.dtype in ("int32", "int64", "uint8"):
        return random.integers(0, 100, count).astype(dtype)
    values = random.standard_normal(count) * 2.0 ** random.integers(-9, 4, count)
    accumulator = codecs.accumulator_dtype(operation.dtype)
    return codecs.store(operation.dtype, values.astype(accumulator))


def expected(
    operation: Operation, inputs: Sequence[Array], geometry: Geometry, ctas: int
) -> list[Array | None]:
    """The oracle's outputs."""
    return execute_on_ctas(
        operation.collective,
        operation.algorithm,
        inputs,
        count=operation.count,
        geometry=geometry,
        ctas=ctas,
        op=operation.op,
        dtype=operation.dtype,
        wire=operation.wire,
        factor=0.375,
    )


def same_bits(got: Array, want: Array) -> bool:
    return got.tobytes() == want.tobytes()
