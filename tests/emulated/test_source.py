"""The kernels from their sources (g++): the oracle's bits, and no race."""

from __future__ import annotations

import dataclasses
import secrets

import pytest
import rows
from emulate import Case, Emulation, Operation, check

pytestmark = pytest.mark.timeout(600)

RANDOM_CASES = 60


@pytest.mark.parametrize("seed", range(3))
def test_every_pair_of_choices_gives_the_bits_of_the_oracle(source: Emulation, seed: int) -> None:
    cases = [dataclasses.replace(case, seed=case.seed + 1000 * seed) for case in rows.covering()]
    check(source, cases)


def test_random_cases_give_the_bits_of_the_oracle(source: Emulation) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    check(source, rows.drawn(RANDOM_CASES, seed))


def test_full_blocks(source: Emulation) -> None:
    """As many threads as a block may have, and slots as large as real ones."""
    operations = tuple(
        Operation(algorithm=algorithm, count=70_001, wire=wire, ctas=2)
        for algorithm in ("ring", "two_shot")
        for wire in ("native", "fp16")
    )
    check(source, [Case(3, operations, ctas=2, threads=512, slots=4, slot_bytes=32 << 10)])


def test_operations_without_elements(source: Emulation) -> None:
    """They let no rank get ahead of where the packets of the others are still read."""
    operations = tuple(
        Operation(algorithm="one_shot", count=count)
        for number in range(4)
        for count in (300 + number, 0)
    )
    check(
        source,
        [
            Case(2, operations, packets=4096, virtual_ranks=virtual, seed=seed)
            for virtual in (False, True)
            for seed in range(1, 25)
        ],
    )


def test_there_is_no_race(source_threads: Emulation) -> None:
    """ThreadSanitizer on each schedule and on packets, on few slots."""
    cases = [
        case
        for number, kernel in enumerate(rows.KERNELS)
        for case in rows.drawn(2, number, **rows.FOR_THREADS, kernel=kernel)
    ]
    check(source_threads, cases)
