"""Prints where the nanoseconds of a small synchronous call go, on one rank and on two.

    python bench/micro/call_cost.py                 both tables (Markdown)
    python bench/micro/call_cost.py --core          the Communicator's alone, without torch
    python bench/micro/call_cost.py --cores 0,1     a core for each rank

On one rank there is nothing to exchange, so what a call costs there is what it costs around the
exchange. Rows of a table take turns in the same process; figures are medians of the rounds' means.

- loop: an empty function of Python, called: subtracted from all other rows.
- barrier: call and run() (place in the order, flight recorder, counts), no array.
- all_reduce: the same with an array of 8 bytes; the difference is what seeing the array costs.
- in full: the same call with an argument that the short way does not take, so that all of it goes
  through Python and pybind11.
- no-op: `dist.all_reduce` over a backend that does nothing, compiled by torch's own extension
  loader when this is asked for first; what c10d itself costs.
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
from pathlib import Path
from typing import Any

import numpy as np

import dpcomm

LOOPS = 2000
Rows = dict[str, Callable[[], Any]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def core_rows(communicator: dpcomm.Communicator) -> Rows:
    array = np.zeros(2, np.float32)
    return {
        "Communicator: barrier": communicator.barrier,
        "Communicator: all_reduce, NumPy": lambda: communicator.all_reduce(array),
        "Communicator: all_reduce, NumPy, in full": lambda: communicator.all_reduce(
            array, factor=1.0
        ),
    }


def torch_rows(communicator: dpcomm.Communicator, rank: int, world: int, port: int) -> Rows:
    import torch
    import torch.distributed as dist
    from torch.utils.cpp_extension import load

    from dpcomm import backend

    noop = load("dpcomm_noop_backend", [str(Path(__file__).with_name("noop_backend.cc"))])

    def make(options: Any, _: Any) -> Any:
        return noop.create(options.group_rank, options.group_size)

    dist.Backend.register_backend("noop", make, extended_api=True, devices=["cpu"])
    backend.register()  # as importing torch before dpcomm does
    dist.init_process_group(
        "dpcomm", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    group = dist.new_group(backend="noop")
    tensor = torch.zeros(2)
    return {
        "Communicator: all_reduce, torch": lambda: communicator.all_reduce(tensor),
        "torch: all_reduce, no-op": lambda: dist.all_reduce(tensor, group=group),
        "torch: all_reduce, dpcomm": lambda: dist.all_reduce(tensor),
    }


def mean_ns(call: Callable[[], Any]) -> float:
    for _ in range(LOOPS // 20):
        call()
    begin = time.perf_counter_ns()
    for _ in range(LOOPS):
        call()
    return (time.perf_counter_ns() - begin) / LOOPS


def measure(rows: Rows, rounds: int, meet: Callable[[], Any]) -> dict[str, float]:
    """Nanoseconds of each row beyond an empty call: the medians of interleaved rounds."""
    seen: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, call in rows.items():
            meet()
            seen[name].append(mean_ns(call))
    medians = {name: statistics.median(each) for name, each in seen.items()}
    loop = medians.pop("loop")
    return {"loop": loop, **{name: each - loop for name, each in medians.items()}}


def run_rank(options: argparse.Namespace) -> None:
    rank, world = options.rank, options.world
    if options.cores:
        os.sched_setaffinity(0, [options.cores[rank % len(options.cores)]])
    init = None if world == 1 else f"tcp://127.0.0.1:{options.ports[0]}"
    with dpcomm.Communicator(rank, world, init, name="call_cost") as communicator:
        rows: Rows = {"loop": lambda: None, **core_rows(communicator)}
        if not options.core:
            rows.update(torch_rows(communicator, rank, world, options.ports[1]))
        medians = measure(rows, options.rounds, communicator.barrier)
        communicator.barrier()
        if rank == 0:
            show(medians, world)


def show(medians: dict[str, float], world: int) -> None:
    noop = medians.get("torch: all_reduce, no-op")
    barrier = medians["Communicator: barrier"]
    print(f"\n{world} rank{'s' if world > 1 else ''}\n")
    print("| call | ns | beyond no-op | ratio |")
    print("|---|---:|---:|---:|")
    for name, each in medians.items():
        of_torch = name.startswith("torch") and noop is not None
        beyond = f"{each - noop:.0f}" if of_torch and noop is not None else ""
        base = noop if of_torch and noop is not None else barrier
        ratio = "" if name == "loop" else f"{each / base:.2f}"
        print(f"| {name} | {each:.0f} | {beyond} | {ratio} |")
    sys.stdout.flush()


def run_world(world: int, options: argparse.Namespace) -> None:
    own = ["--world", str(world), "--ports", f"{free_port()},{free_port()}"]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], *own, "--rank", str(rank)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world)
    ]
    try:
        for each in ranks:
            if each.wait(options.timeout) != 0:
                raise SystemExit(f"a rank ended with {each.returncode}")
    finally:
        for each in ranks:
            each.kill()
            each.wait()


def numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--core", action="store_true", help="without torch")
    parser.add_argument("--cores", type=numbers, default=[], help="a core for each rank")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for each table")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=numbers, default=[0, 0], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options)
        return
    for world in (1, 2):
        run_world(world, options)


if __name__ == "__main__":
    main()
