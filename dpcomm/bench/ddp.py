"""What communication costs a step of DistributedDataParallel."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Replica", "StepCost", "silent", "step_costs"]


@dataclass(frozen=True)
class Replica:
    """A model under DDP on some backend, and a forward and backward pass through it."""

    model: DistributedDataParallel
    backward: Callable[[], object]


@dataclass
class StepCost:
    """Milliseconds per step; medians over the pairs, then mean (CPU) or maximum (time) of ranks."""

    cpu_ms: float = 0.0  # CPU time of a synchronised pass minus that of the pass under no_sync
    synchronised_ms: float = 0.0  # time of the synchronised pass
    alone_ms: float = 0.0  # time of the pass under no_sync
    synchronised_cpu_ms: float = 0.0
    cpu_error_ms: float = 0.0  # standard error of cpu_ms
    cpu_pairs_ms: list[float] = field(default_factory=list)  # of this rank


def silent(module: torch.nn.Module) -> DistributedDataParallel:
    """`module` under a DDP that communicates nothing: what DDP itself costs a synchronised pass.

    DDP copies gradients into its buckets and back only where it synchronises; the cost of that
    is no backend's.
    """
    with warnings.catch_warnings():  # newer torch has another name for it, older torch only this
        warnings.simplefilter("ignore", FutureWarning)
        model = DistributedDataParallel(module, broadcast_buffers=False)
    model.register_comm_hook(None, noop_hook)
    return model


def step_costs(
    replicas: list[Replica], pairs: int, tick: Callable[[], None] = lambda: None
) -> list[StepCost]:
    """Measures the replicas in turn, `pairs` times a pass with and without synchronisation.

    CPU time is that of all threads of the process, so a backend's own threads and every wait that
    spins count. All backends are measured the same way. Collective; optimizers are not stepped.
    """
    samples: list[list[tuple[float, float, float, float]]] = [[] for _ in replicas]
    for turn in range(pairs):
        for position in range(len(replicas)):
            i = (position + turn) % len(replicas)
            with replicas[i].model.no_sync():
                alone_cpu, alone = _timed(replicas[i])
            cpu, synchronised = _timed(replicas[i])
            samples[i].append((cpu - alone_cpu, synchronised, alone, cpu))
            tick()
    return [_merge(values) for values in samples]


def _timed(replica: Replica) -> tuple[float, float]:
    """CPU milliseconds and milliseconds of a pass."""
    replica.model.zero_grad()
    cpu, start = time.process_time(), time.perf_counter()
    replica.backward()
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - start)


def _merge(samples: list[tuple[float, float, float, float]]) -> StepCost:
    cpu, synchronised, alone, whole = (
        statistics.median(column) for column in zip(*samples, strict=True)
    )
    pairs = [row[0] for row in samples]
    error = _median_error(pairs)
    sums = torch.tensor([cpu, whole, error**2], dtype=torch.float64)
    slowest = torch.tensor([synchronised, alone], dtype=torch.float64)
    dist.all_reduce(sums)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    ranks = dist.get_world_size()
    cpu, whole, _ = (sums / ranks).tolist()
    error = math.sqrt(float(sums[2])) / ranks
    synchronised, alone = slowest.tolist()
    return StepCost(cpu, synchronised, alone, whole, error, pairs)


def _median_error(values: list[float]) -> float:
    """Standard error of the median, from the quartiles; infinite for fewer than 4 values."""
    if len(values) < 4:
        return math.inf
    lower, _, upper = statistics.quantiles(values, n=4)
    return 1.253 * (upper - lower) / 1.349 / math.sqrt(len(values))
