"""dpcomm without torch, on GPUs: a process for each GPU fits a line to points of its own.

    pip install .[cupy]
    python examples/communicator_cupy.py

What examples/communicator_numpy.py does on CPUs. The arrays are CuPy's, and the collectives go to
CuPy's current stream between its kernels: the host waits for nothing until it reads a result.
Without a GPU, or without CuPy, it says so and ends.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile

import dpcomm

STEPS = 200


def devices() -> tuple[int, str]:
    """The number of GPUs, and why there is none."""
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount(), "no GPU"
    except ImportError:
        return 0, "CuPy is not installed (pip install .[cupy])"
    except Exception as error:  # of the CUDA runtime, where there is no driver
        return 0, str(error)


def fit(rank: int, world_size: int, folder: str, results: multiprocessing.Queue) -> None:
    """Gradient descent on this rank's points, with gradients averaged over the ranks."""
    import cupy

    with (
        cupy.cuda.Device(rank),
        cupy.cuda.Stream(non_blocking=True),
        dpcomm.Communicator(rank, world_size, init=f"file://{folder}") as comm,
    ):
        random = cupy.random.default_rng(rank)
        x = random.uniform(-1, 1, 500).astype(cupy.float32)
        y = 3 * x - 2 + 0.1 * random.standard_normal(500, dtype=cupy.float32)

        line = random.standard_normal(2, dtype=cupy.float32)  # slope and intercept
        comm.broadcast(line, root=0)  # everybody begins with rank 0's
        for _ in range(STEPS):
            error = line[0] * x + line[1] - y
            gradient = cupy.stack([(error * x).mean(), error.mean()])
            comm.all_reduce(gradient, op="avg")
            line -= 0.5 * gradient

        lines = comm.all_gather(line)  # CuPy's as well: (world_size, 2)
        comm.synchronize()  # raises what went wrong on the device
        results.put((rank, lines.get()))


def main() -> int:
    world_size, why = devices()
    if world_size == 0:
        print(f"nothing to show: {why}")
        return 0
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=fit, args=(rank, world_size, folder, results))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=120)
        failed = [rank for rank, process in enumerate(processes) if process.exitcode != 0]
        if failed:
            for process in processes:
                process.kill()
            print(f"rank {failed[0]} failed", file=sys.stderr)
            return 1
    for _ in range(world_size):
        rank, lines = results.get(timeout=10)
        same = bool((lines == lines[0]).all())
        slope, intercept = lines[rank]
        print(f"rank {rank}: y = {slope:.4f} x {intercept:+.4f}, same on all ranks: {same}")
        if not same:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
