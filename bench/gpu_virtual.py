"""Ranks in one process on one device: every kernel against the oracle, graphs, abort, speed."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence

import numpy as np
from gpu_cases import Array, Operation, Report, expected, operations, random_input, same_bits
from gpu_runtime import Runtime

import dpcomm
from dpcomm import cuda
from dpcomm.oracle import wire as codecs
from dpcomm.oracle.execute import Geometry

SLOWEST_COPY = 8.0
"""Time of two virtual ranks' all_reduce against that of copying their tensors once: more is a bug
(docs/first_run_on_a_gpu.md)."""


class VirtualRanks:
    """A group on device 0 and buffers for it."""

    def __init__(self, world: int, runtime: Runtime, room_bytes: int = 8 << 20) -> None:
        self.world, self.runtime, self.stream = world, runtime, runtime.stream()
        self.group = cuda.VirtualGroup(world)
        self.inputs = [runtime.allocate(room_bytes * world) for _ in range(world)]
        self.outputs = [runtime.allocate(room_bytes * world) for _ in range(world)]

    def close(self) -> None:
        for address in (*self.inputs, *self.outputs):
            self.runtime.free(address)

    def ctas(self, operation: Operation) -> int:
        itemsize = codecs.tensor_dtype(operation.dtype).itemsize
        return self.group.ctas_of(operation.count * itemsize)

    def geometry(self) -> Geometry:
        return Geometry(self.group.geometry.slots, self.group.geometry.slot_bytes)

    def launch(self, operation: Operation) -> None:
        offset = operation.offset * codecs.tensor_dtype(operation.dtype).itemsize
        self.group.launch(
            operation.collective,
            [address + offset for address in self.inputs],
            [address + offset for address in self.outputs],
            operation.count,
            algorithm=operation.algorithm,
            dtype=operation.dtype,
            op=operation.op,
            wire=operation.wire,
            factor=0.375,
            stream=self.stream,
        )

    def give(self, operation: Operation, inputs: Sequence[Array], count: int) -> None:
        """Writes inputs, and 0xAA over the outputs."""
        offset = operation.offset * inputs[0].itemsize
        poison = np.full(count * inputs[0].itemsize, 0xAA, np.uint8)
        for rank, values in enumerate(inputs):
            self.runtime.write(self.inputs[rank] + offset, values)
            self.runtime.write(self.outputs[rank] + offset, poison)

    def outputs_of(self, operation: Operation, want: Sequence[Array | None]) -> list[Array | None]:
        offset = operation.offset * codecs.tensor_dtype(operation.dtype).itemsize
        return [
            None if w is None else self.runtime.read(self.outputs[r] + offset, w.size, w.dtype)
            for r, w in enumerate(want)
        ]

    def check(self, operation: Operation, random: np.random.Generator) -> bool:
        """False where the operation makes no sense (a wire that this dtype has not)."""
        inputs = [random_input(operation, self.world, random) for _ in range(self.world)]
        try:
            want = expected(operation, inputs, self.geometry(), self.ctas(operation))
        except dpcomm.UsageError:
            return False
        size = max(w.size for w in want if w is not None)
        self.give(operation, inputs, size)
        self.launch(operation)
        self.runtime.synchronize(self.stream)
        for rank, (got, one) in enumerate(zip(self.outputs_of(operation, want), want, strict=True)):
            if got is None or one is None:
                continue
            if not same_bits(got, one):
                byte = int(np.flatnonzero(got.view(np.uint8) != one.view(np.uint8))[0])
                text = f"rank {rank} of {self.world} differs at element {byte // one.itemsize}"
                raise AssertionError(f"{operation}: {text}")
        return True


def check_virtual(report: Report, runtime: Runtime, arguments: argparse.Namespace) -> None:
    for world in arguments.worlds:

        def kernels(world: int = world) -> str:
            ranks = VirtualRanks(world, runtime)
            random = np.random.default_rng(arguments.seed)
            done = sum(ranks.check(o, random) for o in operations(arguments.quick))
            ranks.close()
            return f"{done} operations, bits of the oracle; staging {ranks.group.staging_bytes} B"

        report.run("virtual", f"kernels, {world} ranks", kernels)
    report.run("virtual", "graph", lambda: check_graph(runtime, arguments))
    report.run("virtual", "abort", lambda: check_abort(runtime))


def check_graph(runtime: Runtime, arguments: argparse.Namespace) -> str:
    """Operations of all kinds captured once, replayed with other inputs each time."""
    ranks = VirtualRanks(2, runtime)
    chain = [Operation("all_reduce", name, wire=wire, count=count)
             for name, wire, count in (("ring", "fp16", 30_000), ("one_shot", "native", 2000),
                                       ("two_shot", "native", 30_000))]  # fmt: skip
    random = np.random.default_rng(arguments.seed)
    for operation in chain:
        ranks.check(operation, random)  # counts do not start from zero
    runtime.begin_capture(ranks.stream)
    for operation in chain:
        ranks.launch(operation)
    graph = runtime.end_capture(ranks.stream)
    replays = 3
    for _ in range(replays):
        inputs = [random_input(chain[0], 2, random) for _ in range(2)]
        want = expected(chain[-1], inputs, ranks.geometry(), ranks.ctas(chain[-1]))
        ranks.give(chain[0], inputs, inputs[0].size)
        runtime.launch_graph(graph, ranks.stream)
        runtime.synchronize(ranks.stream)
        got = ranks.outputs_of(chain[-1], want)
        assert all(same_bits(g, w) for g, w in zip(got, want, strict=True))  # type: ignore[arg-type]
    ranks.check(chain[0], random)  # and operations outside the graph go on
    ranks.close()
    return f"{len(chain)} operations, replayed {replays} times"


def check_abort(runtime: Runtime) -> str:
    """After an abort nothing runs, and nothing waits."""
    ranks = VirtualRanks(2, runtime)
    operation = Operation("all_reduce", "ring", count=30_000)
    inputs = [np.ones(operation.count, np.float32)] * 2
    ranks.give(operation, inputs, operation.count)
    ranks.group.abort()
    start = time.monotonic()
    ranks.launch(operation)
    runtime.synchronize(ranks.stream)
    seconds = time.monotonic() - start
    left = runtime.read(ranks.outputs[0], operation.count, np.float32)
    assert (left.view(np.uint8) == 0xAA).all(), "an operation ran after the abort"
    assert ranks.group.waits() == [], ranks.group.waits()
    ranks.close()
    return f"an operation after it left in {seconds:.3f} s"


def virtual_speed(report: Report, runtime: Runtime) -> None:
    """One device: what the kernels make of its memory, against a copy."""

    def measure() -> str:
        ranks = VirtualRanks(2, runtime, room_bytes=64 << 20)
        start, end = runtime.event(), runtime.event()
        size, rows, worst = 64 << 20, [], 0.0
        for name, wire in itertools.product(("ring", "two_shot"), ("native", "fp16")):
            operation = Operation("all_reduce", name, wire=wire, count=size // 4)
            ratios, times = [], []
            for _ in range(9):
                runtime.record(start, ranks.stream)
                ranks.launch(operation)
                runtime.record(end, ranks.stream)
                runtime.synchronize(ranks.stream)
                time_us = runtime.microseconds(start, end)
                runtime.record(start, ranks.stream)
                for rank in range(2):
                    runtime.copy(ranks.outputs[rank], ranks.inputs[rank], size, ranks.stream)
                runtime.record(end, ranks.stream)
                runtime.synchronize(ranks.stream)
                times.append(time_us)
                ratios.append(time_us / runtime.microseconds(start, end))
            worst = max(worst, float(np.median(ratios)))
            row = {"way": f"{name} {wire}", "size_bytes": size}
            row |= {"time_us": float(np.median(times)), "of_copy": float(np.median(ratios))}
            rows.append(row)
        ranks.close()
        report.figures["virtual_speed"] = rows
        text = ", ".join(f"{row['way']} {row['of_copy']:.2f}x" for row in rows)
        assert worst <= SLOWEST_COPY, text
        return f"time of a copy of both tensors: {text}"

    report.run("speed", "two virtual ranks, 64 MiB", measure)
