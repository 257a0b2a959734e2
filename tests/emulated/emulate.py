"""Runs collectives on emulated devices and holds their bits against the oracle.

A Case is a group of virtual ranks and a list of operations that they run one after the other; the
executable (driver/) runs it in one process on one thread, the oracle in this one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpcomm.oracle import wire as codecs
from dpcomm.oracle.ctas import execute_on_ctas
from dpcomm.oracle.execute import Geometry

Array = npt.NDArray[Any]
DEADLINE_S = 300.0
CAMPAIGN_DEADLINE_S = 6 * 3600.0
BLOCKED = ("all_gather", "reduce_scatter")
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
TSAN_EXIT = 66


@dataclass(frozen=True)
class Operation:
    """One collective, as all ranks call it."""

    collective: str = "all_reduce"
    algorithm: str = "ring"
    dtype: str = "float32"
    op: str = "sum"
    wire: str = "native"
    count: int = 1000
    """Elements of the tensor; of a block for all_gather and reduce_scatter."""
    root: int = 0
    factor: float = 1.0
    ctas: int = 1
    in_place: bool = False
    input_offset: int = 0
    """Elements by which the tensor lies behind an aligned place."""
    output_offset: int = 0
    values: str = "mixed"
    """"mixed", "small" (exact sums) or "special" (with Inf, NaN, huge and tiny ones)."""


@dataclass(frozen=True)
class Case:
    """Virtual ranks and what they run."""

    world: int = 2
    operations: tuple[Operation, ...] = (Operation(),)
    ctas: int = 1
    threads: int = 64
    slots: int = 2
    slot_bytes: int = 4096
    packets: int = 0
    virtual_ranks: bool = True
    seed: int = 1
    resident: int = 0
    count: bool = False
    extra: tuple[tuple[str, int], ...] = ()
    """Further words of the driver's case line."""
    data_seed: int = 0

    def inputs(self) -> list[list[Array | None]]:
        """By operation and rank. A function of the case alone."""
        random = np.random.default_rng([self.data_seed, self.seed])
        return [
            [make_input(operation, rank, self.world, random) for rank in range(self.world)]
            for operation in self.operations
        ]

    def request(self, inputs: Sequence[Sequence[Array | None]]) -> bytes:
        """What the driver reads."""
        words: dict[str, int] = {
            "operations": len(self.operations),
            "world": self.world,
            "ctas": self.ctas,
            "threads": self.threads,
            "slots": self.slots,
            "slot_bytes": self.slot_bytes,
            "packets": self.packets,
            "virtual_ranks": int(self.virtual_ranks),
            "seed": self.seed,
            "resident": self.resident,
            "count": int(self.count),
        }
        words.update(self.extra)
        parts = [("case " + " ".join(f"{k}={v}" for k, v in words.items()) + "\n").encode()]
        for operation, tensors in zip(self.operations, inputs, strict=True):
            parts.append((operation_line(operation) + "\n").encode())
            parts += [tensor.tobytes() for tensor in tensors if tensor is not None]
        return b"".join(parts)


def operation_line(operation: Operation) -> str:
    itemsize = codecs.tensor_dtype(operation.dtype).itemsize
    words = {
        "collective": operation.collective,
        "algorithm": operation.algorithm,
        "dtype": operation.dtype,
        "op": operation.op,
        "wire": operation.wire,
        "count": operation.count,
        "root": operation.root,
        "factor": repr(operation.factor),
        "ctas": operation.ctas,
        "in_place": int(operation.in_place),
        "input_offset": operation.input_offset * itemsize,
        "output_offset": operation.output_offset * itemsize,
    }
    return "op " + " ".join(f"{key}={value}" for key, value in words.items())


@dataclass
class Result:
    """What became of a case."""

    status: str
    """"ok", "stuck", "fault" or "usage"."""
    turns: int
    text: str
    outputs: list[list[Array | None]] = field(default_factory=list)
    """By operation and rank."""

    def lines(self, kind: str) -> list[dict[str, str]]:
        """Lines of the text that start with `kind`, as key -> value."""
        return [
            dict(word.split("=", 1) for word in line.split()[1:])
            for line in self.text.splitlines()
            if line.startswith(kind + " ")
        ]

    def counts(self) -> list[dict[str, int]]:
        """What each rank did (runtime/memory.h)."""
        return [{key: int(value) for key, value in line.items()} for line in self.lines("counts")]


# --- inputs ---------------------------------------------------------------------------------------
def make_input(
    operation: Operation, rank: int, world: int, random: np.random.Generator
) -> Array | None:
    if operation.collective == "broadcast" and rank != operation.root:
        return None
    count = operation.count * (world if operation.collective == "reduce_scatter" else 1)
    dtype = codecs.tensor_dtype(operation.dtype)
    if operation.collective not in REDUCING:
        return random.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)
    if dtype.kind in "iu" and operation.dtype != "bfloat16":
        high = 4 if operation.op == "product" else np.iinfo(dtype).max
        return random.integers(-high, high, count, dtype, endpoint=True)
    acc_dtype = codecs.accumulator_dtype(operation.dtype)
    if operation.values == "small":
        return codecs.store(operation.dtype, random.integers(-8, 9, count).astype(acc_dtype))
    values = random.standard_normal(count)
    if operation.op != "product":
        # Blocks of different magnitude, so that scales differ.
        blocks = random.integers(-12, 5, count // 100 + 1)
        values *= np.repeat(2.0**blocks, 100)[:count]
    if operation.values == "special" and count:
        places = random.integers(0, count, count // 50 + 1)
        chosen = random.choice([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e38, -1e-40], places.size)
        values[places] = chosen
    with np.errstate(over="ignore"):
        return codecs.store(operation.dtype, values.astype(acc_dtype))


# --- what must come out ---------------------------------------------------------------------------
def expected(
    case: Case, operation: Operation, inputs: Sequence[Array | None]
) -> list[Array | None]:
    """The oracle's outputs."""
    return execute_on_ctas(
        operation.collective,
        operation.algorithm,
        inputs,
        count=operation.count,
        geometry=Geometry(case.slots, case.slot_bytes),
        ctas=operation.ctas,
        op=operation.op if operation.collective in REDUCING else "sum",
        dtype=operation.dtype,
        wire=operation.wire,
        root=operation.root,
        factor=operation.factor,
    )


def differences(operation: Operation, got: Array, want: Array) -> Array:
    """Indexes of elements that differ; NaN equals NaN, all else bit for bit."""
    bits = np.dtype(f"u{got.dtype.itemsize}")
    differ = got.view(bits) != want.view(bits)
    if operation.collective in REDUCING:
        differ &= ~(is_nan(operation.dtype, got) & is_nan(operation.dtype, want))
    return np.flatnonzero(differ)


def is_nan(dtype: str, tensor: Array) -> Array:
    loaded = codecs.load(dtype, tensor)
    result: Array = loaded != loaded
    return result


# --- running --------------------------------------------------------------------------------------
class Emulation:
    """An executable, and how to run cases with it."""

    def __init__(self, executable: Path, thread_sanitizer: bool = False) -> None:
        self.executable = executable
        self.thread_sanitizer = thread_sanitizer
        self.reports = ""
        """What the executable wrote to standard error in the last run."""

    def run(self, cases: Sequence[Case], deadline_s: float = DEADLINE_S) -> list[Result]:
        """One result for each case. ThreadSanitizer's reports end the run: a result "race"."""
        inputs = [case.inputs() for case in cases]
        request = b"".join(case.request(given) for case, given in zip(cases, inputs, strict=True))
        command = [str(self.executable)]
        if self.thread_sanitizer and shutil.which("setarch"):
            # gcc 12's thread sanitizer does not know the address layouts that newer kernels choose.
            command = ["setarch", os.uname().machine, "-R", *command]
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            timeout=deadline_s,
            env=os.environ | {"TSAN_OPTIONS": f"halt_on_error=1 exitcode={TSAN_EXIT}"},
            check=False,
        )
        self.reports = done.stderr.decode(errors="replace")
        results = parse(done.stdout, cases)
        if done.returncode == TSAN_EXIT and "ThreadSanitizer" in self.reports:
            results.append(Result("race", 0, self.reports))
        elif done.returncode != 0 or len(results) != len(cases):
            results.append(Result("crash", 0, f"exit status {done.returncode}: {self.reports}"))
        return results


def parse(data: bytes, cases: Sequence[Case]) -> list[Result]:
    results = []
    at = 0
    for case in cases:
        end = data.find(b"\n", at)
        if end < 0:
            break
        words = dict(word.split("=") for word in data[at:end].decode().split()[1:])
        text_end = end + 1 + int(words["text"])
        at = text_end + int(words["outputs"])
        result = Result(
            words["status"],
            int(words["turns"]),
            data[end + 1 : text_end].decode(errors="replace"),
        )
        if result.status == "ok":
            result.outputs = split_outputs(case, data[text_end:at])
        results.append(result)
    return results


def split_outputs(case: Case, data: bytes) -> list[list[Array | None]]:
    outputs = []
    at = 0
    for operation in case.operations:
        dtype = codecs.tensor_dtype(operation.dtype)
        of_ranks: list[Array | None] = []
        for rank in range(case.world):
            if operation.collective == "reduce" and rank != operation.root:
                of_ranks.append(None)
                continue
            count = operation.count * (case.world if operation.collective == "all_gather" else 1)
            of_ranks.append(np.frombuffer(data, dtype, count, at))
            at += count * dtype.itemsize
        outputs.append(of_ranks)
    return outputs


def problems(case: Case, result: Result) -> list[str]:
    """Why the result is not what the oracle says; empty if it is."""
    if result.status != "ok":
        return [f"{result.status}: {result.text}"]
    found = []
    for number, (operation, inputs) in enumerate(zip(case.operations, case.inputs(), strict=True)):
        wanted = expected(case, operation, inputs)
        for rank in range(case.world):
            got, want = result.outputs[number][rank], wanted[rank]
            if got is None or want is None:
                continue
            at = differences(operation, got, want)
            if at.size:
                found.append(
                    f"operation {number} ({operation}), rank {rank}: {at.size} of {got.size} "
                    f"elements differ, the first at {at[0]}: {got[at[0]]!r}, not {want[at[0]]!r}"
                )
    return found


def check(emulation: Emulation, cases: Sequence[Case], deadline_s: float = DEADLINE_S) -> None:
    """Fails unless every case gives the oracle's bits."""
    results = emulation.run(cases, deadline_s)
    for case, result in zip(cases, results, strict=False):
        found = problems(case, result)
        assert not found, f"{case}\n" + "\n".join(found[:5])
    assert len(results) == len(cases)
