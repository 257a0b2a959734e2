"""Prints a table of messages between two ranks, dpcomm against gloo.

    python bench/messages.py                   the table (Markdown)

- ping: `send` and `recv` there and back, half of it; one message is on its way at a time.
- both ways: `batch_isend_irecv` of a send and a receive on both ranks.

Rounds of the two backends take turns in the same two processes; each figure is the median of the
rounds' means on rank 0.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

import dpcomm
from dpcomm.bench.units import format_size, parse_size

BACKENDS = ("gloo", "dpcomm")


def ping(group: dist.ProcessGroup, out: torch.Tensor, into: torch.Tensor) -> None:
    """A message there and one back."""
    if dist.get_rank() == 0:
        dist.send(out, 1, group=group)
        dist.recv(into, 1, group=group)
    else:
        dist.recv(into, 0, group=group)
        dist.send(out, 0, group=group)


def both_ways(group: dist.ProcessGroup, out: torch.Tensor, into: torch.Tensor) -> None:
    peer = 1 - dist.get_rank()
    operations = [
        dist.P2POp(dist.isend, out, peer, group),
        dist.P2POp(dist.irecv, into, peer, group),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()


CASES: dict[str, tuple[Callable[..., None], int]] = {"ping": (ping, 2), "both ways": (both_ways, 1)}


def mean_us(call: Callable[[], None], times: int, per_call: int) -> float:
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times / per_call * 1e6


def measure(sizes: list[int], rounds: int, loop_ms: float) -> None:
    """What each of the two processes runs; rank 0 prints."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    groups = {backend: dist.new_group(backend=backend) for backend in BACKENDS}
    rank = dist.get_rank()
    lines = [
        "| message | gloo | dpcomm | ratio | dpcomm, GB/s a way |",
        "|---|---:|---:|---:|---:|",
    ]
    for size in sizes:
        out = torch.full((size,), 1 + rank, dtype=torch.uint8)
        into = torch.zeros(size, dtype=torch.uint8)
        for name, (case, per_call) in CASES.items():
            times: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
            count = torch.zeros(1, dtype=torch.int64)
            for turn in range(-1, rounds):  # round -1 warms up, and says how many calls make a loop
                for backend, group in groups.items():
                    into.zero_()
                    dist.barrier()
                    loops = 3 if turn < 0 else int(count)
                    took = mean_us(lambda: case(group, out, into), loops, per_call)  # noqa: B023
                    assert bool((into == 2 - rank).all()), (name, backend, size)
                    if turn >= 0:
                        times[backend].append(took)
                    else:
                        count[0] = max(int(count), 1, int(loop_ms * 1000 / took / per_call))
                if turn < 0:
                    dist.broadcast(count, 0)
            theirs, ours = (statistics.median(times[backend]) for backend in BACKENDS)
            lines.append(
                f"| {name}, {format_size(size)} | {theirs:.4g} µs | {ours:.4g} µs "
                f"| **{theirs / ours:.2f}x** | {size / ours / 1e3:.3g} |"
            )
    if rank == 0:
        print("\n".join(lines), flush=True)
        cores = len(os.sched_getaffinity(0))
        print(f"\nMedian of {rounds} interleaved rounds; {cores} cores, torch {torch.__version__}.")
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="8,4K,64K,1M,64M")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loop-ms", type=float, default=50)
    parser.add_argument("--deadline", type=float, default=300, help="seconds (300)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        sizes = [parse_size(size) for size in arguments.sizes.split(",")]
        measure(sizes, arguments.rounds, arguments.loop_ms)
        return 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:]],
            env={
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + arguments.deadline
    try:
        return max(abs(rank.wait(max(0, deadline - time.monotonic()))) for rank in ranks)
    except subprocess.TimeoutExpired:
        print("the benchmark was late", file=sys.stderr)
        return 2
    finally:
        for each in ranks:
            each.kill()


if __name__ == "__main__":
    assert dpcomm.__version__
    sys.exit(main())
