"""Every transport gives the oracle's bits: algorithms, dtypes, operators, wire formats, counts,
alignments, in place and not, in worlds of 1 to 9 and 16."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from expected import run_and_compare
from pool import Pool
from selection import PARAMETERS, case_of, covering, everything, lossy_row, random_row

from dpcomm import _core

SMALL_SLOTS = {"DPCOMM_SLOT_BYTES": "4096"}  # many rounds with few elements
STALLS = SMALL_SLOTS | {"DPCOMM_FAULTS": "stall=0.3,seed=3"}
SLOW_RANK = SMALL_SLOTS | {"DPCOMM_FAULTS": "delay_us=300,rank=0"}
ALL_SLEEP = SMALL_SLOTS | {"DPCOMM_SPIN_US": "0", "DPCOMM_YIELD_US": "0"}


@functools.lru_cache(maxsize=1)
def rows(seed: int) -> list[dict[str, Any]]:
    return covering(seed)


def random_cases(group: Any, count: int, seed: int) -> list[Any]:
    chosen = random.Random(seed)
    lanes = tuple(group.lanes)
    drawn = [(lossy_row if number % 2 else random_row)(chosen) for number in range(count)]
    return [case_of(row, group.world, lanes, seed + number) for number, row in enumerate(drawn)]


def test_the_covering_has_nearly_all_legal_pairs(seed: int) -> None:
    found = {
        (first, row[first], second, row[second])
        for row in rows(seed)
        for first in PARAMETERS
        for second in PARAMETERS
    }
    chosen = random.Random(seed + 1)
    drawn = [random_row(chosen) for _ in range(2000)]
    pairs = {
        (first, row[first], second, row[second])
        for row in drawn
        for first in PARAMETERS
        for second in PARAMETERS
    }
    assert len(pairs - found) < 0.02 * len(pairs)


@pytest.mark.parametrize("world", range(1, 10))
def test_pairs_of_everything(pool: Pool, world: int, seed: int) -> None:
    mine = [(seed + i, row) for i, row in enumerate(rows(seed)) if row["world"] == world]
    assert mine
    with pool.group(world, SMALL_SLOTS) as group:
        lanes = tuple(group.lanes)
        run_and_compare(group, [case_of(row, world, lanes, number) for number, row in mine])
        run_and_compare(group, random_cases(group, 80, seed + 500))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_stalls_and_slow_ranks_change_nothing(pool: Pool, world: int, seed: int) -> None:
    for environment in (STALLS, SLOW_RANK):
        with pool.group(world, environment) as group:
            run_and_compare(group, random_cases(group, 40, seed))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_that_sleep_at_once(pool: Pool, world: int, seed: int) -> None:
    with pool.group(world, ALL_SLEEP) as group:
        run_and_compare(group, random_cases(group, 30, seed + 1000))


@pytest.mark.parametrize("world", [2, 4])
def test_slots_of_the_usual_size(pool: Pool, world: int, seed: int) -> None:
    with pool.group(world) as group:
        run_and_compare(group, random_cases(group, 12, seed + 2000))


@pytest.mark.parametrize("mode", ["async", "mixed"])
@pytest.mark.parametrize("world", [2, 5])
def test_many_operations_in_flight(pool: Pool, world: int, mode: str, seed: int) -> None:
    with pool.group(world, SMALL_SLOTS) as group:
        run_and_compare(group, random_cases(group, 40, seed + 3000), mode)


@pytest.mark.parametrize("isa", _core.wire_isas())
def test_every_instruction_set(pool: Pool, isa: str, seed: int) -> None:
    with pool.group(3, SMALL_SLOTS | {"DPCOMM_ISA": isa}) as group:
        run_and_compare(group, random_cases(group, 40, seed + 5000))


def test_a_world_of_16(pool: Pool, seed: int) -> None:
    wide = Pool(pool.transport, 16)
    try:
        with wide.group(16, SMALL_SLOTS) as group:
            run_and_compare(group, random_cases(group, 15, seed + 4000))
    finally:
        wide.close()


@pytest.mark.campaign
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("environment", [SMALL_SLOTS, STALLS], ids=["plain", "stalls"])
def test_everything(pool: Pool, world: int, environment: dict[str, str], seed: int) -> None:
    with pool.group(world, environment) as group:
        cases = list(everything(world, tuple(group.lanes), seed))
        for first in range(0, len(cases), 200):
            run_and_compare(group, cases[first : first + 200])
