"""How the elements of a tensor fall into rounds, chunks and slices (csrc/schedule/collective.h)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dpcomm import _core

__all__ = ["Partition"]


@dataclass(frozen=True)
class Partition:
    """A function of its fields alone, the same one that the executor uses.

    Flat (all_reduce, broadcast, reduce): a round covers the next chunks * slices * slot_elems
    elements of the tensor. Blocked (all_gather, reduce_scatter): a round covers the next
    slices * slot_elems elements of every rank's block, and chunk c is a part of block c.

    Calls raise UsageError where slot_elems is not a positive multiple of the grain, or there are no
    chunks or slices.
    """

    count: int
    """Elements of the tensor (flat) or of each block (blocked)."""
    chunks: int
    slices: int
    """Per chunk."""
    slot_elems: int
    """Elements that fit a slot."""
    grain: int
    """Edges of slices, but for the last, fall on multiples of it."""
    blocked: bool = False

    def rounds(self) -> int:
        """Passes of the schedule; none for an empty tensor."""
        return _core.partition_rounds(self._tuple())

    def slice(self, round: int, chunk: int, slice: int) -> tuple[int, int]:
        """First element, from the start of the tensor or block, and number of elements."""
        return _core.partition_slice(self._tuple(), round, chunk, slice)

    def __iter__(self) -> Iterator[tuple[int, int, int, int, int]]:
        """(round, chunk, slice, first, count) of every slice; on a blocked one of every block."""
        for round_ in range(self.rounds()):
            for chunk in range(self.chunks):
                for slice_ in range(self.slices):
                    yield (round_, chunk, slice_, *self.slice(round_, chunk, slice_))

    def _tuple(self) -> tuple[int, int, int, int, int, bool]:
        return (
            self.count,
            self.chunks,
            self.slices,
            self.slot_elems,
            self.grain,
            self.blocked,
        )
