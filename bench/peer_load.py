"""What else the machine does while the benchmark against peers measures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["OthersLoad"]

_TICKS = os.sysconf("SC_CLK_TCK")
_IDLE = (3, 4)  # idle and iowait in /proc/stat's first line
_COUNTED = 8  # user, nice, system, idle, iowait, irq, softirq, steal; guests' time is in user


class OthersLoad:
    """The share of the cores that other processes took, from its making to `share`.

    Args:
        pids: The benchmark's own processes, which must live until then; this one is among them.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = [*pids, os.getpid()]
        self._began = time.monotonic(), _busy_s(), self._own_s()

    def share(self) -> float | None:
        """0: nobody but the benchmark; 1: all cores taken by others; None where it is not told."""
        began, busy, own = self._began
        wall_s = time.monotonic() - began
        if not busy or wall_s < 10 / _TICKS:
            return None
        others = (_busy_s() - busy) - (self._own_s() - own)
        return round(max(0.0, others / wall_s / (os.cpu_count() or 1)), 3)

    def _own_s(self) -> float:
        return sum(_process_s(pid) for pid in self._pids)


def _busy_s() -> float:
    """CPU seconds of the machine since it started, all cores; 0 where that is not told."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=1)[1].split()[:_COUNTED]
    except (OSError, IndexError):
        return 0.0
    return sum(int(text) for i, text in enumerate(fields) if i not in _IDLE) / _TICKS


def _process_s(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    fields = text.rpartition(")")[2].split()  # from the state on: utime and stime are 12th, 13th
    return (int(fields[11]) + int(fields[12])) / _TICKS
