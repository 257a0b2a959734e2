"""Faults planted in plans: the prover has to see each kind, in every algorithm that can have it."""

from __future__ import annotations

import re

import pytest

from dpcomm import schedule
from dpcomm.errors import UsageError
from dpcomm.schedule import Algorithm, Operation

ALGORITHMS = schedule.algorithms()
IDS = [f"{a.collective}-{a.name}" for a in ALGORITHMS]
WORLDS = (2, 3, 4, 5, 8, 9, 13)
SEEDS = range(24)

REDUCING = ("all_reduce", "reduce", "reduce_scatter")


def places_exist(kind: str, algorithm: Algorithm) -> bool:
    """Whether a plan of the algorithm has a place for the fault, in a world large enough."""
    if kind == "drop_reduce":
        return algorithm.collective in REDUCING
    if kind == "not_as_sent":
        return algorithm.name == "one_shot"
    if kind == "one_lane":
        return algorithm.lanes > 1
    if kind == "write_first":  # a rank that first reads a slice and writes it in a later step
        return algorithm.name in ("ring", "two_shot", "one_shot") and (
            algorithm.collective == "all_reduce"
        )
    return True


@pytest.mark.parametrize("check_form", [True, False], ids=["form", "execution"])
@pytest.mark.parametrize("kind", schedule.mutations())
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_a_planted_fault_is_caught(algorithm: Algorithm, kind: str, check_form: bool) -> None:
    planted = 0
    for world in WORLDS:
        for seed in SEEDS:
            slices = 1 + seed % 3
            operations = [
                Operation(algorithm.name, algorithm.collective, world // 2, slices, 2),
                Operation(algorithm.name, algorithm.collective, 0, slices, 1),
            ]
            found = schedule.prove_operations(
                world,
                operations,
                slots=algorithm.min_slots(world, slices) + seed % 2,
                check_form=check_form,
                mutation=kind,
                seed=seed,
            )
            if found is None:
                continue
            planted += 1
            assert not found.holds, f"{world} ranks, {slices} slices, seed {seed}: not seen"
            assert found.error
    assert (planted > 0) == places_exist(kind, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_an_owner_that_keeps_an_unrounded_value_is_caught(algorithm: Algorithm) -> None:
    """Law 2. Only where a rank keeps what it sends on can it keep something else."""
    owners = algorithm.collective == "all_reduce" and algorithm.name != "one_shot"
    for world in WORLDS:
        found = schedule.prove_operations(
            world,
            [Operation(algorithm.name, algorithm.collective, slices=2)],
            keep_as_sent=False,
        )
        assert found is not None
        assert found.holds != owners, f"{world} ranks: {found.error}"
        assert not owners or "keeps another value than rank" in found.error


@pytest.mark.parametrize(
    ("kind", "algorithm", "why"),
    [
        ("drop_reduce", "ring", "partial result|without the contribution"),
        ("drop_step", "two_shot", "gets chunk|deadlock|left over|never writes"),
        ("wrong_chunk", "ring", "gets chunk"),
        ("drop_copy", "two_shot", "never writes|partial result"),
        ("swap_steps", "ring", "gets chunk|deadlock"),
        ("not_as_sent", "one_shot", "keeps another value than rank"),
        ("write_first", "one_shot", "after its output was written|deadlock"),
        ("one_lane", "double_tree", "shares the channel"),
    ],
)
def test_the_reason_fits_the_fault(kind: str, algorithm: str, why: str) -> None:
    found = schedule.prove_operations(
        4, [Operation(algorithm, rounds=2)], mutation=kind, seed=3, check_form=False
    )
    assert found is not None
    assert not found.holds
    assert re.search(why, found.error), found.error


def test_an_unknown_fault_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="mutation"):
        schedule.prove_operations(4, [Operation("ring")], mutation="drop_all")
