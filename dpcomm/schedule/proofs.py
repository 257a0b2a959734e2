"""Proofs of plans by symbolic execution (csrc/verify/prove.h: what is shown, and why it holds)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpcomm import _core
from dpcomm.errors import InternalError
from dpcomm.schedule.plans import find

__all__ = ["Operation", "Proof", "mutations", "prove", "prove_operations"]


@dataclass(frozen=True)
class Operation:
    """One operation of a plan that may have several on the same channels."""

    algorithm: str
    collective: str = "all_reduce"
    root: int = 0
    slices: int = 1
    rounds: int = 1
    block_rounds: tuple[int, ...] = ()
    """Rounds of each chunk, where blocks differ in size; what is beyond is left out by all ranks.
    Of an all_to_all chunk s * world + t goes from rank s to rank t."""


@dataclass(frozen=True)
class Proof:
    """What a symbolic execution showed."""

    holds: bool
    error: str
    """One sentence that names rank, lane, step and chunk; empty if the proof holds."""
    steps: int
    messages: int
    """Sent over all ranks."""
    roundings: int
    """The most on the path of any contribution to any output."""
    slots: int
    """Of every channel."""

    def __bool__(self) -> bool:
        return self.holds


def mutations() -> list[str]:
    """The kinds of fault that `prove_operations` can plant."""
    return _core.schedule_mutations()


def prove(
    algorithm: str,
    world: int,
    *,
    slots: int | None = None,
    rounds: int = 1,
    slices: int = 1,
    root: int = 0,
    collective: str = "all_reduce",
    then: Operation | None = None,
) -> Proof:
    """Proves an algorithm, optionally followed by another operation on the same channels.

    Shows that every rank ends with every contribution exactly once and all with the same value,
    that nothing deadlocks with `slots` slots per channel, that no message is left over, that both
    ends of each channel agree on the order of chunks, and that operation in place is safe.

    Args:
        slots: of every channel; by default the fewest that the algorithms ask for.
        then: a second operation, which ranks begin as soon as they have ended the first.

    Raises:
        InternalError: the plan is refuted; the message names rank, lane, step and chunk.
        UsageError: an algorithm does not exist, or a number makes no sense.
    """
    operations = [Operation(algorithm, collective, root, slices, rounds)]
    if then is not None:
        operations.append(then)
    proof = prove_operations(world, operations, slots=slots)
    assert proof is not None
    if not proof.holds:
        raise InternalError(
            f"{collective} {algorithm} with {world} ranks is refuted: {proof.error}"
        )
    return proof


def prove_operations(
    world: int,
    operations: Sequence[Operation],
    *,
    slots: int | None = None,
    keep_as_sent: bool = True,
    check_form: bool = True,
    mutation: str = "",
    seed: int = 0,
) -> Proof | None:
    """Executes operations one after the other symbolically; does not raise where a plan is refuted.

    Args:
        keep_as_sent: False plants the fault that owners keep a result before it is rounded.
        check_form: False accepts primitives that do not exist, so that a fault has to show itself.
        mutation: a fault to plant, one of `mutations()`, at a place drawn by `seed`.

    Returns:
        The proof; None if the plan has no place for the mutation.

    Raises:
        UsageError: an algorithm or mutation does not exist, or a number makes no sense.
    """
    if slots is None:
        slots = max(
            find(op.algorithm, op.collective).min_slots(world, op.slices) for op in operations
        )
    result = _core.schedule_prove(
        world,
        [
            (op.collective, op.algorithm, op.root, op.slices, op.rounds, op.block_rounds)
            for op in operations
        ],
        slots,
        keep_as_sent,
        check_form,
        mutation,
        seed,
    )
    return None if result is None else Proof(*result, slots=slots)
