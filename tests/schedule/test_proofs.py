"""Every schedule, proved by symbolic execution at the numbers of ranks and slots that are used."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from dpcomm import schedule
from dpcomm.errors import InternalError, UsageError
from dpcomm.schedule import Algorithm, Operation, Proof

ALGORITHMS = schedule.algorithms()
IDS = [f"{a.collective}-{a.name}" for a in ALGORITHMS]
each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)

#: Collectives that move or add blocks; chunks of the last one are pairs of ranks.
BLOCKED = ("all_gather", "reduce_scatter", "gather", "scatter", "all_to_all")
WORLDS = range(2, 66)
LARGE_WORLDS = (128, 256, 1024)


def slot_counts(algorithm: Algorithm, world: int, slices: int) -> list[int]:
    least = algorithm.min_slots(world, slices)
    return sorted({least, least + 1, max(least, 4), max(least, 8)})


def operation(algorithm: Algorithm, world: int, slices: int = 1, rounds: int = 1) -> Operation:
    """With a root that is neither the first rank nor a power of two, where there is such a one."""
    return Operation(algorithm.name, algorithm.collective, world * 2 // 3, slices, rounds)


def proof(world: int, *operations: Operation, slots: int) -> Proof:
    found = schedule.prove_operations(world, operations, slots=slots)
    assert found is not None
    assert found.holds, f"{operations} with {world} ranks, {slots} slots: {found.error}"
    return found


@each_algorithm
@pytest.mark.timeout(120)
def test_holds_alone_for_every_world_slot_count_and_round(algorithm: Algorithm) -> None:
    for world, slices, rounds in itertools.product(WORLDS, (1, 2, 3), (1, 2, 3)):
        for slots in slot_counts(algorithm, world, slices):
            found = proof(world, operation(algorithm, world, slices, rounds), slots=slots)
            assert found.roundings == algorithm.roundings(world), f"{world} ranks"


@each_algorithm
def test_holds_for_one_rank_without_a_message(algorithm: Algorithm) -> None:
    assert proof(1, operation(algorithm, 1, 2, 2), slots=1).messages == 0


@each_algorithm
def test_holds_from_every_root(algorithm: Algorithm) -> None:
    for world in range(2, 20):
        for root in range(world):
            proof(world, Operation(algorithm.name, algorithm.collective, root, 2, 2), slots=3)


@each_algorithm
def test_the_least_number_of_slots_is_the_least(algorithm: Algorithm) -> None:
    for world, slices in itertools.product(range(2, 18), (1, 2, 3)):
        slots = algorithm.min_slots(world, slices) - 1
        found = schedule.prove_operations(
            world, [operation(algorithm, world, slices, 2)], slots=slots
        )
        assert found is not None
        assert not found.holds, f"{world} ranks, {slices} slices also work with {slots} slots"
        assert found.error.startswith("deadlock")


@each_algorithm
@pytest.mark.timeout(120)
def test_holds_back_to_back_with_every_algorithm(algorithm: Algorithm) -> None:
    """Two different operations on the same channels; ranks do not wait for each other between."""
    for after, world in itertools.product(ALGORITHMS, WORLDS):
        slots = max(algorithm.min_slots(world), after.min_slots(world, 2))
        first = operation(algorithm, world)
        second = Operation(after.name, after.collective, world - 1, slices=2)
        proof(world, first, second, slots=slots)


@each_algorithm
@pytest.mark.timeout(120)
def test_holds_back_to_back_with_rounds_and_slices(algorithm: Algorithm) -> None:
    for after, world in itertools.product(ALGORITHMS, range(2, 12)):
        for (r1, s1), (r2, s2) in itertools.product([(1, 3), (2, 1), (3, 2)], repeat=2):
            least = max(algorithm.min_slots(world, s1), after.min_slots(world, s2))
            for slots in (least, least + 1):
                first = operation(algorithm, world, s1, r1)
                proof(world, first, operation(after, world, s2, r2), slots=slots)


@pytest.mark.parametrize(
    "algorithm", [a for a in ALGORITHMS if a.collective in BLOCKED], ids=lambda a: a.collective
)
def test_holds_where_blocks_differ(algorithm: Algorithm) -> None:
    """Each block has rounds of its own, drawn at random, or none; another operation follows."""
    chosen = random.Random(5)
    for world, slices, _ in itertools.product(range(2, 34), (1, 2), range(3)):
        rounds = tuple(chosen.choice((0, 1, 1, 2, 3)) for _ in range(algorithm.chunks(world)))
        uneven = dataclasses.replace(
            operation(algorithm, world, slices, max(rounds)), block_rounds=rounds
        )
        after = operation(chosen.choice(ALGORITHMS), world)
        least = algorithm.min_slots(world, slices)
        slots = max(least, schedule.find(after.algorithm, after.collective).min_slots(world))
        alone = proof(world, uneven, slots=least)
        proof(world, uneven, after, slots=slots)
        whole = proof(world, operation(algorithm, world, slices, 1), slots=least).messages
        pairs = algorithm.collective == "all_to_all"  # a rank's block for itself is no message
        moved = [r for i, r in enumerate(rounds) if not pairs or i % world != i // world]
        if algorithm.collective not in ("gather", "scatter"):  # nor is the root's own one
            assert alone.messages * len(moved) == whole * sum(moved)


def test_a_rank_that_leaves_out_more_than_others_is_refuted() -> None:
    """As where ranks disagree about the size of a block."""
    rounds = (1, 2, 3)
    for collective in BLOCKED[:-1]:
        for algorithm in schedule.algorithms(collective):
            uneven = Operation(algorithm.name, collective, 1, 1, 3, rounds)
            for seed in range(20):
                found = schedule.prove_operations(3, [uneven], mutation="drop_step", seed=seed)
                assert found is not None
                assert not found.holds


def test_holds_for_all_algorithms_in_one_plan() -> None:
    for world in (2, 3, 4, 7, 8, 16):
        plan = [operation(a, world, 1 + i % 2, 1 + i % 3) for i, a in enumerate(ALGORITHMS)]
        proof(world, *plan, *reversed(plan), slots=3)


def test_a_refuted_plan_raises_and_names_the_place() -> None:
    with pytest.raises(InternalError, match=r"deadlock.*rank 0, lane 0, step 1.*chunk 2"):
        schedule.prove("ring", 4, slots=1)


def test_prove_with_a_second_operation() -> None:
    alone = schedule.prove("two_shot", 5)
    both = schedule.prove("two_shot", 5, then=Operation("ring", slices=1))
    assert alone.slots == both.slots == 2
    assert both.messages == alone.messages + schedule.prove("ring", 5).messages


@pytest.mark.parametrize(
    ("algorithm", "world", "messages"),
    [
        ("ring", 8, 8 * 14),
        ("two_shot", 8, 2 * 8 * 7),
        ("one_shot", 8, 8 * 7),
        ("double_tree", 8, 2 * 2 * 7),
    ],
)
def test_messages_are_as_the_documents_say(algorithm: str, world: int, messages: int) -> None:
    assert schedule.prove(algorithm, world).messages == messages


def test_what_makes_no_sense_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="known are ring"):
        schedule.prove("rings", 4)
    with pytest.raises(UsageError, match="root"):
        schedule.prove("tree", 4, collective="broadcast", root=4)
    with pytest.raises(UsageError, match="rank"):
        schedule.plan("ring", 0)
    for uneven in (
        Operation("ring", rounds=2, block_rounds=(1, 2, 1)),
        Operation("direct", "gather", block_rounds=(1, 1)),
    ):
        with pytest.raises(UsageError, match="blocks for"):
            schedule.prove_operations(3, [uneven])
    with pytest.raises(UsageError, match="unknown collective"):
        schedule.algorithms("all_reduces")


# --- campaign -------------------------------------------------------------------------------------


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", LARGE_WORLDS)
@each_algorithm
def test_holds_for_large_worlds(algorithm: Algorithm, world: int) -> None:
    if algorithm.collective == "all_to_all" and world > 256:
        pytest.skip("a thousand ranks have a million blocks each")
    for slices, rounds in [(1, 2), (2, 1)]:
        for slots in {least := algorithm.min_slots(world, slices), least + 1, max(least, 4)}:
            found = proof(world, operation(algorithm, world, slices, rounds), slots=slots)
            assert found.roundings == algorithm.roundings(world)


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [128, 256])
@each_algorithm
def test_holds_back_to_back_for_large_worlds(algorithm: Algorithm, world: int) -> None:
    for after in ALGORITHMS:
        slots = max(algorithm.min_slots(world), after.min_slots(world))
        proof(world, operation(algorithm, world), operation(after, world), slots=slots)


@pytest.mark.campaign
@pytest.mark.timeout(900)
@each_algorithm
def test_holds_back_to_back_for_every_world_with_rounds_and_slices(algorithm: Algorithm) -> None:
    for after, world in itertools.product(ALGORITHMS, WORLDS):
        for (r1, s1), (r2, s2) in itertools.product([(1, 2), (3, 1)], repeat=2):
            least = max(algorithm.min_slots(world, s1), after.min_slots(world, s2))
            for slots in (least, least + 1, max(least, 4)):
                first = operation(algorithm, world, s1, r1)
                proof(world, first, operation(after, world, s2, r2), slots=slots)
