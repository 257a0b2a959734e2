"""One rank of the doctor's ping: meets the others and times a small all-reduce."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

__all__ = ["ping"]

ROUNDS = 200
ELEMS = 256


def ping(rank: int, world_size: int, init: Any, timeout: float) -> dict[str, float]:
    """Meets, adds, and says how long that took; collective.

    Returns:
        "start_ms" of the communicator, "all_reduce_us" of 1 KiB in the middle of 200 of them.

    Raises:
        DpcommError: What a communicator raises; InternalError for a wrong sum.
    """
    import numpy

    from dpcomm.communicator import Communicator
    from dpcomm.errors import InternalError

    began = time.perf_counter()
    name = "dpcomm.doctor"
    with Communicator(rank, world_size, init, name=name, timeout=timeout) as communicator:
        communicator.barrier()
        start_ms = (time.perf_counter() - began) * 1e3
        times = []
        for _ in range(ROUNDS):
            array = numpy.full(ELEMS, rank + 1, numpy.float32)
            before = time.perf_counter()
            communicator.all_reduce(array)
            times.append((time.perf_counter() - before) * 1e6)
            if not (array == world_size * (world_size + 1) // 2).all():
                raise InternalError(f"a sum over {world_size} ranks is {array[0]}")
        communicator.barrier()
    return {"start_ms": start_ms, "all_reduce_us": sorted(times)[ROUNDS // 2]}


if __name__ == "__main__":
    print(json.dumps(ping(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))))
