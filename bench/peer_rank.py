"""One rank of one peer in the benchmark against peers. Started by bench/peers.py, never by hand.

It joins its group, says so over a socket, and does what it is told, one JSON line for each order:

    check  one all-reduce of small integers into poisoned memory; how many elements are wrong
    time   a loop of calls; when it began and ended (monotonic clock, the same for all processes)
    quit   leave

Between orders it is blocked in a read (and stopped by the driver, with all its threads).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from peer_calls import CALLS, Calls, Place

__all__ = ["Buffers", "main"]

ROTATED_BYTES = 64 * 2**20  # more than this lies between two uses of a buffer, from ROTATED_FROM up
ROTATED_FROM = 64 * 2**10
SMALL_BYTES, SMALL_COUNT = 256 * 2**10, 64  # below: up to so many buffers, up to so many bytes
PERIOD = 65537  # of the contents: a prime, so that a part in the wrong place shows
FIRST = 2.0**-120  # contents of timed buffers; each call multiplies them by the number of ranks
DOUBLINGS = 240  # that FIRST can take


def buffer_count(size_bytes: int) -> int:
    """How many buffers a loop of calls walks over."""
    if size_bytes >= ROTATED_FROM:
        return ROTATED_BYTES // size_bytes + 1
    return max(1, min(SMALL_COUNT, SMALL_BYTES // stride(size_bytes)))


def stride(size_bytes: int) -> int:
    """Distance of two buffers: whole cache lines."""
    return -(-size_bytes // 64) * 64


class Buffers:
    """The buffers of one size, what they must contain, and which one is next.

    All lie in one allocation, which the next size uses again: none profits from fresh memory.
    """

    def __init__(self, calls: Calls, size: int) -> None:
        self._calls, self._size = calls, size
        self._memory = np.empty(0, np.float32)
        self._size_bytes = 0
        self._growth = max(1.0, float(np.log2(size))) if calls.sums else 0.0

    def reserve(self, largest_bytes: int) -> None:
        """Allocates and touches what sizes up to `largest_bytes` take; the last 64 B are spare."""
        rotated = ROTATED_BYTES if largest_bytes >= ROTATED_FROM else SMALL_BYTES
        self._memory = self._calls.allocate(rotated + stride(largest_bytes) + 64)
        self._memory.fill(0)
        self.spare = self._calls.prepare([self._calls.bind(self._memory[-16:-14])])

    def choose(self, size_bytes: int) -> None:
        """Goes over to this size."""
        if size_bytes == self._size_bytes:
            return
        self._size_bytes = size_bytes
        step = stride(size_bytes) // 4
        self._views = [
            self._memory[i * step : i * step + size_bytes // 4]
            for i in range(buffer_count(size_bytes))
        ]
        self._arguments = [self._calls.bind(view) for view in self._views]
        self._next = 0
        self.fill()

    def fill(self) -> None:
        for view in self._views:
            view.fill(FIRST)
        self._sums = [0] * len(self._views)

    def limit(self) -> int:
        """The most calls of one loop, warm-up included, that keep repeated sums finite."""
        return int(DOUBLINGS / self._growth - 2) * len(self._views) if self._growth else 2**31

    def make_room(self, calls: int) -> None:
        """Fills the buffers anew if so many calls could take a sum out of range."""
        rounds = -(-calls // len(self._views)) + 1
        if (max(self._sums) + rounds) * self._growth > DOUBLINGS:
            self.fill()

    def take(self, calls: int) -> Any:
        """What `Calls.loop` takes for the next `calls` buffers in turn."""
        count = len(self._views)
        order = [(self._next + i) % count for i in range(calls)]
        self._next = (self._next + calls) % count
        whole, rest = divmod(calls, count)
        self._sums = [n + whole for n in self._sums]
        for i in order[:rest]:
            self._sums[i] += 1
        return self._calls.prepare([self._arguments[i] for i in order])

    def wrong_after_loops(self) -> int:
        """Buffers whose first, middle or last element is not what all those sums make of FIRST."""
        if not self._calls.sums or self._size & (self._size - 1):
            return 0  # only powers of two stay exact
        wrong = 0
        for view, sums in zip(self._views, self._sums, strict=True):
            expected = np.float32(FIRST * float(self._size) ** sums)
            wrong += any(view[i] != expected for i in (0, view.size // 2, view.size - 1))
        return wrong

    def wrong_in_check(self, rank: int, seed: int) -> int:
        """Elements of a buffer that an all-reduce of small integers gets wrong; then fills all."""
        self._next = (self._next + 1) % len(self._views)
        view = self._views[self._next]
        base = np.arange(PERIOD, dtype=np.int64)
        parts = [((base * (7 + 2 * r) + seed + r) % 31 - 15) for r in range(self._size)]
        repeat = -(-view.size // PERIOD)
        view[:] = np.tile(parts[rank].astype(np.float32), repeat)[: view.size]
        self._calls.loop(self._calls.prepare([self._arguments[self._next]]))
        expected = np.tile(sum(parts).astype(np.float32), repeat)[: view.size]
        wrong = int(np.count_nonzero(view != expected)) if self._calls.sums else 0
        self.fill()
        return wrong


class Rank:
    """Does what the driver's orders say."""

    def __init__(self, calls: Calls, place: Place) -> None:
        self._calls, self._place = calls, place
        self._buffers = Buffers(calls, place.size)

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["do"] == "reserve":
            self._buffers.reserve(order["bytes"])
            return {}
        self._buffers.choose(order["bytes"])
        if order["do"] == "check":
            wrong = self._buffers.wrong_in_check(self._place.rank, order["seed"])
            return {"wrong": wrong, "limit": self._buffers.limit()}
        return self._time(order["calls"], order["warmup"])

    def _time(self, calls: int, warmup: int) -> dict[str, Any]:
        loop = self._calls.loop
        self._buffers.make_room(warmup + calls)
        both = self._buffers.take(warmup), self._buffers.take(calls)
        loop(both[0])
        loop(self._buffers.spare)  # lines the ranks up
        cpu = time.process_time()
        began = time.perf_counter()
        loop(both[1])
        ended = time.perf_counter()
        cpu = time.process_time() - cpu
        wrong = self._buffers.wrong_after_loops()
        return {"began": began, "ended": ended, "cpu": cpu, "wrong": wrong}


def main(kinds: dict[str, type[Calls]] = CALLS) -> None:
    """The rank's life. `kinds` maps names to calls (tests bring faulty ones)."""
    ctypes.CDLL(None).prctl(
        1, signal.SIGKILL, 0, 0, 0
    )  # PR_SET_PDEATHSIG: no rank outlives its launcher
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends its ranks itself
    environment = os.environ
    if "PEERS_CORE" in environment:
        os.sched_setaffinity(0, {int(environment["PEERS_CORE"])})
    link = socket.socket(socket.AF_UNIX)
    link.connect("\0" + environment["PEERS_SOCKET"])

    def answer(values: dict[str, Any]) -> None:
        link.sendall(json.dumps(values).encode() + b"\n")

    try:
        place = Place(
            int(environment.get("PEERS_RANK", "-1")),
            int(environment["PEERS_SIZE"]),
            Path(environment["PEERS_FOLDER"]),
            Path(environment["PEERS_ENVIRONMENT"]),
        )
        calls = kinds[environment["PEERS_CALLS"]]()
        calls.start(place)
        if place.size != int(environment["PEERS_SIZE"]):
            raise RuntimeError(f"a group of {place.size}, not of {environment['PEERS_SIZE']}")
        rank = Rank(calls, place)
        answer({"rank": place.rank, "pid": os.getpid(), "version": calls.version})
        for line in link.makefile("rb"):
            order = json.loads(line)
            if order["do"] == "quit":
                calls.finish()
                answer({})
                os._exit(0)
            answer(rank.obey(order))
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(OSError):
            answer({"error": f"{type(error).__name__}: {error}"})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # the driver is gone, or will end this group


if __name__ == "__main__":
    main()
