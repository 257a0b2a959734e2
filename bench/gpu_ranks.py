"""One rank of several, each with a device of its own: dpcomm.Communicator, and its speed."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_cases import WIRES, Report, same_bits
from gpu_runtime import DeviceArray, Runtime

import dpcomm
from dpcomm import schedule

SLOWEST_OF_NCCL = 2.0
"""Time of dpcomm, native wire, against NCCL's, from 1 MiB on: more is a bug
(docs/first_run_on_a_gpu.md)."""


class Worker:
    """One rank of several; device = rank."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.runtime = Runtime(self.rank)
        self.communicator = dpcomm.Communicator(wire="int8", wire_links="all")
        self.report = Report()
        self.bits: dict[str, str] = {}
        self.speed: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        if "ranks" in self.arguments.parts:
            self.report.run("ranks", "exact sums", self.exact_sums)
            self.report.run("ranks", "random sums", self.random_sums)
            self.report.run("ranks", "graph", self.graph)
        if "speed" in self.arguments.parts:
            self.report.run("speed", "bandwidth", self.bandwidth)
        if "ranks" in self.arguments.parts:
            self.report.run("ranks", "a rank that does not come", self.absent_rank)
        self.communicator.close()
        return {**self.report.as_dict(), "bits": self.bits, "speed": self.speed}

    def algorithms(self) -> list[str]:
        return ["auto", *(a.name for a in schedule.algorithms("all_reduce"))]

    def exact_sums(self) -> str:
        """Small integers have one sum, whatever the order and the wire."""
        done = 0
        for count in (1, 1000, 70_001) if self.arguments.quick else (1, 1000, 70_001, 3_000_000):
            values = [np.arange(count) % 7 - 3 + rank % 3 for rank in range(self.world)]
            want = np.sum(values, axis=0)
            for name, wire, dtype in itertools.product(
                self.algorithms(), ("native", "fp16", "bf16"), (np.float32, np.float16)
            ):
                array = DeviceArray(self.runtime, values[self.rank].astype(dtype))
                self.communicator.all_reduce(array, algorithm=name, wire=wire)
                self.communicator.synchronize()
                assert same_bits(array.read(), want.astype(dtype)), f"{name} {wire} {count}"
                array.free()
                done += 1
        return f"{done} operations"

    def random_sums(self) -> str:
        """Sums in rank order are NumPy's; all others are alike on all ranks (check_ranks)."""
        random = np.random.default_rng(self.arguments.seed)
        done = 0
        for count in (3001, 300_001) if self.arguments.quick else (3001, 1_000_003):
            values = [random.standard_normal(count).astype(np.float32) for _ in range(self.world)]
            in_rank_order = np.zeros(count, np.float32)
            for each in values:
                in_rank_order = in_rank_order + each
            for name, wire in itertools.product(self.algorithms(), WIRES):
                array = DeviceArray(self.runtime, values[self.rank])
                try:
                    self.communicator.all_reduce(array, algorithm=name, wire=wire)
                except dpcomm.UsageError:  # int8 on a schedule with many roundings
                    array.free()
                    continue
                self.communicator.synchronize()
                got = array.read()
                array.free()
                self.bits[f"{name} {wire} {count}"] = hashlib.sha256(got.tobytes()).hexdigest()
                if wire == "native" and name in ("auto", "two_shot", "one_shot"):
                    assert same_bits(got, in_rank_order), f"{name}: not the sum in rank order"
                allowed = {"native": 1e-5, "fp16": 4e-3, "bf16": 3e-2, "int8": 0.2}[wire]
                error = np.abs(got - in_rank_order).max() / np.abs(in_rank_order).max()
                assert error < allowed, f"{name} {wire}: error {error:.2g}"
                done += 1
        return f"{done} operations"

    def graph(self) -> str:
        stream, count = self.runtime.stream(), 200_000
        array = DeviceArray(self.runtime, np.ones(count, np.float32))
        self.communicator.all_reduce(array, stream=stream)  # staging is made before the capture
        self.communicator.synchronize()
        self.runtime.begin_capture(stream)
        self.communicator.all_reduce(array, stream=stream)
        graph = self.runtime.end_capture(stream)
        for replay in range(1, 4):
            array.write(np.full(count, replay, np.float32))
            self.runtime.launch_graph(graph, stream)
            self.runtime.synchronize(stream)
            assert (array.read() == replay * self.world).all(), f"replay {replay}"
        return "replayed 3 times"

    def absent_rank(self) -> str:
        """The last check: the communicator is of no use afterwards."""
        array = DeviceArray(self.runtime, np.ones(1000, np.float32))
        if self.rank == self.world - 1:
            time.sleep(4)
            return "(is the one)"
        start = time.monotonic()
        text = ""
        try:
            self.communicator.all_reduce(array, timeout=2.0)
            self.communicator.synchronize()
        except (dpcomm.TimeoutError, dpcomm.PeerError) as error:
            text = str(error)
        seconds = time.monotonic() - start
        assert text, "the operation came to an end without the rank"
        assert f"rank {self.world - 1}" in text, text
        assert seconds < 10, f"{seconds:.1f} s"
        return f"after {seconds:.1f} s: {text}"

    # --- speed ---
    def bandwidth(self) -> str:
        nccl = nccl_all_reduce(self.rank)
        worst = 0.0
        sizes = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 28)
        for size in sizes[:3] if self.arguments.quick else sizes:
            ways: dict[str, Callable[[DeviceArray, int], Any]] = {
                "dpcomm": lambda a, s: self.communicator.all_reduce(a, wire="native", stream=s),
                "dpcomm fp16": lambda a, s: self.communicator.all_reduce(a, wire="fp16", stream=s),
            }
            if nccl is not None:
                ways["nccl"] = nccl
            times = self.times(ways, size)
            for name, microseconds in times.items():
                busbw = 2 * (self.world - 1) / self.world * size / microseconds / 1e3
                row = {"size_bytes": size, "way": name, "time_us": microseconds, "busbw_gbs": busbw}
                self.speed.append(row)
                if self.rank == 0:
                    text = f"{size:>10} B {name:12} {microseconds:10.1f} us {busbw:8.2f} GB/s"
                    print(f"       {text}", file=sys.stderr)
            if "nccl" in times and size >= 1 << 20:
                worst = max(worst, times["dpcomm"] / times["nccl"])
        assert worst <= SLOWEST_OF_NCCL, f"{worst:.2f} times the time of NCCL"
        return f"at most {worst:.2f} times the time of NCCL" if nccl else "no NCCL to compare with"

    def times(
        self, ways: dict[str, Callable[[DeviceArray, int], Any]], size: int
    ) -> dict[str, float]:
        """Medians in microseconds, the ways taking turns."""
        array = DeviceArray(self.runtime, np.zeros(size // 4, np.float32))
        stream, start, end = self.runtime.stream(), self.runtime.event(), self.runtime.event()
        rounds: dict[str, list[float]] = {name: [] for name in ways}
        repeats = 20 if size <= 1 << 20 else 5
        for round_ in range(9):
            for name, way in ways.items():
                self.communicator.barrier()
                self.runtime.record(start, stream)
                for _ in range(repeats):
                    way(array, stream)
                self.runtime.record(end, stream)
                self.runtime.synchronize(stream)
                if round_ > 0:
                    rounds[name].append(self.runtime.microseconds(start, end) / repeats)
        array.free()
        return {name: float(np.median(values)) for name, values in rounds.items()}


def nccl_all_reduce(rank: int) -> Callable[[DeviceArray, int], Any] | None:
    """all_reduce by torch's NCCL backend on a DeviceArray; None where torch has none."""
    try:
        import torch
        import torch.distributed as dist
    except ImportError:
        return None
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    torch.cuda.set_device(rank)
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    dist.init_process_group("nccl")

    def run(array: DeviceArray, stream: int) -> Any:
        tensor = torch.as_tensor(array, device=f"cuda:{rank}")
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
            dist.all_reduce(tensor)

    return run
