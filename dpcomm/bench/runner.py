"""The clock: all backends take turns on each size, in rounds, in an order that rotates."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from dpcomm.bench.backends import IN_PLACE, Backend, Operation
from dpcomm.bench.cases import Case, Expected, fill

__all__ = ["Measurement", "Plan", "measure", "pool_buffers"]

POOL_BYTES = 64 * 2**20  # sizes from ROTATE_FROM_BYTES up walk over more memory than this
ROTATE_FROM_BYTES = 64 * 2**10
SMALL_POOL_BYTES = 256 * 2**10  # smaller sizes stay in the second-level cache, as in training
_MAX_SMALL_BUFFERS = 64
Buffers = tuple[torch.Tensor, torch.Tensor]  # (input, output), flat
_MIN_ITERATIONS, _MAX_ITERATIONS = 3, 5000


@dataclass(frozen=True)
class Plan:
    """How often and how long; the same on every rank."""

    iterations: int = 0  # of one timed loop; 0: as many as fit into loop_seconds
    loop_seconds: float = 0.05
    warmup: int = 5
    rounds: int = 5
    checks: int = 1


@dataclass
class Measurement:
    """One backend and placement on one size. Times are of one operation, the slowest rank's."""

    backend: Backend
    placement: str
    iterations: int
    round_us: list[float] = field(default_factory=list)
    cpu_us: float = 0.0  # of one operation on one rank: all threads, mean over ranks
    wrong: int | None = None  # elements, over all ranks and checks

    @property
    def time_us(self) -> float:
        return statistics.median(self.round_us)

    @property
    def min_us(self) -> float:
        return min(self.round_us)


def pool_buffers(size_bytes: int) -> int:
    """How many buffers of a size a loop walks over."""
    if size_bytes >= ROTATE_FROM_BYTES:
        return POOL_BYTES // size_bytes + 1
    return max(1, min(_MAX_SMALL_BUFFERS, SMALL_POOL_BYTES // size_bytes))


class _Pool:
    """Input and output tensors of one placement, each on its own cache lines."""

    def __init__(self, case: Case, placement: str, rank: int, buffers: int) -> None:
        outputs = _rows(case.output_elems, buffers, case.dtype)
        inputs = _rows(case.input_elems, buffers, case.dtype)
        if placement == IN_PLACE:
            mine = slice(rank * case.count, (rank + 1) * case.count)
            if case.gathers:
                inputs = [output[mine] for output in outputs]
            elif case.reduces and case.collective != "all_reduce":
                outputs = [input[mine] for input in inputs]
            else:
                inputs = outputs
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = list(
            zip(inputs, outputs, strict=True)
        )

    def refill(self, period: torch.Tensor) -> None:
        """Writes every output, then every input (which may lie in its output)."""
        for _, output in self.pairs:
            fill(output, period)
        for input, _ in self.pairs:
            fill(input, period)


def _rows(elems: int, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    line = 64 // dtype.itemsize
    stride = math.ceil(elems / line) * line
    flat = torch.empty(rows * stride + line, dtype=dtype)
    first = -(flat.data_ptr() // dtype.itemsize) % line
    return [flat[first + i * stride : first + i * stride + elems] for i in range(rows)]


def _quiet_period(case: Case, rank: int) -> torch.Tensor:
    """Contents of timed buffers. In place the sums grow with each pass: begin far below one."""
    if case.op == "prod":
        return torch.ones_like(case.contribution(rank, 0))
    if not case.dtype.is_floating_point:
        return case.contribution(rank, 0)
    period = case.contribution(rank, 0, lossy=True)
    return period * 2.0 ** (-10 if case.dtype == torch.float16 else -60)


def _most_iterations(case: Case) -> int:
    """So many that sums in place stay finite: infinities are not what training sends."""
    doublings = 20 if case.dtype == torch.float16 else 120
    growth = math.log2(max(2, case.world_size * (2 if case.op == "premul" else 1)))
    passes = max(1, int(doublings / growth))
    return min(_MAX_ITERATIONS, passes * pool_buffers(case.size_bytes))


@dataclass
class _Seat:
    """One backend and placement, ready to take its turn."""

    case: Case
    cell: Measurement
    pool: _Pool
    run: Operation
    loops: list[tuple[float, float]] = field(default_factory=list)

    def loop(self, n: int, period: torch.Tensor) -> tuple[float, float]:
        """Seconds and CPU seconds of n operations on buffers that are filled anew."""
        backend, run = self.cell.backend, self.run
        self.pool.refill(period)
        pairs = _arrays(backend, self.pool.pairs)
        walk = list(itertools.islice(itertools.cycle(pairs), n))
        gc.collect(0)
        gc.disable()
        run(*pairs[-1])  # lines the ranks up
        if self.case.collective == "broadcast":  # its root may be through before others begin
            backend.barrier()
        cpu = time.process_time()
        start = time.perf_counter()
        for input, output in walk:
            run(input, output)
        end = time.perf_counter()
        cpu = time.process_time() - cpu
        gc.enable()
        return end - start, cpu


def _arrays(backend: Backend, pairs: list[Buffers]) -> list[tuple[Any, Any]]:
    """The buffers in the backend's own kind; one object where input and output are one."""
    arrays = []
    for input, output in pairs:
        array = backend.array(output)
        arrays.append((array if input is output else backend.array(input), array))
    return arrays


def _agree(values: list[float], op: dist.ReduceOp.RedOpType) -> list[float]:
    """The maximum or sum over the ranks, through the control group (untimed)."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op)
    return [float(value) for value in tensor]


def measure(
    case: Case,
    backends: list[Backend],
    plan: Plan,
    tick: Callable[[], None] = lambda: None,
) -> list[Measurement]:
    """Measures every backend and placement on one case. Collective.

    Args:
        tick: called after every timed loop, for a progress bar.
    Cost: about rounds * loop_seconds per backend and placement.
    """
    rank = dist.get_rank()
    cells = [Measurement(b, p, plan.iterations) for b in backends for p in b.placements(case)]
    buffers = pool_buffers(case.size_bytes)
    pools = {p: _Pool(case, p, rank, buffers) for p in {cell.placement for cell in cells}}
    seats = [_Seat(case, c, pools[c.placement], c.backend.operation(case)) for c in cells]
    period = _quiet_period(case, rank)
    for seat in seats:
        _warm_up(seat, plan, period)
    for turn in range(plan.rounds):
        for position in range(len(seats)):
            seat = seats[(position + turn) % len(seats)]
            seat.loops.append(seat.loop(seat.cell.iterations, period))
            tick()
    for seat in seats:
        _finish(seat, plan)
    return cells


def _warm_up(seat: _Seat, plan: Plan, period: torch.Tensor) -> None:
    """Runs the operations before the first loop; from their time, chooses the length of loops."""
    if plan.iterations:
        if plan.warmup:
            seat.loop(plan.warmup, period)
        return
    warm = max(plan.warmup, 1)
    seconds = seat.loop(warm, period)[0] / warm
    slowest = max(_agree([seconds], dist.ReduceOp.MAX)[0], 1e-7)
    fit = max(_MIN_ITERATIONS, int(plan.loop_seconds / slowest))
    seat.cell.iterations = min(fit, _most_iterations(seat.case))


def _finish(seat: _Seat, plan: Plan) -> None:
    """Brings the ranks' clocks together and checks the results."""
    cell, world = seat.cell, seat.case.world_size
    slowest = _agree([seconds for seconds, _ in seat.loops], dist.ReduceOp.MAX)
    cell.round_us = [1e6 * seconds / cell.iterations for seconds in slowest]
    cpu = statistics.median(seconds for _, seconds in seat.loops)
    cell.cpu_us = 1e6 * _agree([cpu], dist.ReduceOp.SUM)[0] / cell.iterations / world
    if plan.checks:
        cell.wrong = check(seat.case, cell, seat.run, plan.checks)


def check(case: Case, cell: Measurement, run: Operation, checks: int) -> int:
    """Runs the collective on fresh data and counts wrong elements over all ranks. Collective."""
    rank, wire, wrong = dist.get_rank(), cell.backend.spec.wire, 0
    for seed in range(1, checks + 1):
        input, output = _Pool(case, cell.placement, rank, buffers=1).pairs[0]
        output.view(torch.uint8).fill_(0x7F)  # poison
        lossy = wire != "native" and case.can_be_lossy()
        fill(input, case.contribution(rank, seed, lossy))
        run(*_arrays(cell.backend, [(input, output)])[0])
        wrong += Expected.of(case, rank, seed, wire).count_wrong(output)
    return int(_agree([float(wrong)], dist.ReduceOp.SUM)[0])
