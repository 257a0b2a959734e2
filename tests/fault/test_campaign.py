"""Faults in every phase of a group's life, through Communicator and torch.distributed.

The matrix: death, stop, mismatch and absence in each phase, for 2, 3 and 4 ranks. The campaign:
random kills and stops in random phases of random work, also of ranks with forked workers. What must
hold, holds every time (fault_cases.py), also that errors come within 1 s (ranks.Outcome says how
that is measured).

Short forms run in `make test`, all of it in `make campaign`. FAULT_CASES sets the number of random
cases, FAULT_SEED the first seed (each case has one of its own, which a failure shows), and
FAULT_LIMIT the time limit in seconds, to be raised on a busy machine.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Iterator

import pytest
from fault_cases import PHASES, Case, Table
from ranks import Pulse, Stage, named_segments
from surfaces import Direct, Surface, Torch

SHORT_CASES, LONG_CASES = 8, 300
ATTEMPTS, STOOD_STILL_S = 5, 0.4
FAULTS = ["kill", "stop", "mismatch", "absent"]
WORLDS = [2, 3, 4]


@pytest.fixture(scope="module", params=["Communicator", "torch"])
def surface(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Surface]:
    if request.param == "Communicator":
        yield Direct(stage)
        return
    pytest.importorskip("torch")
    pytest.importorskip("dpcomm._torch", reason="dpcomm is built without torch")
    own = Stage("torch")
    yield Torch(own)
    own.close()


def run_case(surface: Surface, case: Case, table: Table) -> None:
    """A case that fails while the machine stands still says nothing, and is run again."""
    for turn in range(1, ATTEMPTS + 1):
        before = copy.deepcopy(table.rows)
        try:
            with Pulse() as pulse:
                case.run(surface.stage, table)
            return
        except Exception as error:
            if pulse.longest_s < STOOD_STILL_S or turn == ATTEMPTS:
                raise
            print(f"still for {pulse.longest_s:.1f} s, once more: {case.text}: {error}", flush=True)
        table.rows = before
        case = case.again()


def run_cases(surface: Surface, cases: list[Case], table: Table) -> None:
    named = named_segments()
    wrong = []
    for number, case in enumerate(cases):
        if number % 50 == 49:
            print(f"{number} cases\n{table}", flush=True)
        try:
            run_case(surface, case, table)
        except Exception as error:  # the others are run, too
            wrong.append(f"{case.text}: {type(error).__name__}: {error}")
            print(wrong[-1], flush=True)
    assert not wrong, "\n".join([*wrong, str(table)])
    assert named_segments() <= named


def check(table: Table) -> None:
    print(table)
    assert table.perfect(), f"\n{table}"


def test_matrix(surface: Surface) -> None:
    """Every phase with every fault; the worlds by turns."""
    table = Table()
    pairs = [(phase, fault) for phase in PHASES for fault in FAULTS]
    for turn, (phase, fault) in enumerate(pairs):
        world = WORLDS[turn % len(WORLDS)]
        case = Case(turn, surface, phase=phase, fault=fault, world=world)
        run_cases(surface, [case], table)
    check(table)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", WORLDS)
def test_whole_matrix(surface: Surface, world: int) -> None:
    table = Table()
    for turn, phase in enumerate(PHASES * 3):
        for fault in FAULTS:
            run_cases(
                surface,
                [Case(100 + turn, surface, phase=phase, fault=fault, world=world)],
                table,
            )
    check(table)


def test_some_random_faults(surface: Surface) -> None:
    table = Table()
    run_cases(surface, [Case(seed, surface) for seed in range(1, 1 + SHORT_CASES // 2)], table)
    check(table)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_many_random_faults(surface: Surface) -> None:
    """Half of the cases for each surface."""
    seed = int(os.environ.get("FAULT_SEED", "0")) or random.randrange(1, 1 << 30)
    count = int(os.environ.get("FAULT_CASES", LONG_CASES)) // 2
    print(f"{count} cases through {surface.name}, from seed {seed}")
    table = Table()
    run_cases(surface, [Case(seed + i, surface) for i in range(count)], table)
    check(table)
