"""Algorithms and their plans, step by step."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from dpcomm import _core
from dpcomm.errors import UsageError

__all__ = ["COLLECTIVES", "Algorithm", "PlanStep", "Primitive", "algorithms", "find", "plan"]

COLLECTIVES: Final = (
    *("all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter"),
    *("gather", "scatter", "all_to_all"),
)


class Primitive(enum.IntFlag):
    """What a step does with its slice (csrc/schedule/step.h)."""

    RECV = 1
    REDUCE = 2
    COPY = 4
    SEND = 8

    def __str__(self) -> str:
        return "|".join(flag.name or "?" for flag in Primitive if flag in self)


@dataclass(frozen=True)
class Algorithm:
    """A named schedule for one collective."""

    collective: str
    name: str
    lanes: int
    """Streams of steps of one rank, each in order."""
    first_lane: int
    """Of the channels that it uses."""
    channel_lanes: int
    on_devices: bool
    """The kernels run it, too; else it is for the CPU only (schedule/host_algorithms.def)."""

    def chunks(self, world: int) -> int:
        """Chunks in a round."""
        return _core.schedule_limits(self.collective, self.name, world, 1)[0]

    def min_slots(self, world: int, slices: int = 1) -> int:
        """The fewest slots of a channel with which it does not deadlock."""
        return _core.schedule_limits(self.collective, self.name, world, slices)[1]

    def roundings(self, world: int) -> int:
        """How often a lossy wire rounds a value on its longest path."""
        return _core.schedule_limits(self.collective, self.name, world, 1)[2]


@dataclass(frozen=True)
class PlanStep:
    """One step of one lane of one rank."""

    rank: int
    lane: int
    round: int
    chunk: int
    slice: int
    primitive: Primitive
    recv_lane: int
    recv_peers: tuple[int, ...]
    send_lane: int
    send_peers: tuple[int, ...]
    own_as_sent: bool
    """The own contribution counts as it went on the wire (law 2)."""

    def __str__(self) -> str:
        text = f"rank {self.rank} lane {self.lane}: {self.primitive} c{self.chunk}.{self.slice}"
        if self.recv_peers:
            text += f" from {', '.join(map(str, self.recv_peers))}"
        if self.send_peers:
            text += f" to {', '.join(map(str, self.send_peers))}"
        return text


def algorithms(collective: str | None = None) -> list[Algorithm]:
    """All algorithms, or those of one collective, in the order of schedule/algorithms.def.

    Those of schedule/host_algorithms.def come after them.

    Raises:
        UsageError: `collective` is not one of COLLECTIVES.
    """
    if collective is not None and collective not in COLLECTIVES:
        raise UsageError(f"unknown collective {collective}; known are {', '.join(COLLECTIVES)}")
    known = [Algorithm(*info) for info in _core.schedule_algorithms()]
    return [a for a in known if collective in (None, a.collective)]


def find(algorithm: str, collective: str = "all_reduce") -> Algorithm:
    """The algorithm of that name.

    Raises:
        UsageError: there is none; the message lists those that exist.
    """
    known = algorithms(collective)
    for candidate in known:
        if candidate.name == algorithm:
            return candidate
    names = ", ".join(a.name for a in known)
    raise UsageError(f"unknown algorithm {algorithm} for {collective}; known are {names}")


def plan(
    algorithm: str,
    world: int,
    *,
    collective: str = "all_reduce",
    root: int = 0,
    slices: int = 1,
    rounds: int = 1,
) -> list[PlanStep]:
    """All steps of all ranks, by rank, then lane, then in the order in which the lane runs them.

    Args:
        algorithm: a name from `algorithms(collective)`.
        world: number of ranks.
        root: of broadcast, reduce, gather and scatter.
        slices: slices per chunk.
        rounds: how often the schedule is passed.

    Raises:
        UsageError: the algorithm does not exist, or a number makes no sense.
    """
    find(algorithm, collective)
    steps = _core.schedule_plan(world, (collective, algorithm, root, slices, rounds, ()))
    return [PlanStep(*s[:5], Primitive(s[5]), *s[6:]) for s in steps]
