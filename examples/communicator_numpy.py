"""dpcomm without torch: two processes fit a line to points that neither of them has all of.

    python examples/communicator_numpy.py

Each process draws its own points of y = 3x - 2 with noise. `dpcomm.Communicator` sums what they
know; both end with the same coefficients, to the last bit. The processes meet through a folder;
`init="tcp://<host>:<port>"` does the same between hosts.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile

import numpy as np

import dpcomm

WORLD_SIZE = 2
STEPS = 200


def fit(rank: int, folder: str, results: multiprocessing.Queue) -> None:
    """Gradient descent on this rank's points, with gradients averaged over the ranks."""
    with dpcomm.Communicator(rank, WORLD_SIZE, init=f"file://{folder}") as comm:
        random = np.random.default_rng(rank)
        x = random.uniform(-1, 1, 500).astype(np.float32)
        y = 3 * x - 2 + random.normal(0, 0.1, 500).astype(np.float32)

        line = random.normal(size=2).astype(np.float32)  # slope and intercept
        comm.broadcast(line, root=0)  # everybody begins with rank 0's
        for _ in range(STEPS):
            error = line[0] * x + line[1] - y
            gradient = np.array([(error * x).mean(), error.mean()], dtype=np.float32)
            comm.all_reduce(gradient, op="avg")
            line -= 0.5 * gradient

        lines = comm.all_gather(line)  # (WORLD_SIZE, 2)
        worst = comm.all_reduce(np.abs(error).max(keepdims=True), op="max")
        results.put((rank, lines, float(worst[0])))


def main() -> int:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=fit, args=(rank, folder, results)) for rank in range(WORLD_SIZE)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=60)
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        if failed:
            for process in processes:
                process.kill()
            print(f"rank {failed[0]} failed", file=sys.stderr)
            return 1
    for _ in range(WORLD_SIZE):
        rank, lines, worst = results.get(timeout=10)
        same = bool((lines == lines[0]).all())
        slope, intercept = lines[rank]
        print(f"rank {rank}: y = {slope:.4f} x {intercept:+.4f}, same on all ranks: {same}")
        print(f"        largest error of any rank's points: {worst:.3f}")
        if not same:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
