"""Messages between two ranks, on every transport."""

from __future__ import annotations

import programs
import pytest
from pool import Pool

SMALL_SLOTS = {"DPCOMM_SLOT_BYTES": "4096"}
STALLING = {**SMALL_SLOTS, "DPCOMM_FAULTS": "stall=0.3"}
MIB = 1 << 20


@pytest.mark.parametrize("world", [2, 3, 4, 9])
@pytest.mark.parametrize("environment", [{}, SMALL_SLOTS, STALLING], ids=["", "small", "stalls"])
def test_random_programs(pool: Pool, world: int, environment: dict[str, str], seed: int) -> None:
    """Sizes, tags, pairs and orders at random, any source, beside collectives."""
    with pool.group(world, environment) as group:
        for each in range(2):
            program = programs.draw(world, 60 * world, seed + each)
            for problem in group.call("program", program, seed + each, 5):
                assert problem == "", (seed + each, problem)


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_many_random_programs(pool: Pool, seed: int) -> None:
    for each in range(100):
        world = 2 + each % 4
        with pool.group(world, [{}, SMALL_SLOTS, STALLING][each % 3]) as group:
            program = programs.draw(world, 100 * world, seed + each)
            for problem in group.call("program", program, seed + each, 10):
                assert problem == "", (seed + each, problem)


@pytest.mark.parametrize("world", [2, 3])
def test_large_messages_between_all_at_once(pool: Pool, world: int) -> None:
    """64 MiB each way; of three ranks 16 MiB to each other one, twice, later tags first."""
    nbytes, each = (64 * MIB, 1) if world == 2 else (16 * MIB, 2)
    program = [
        programs.Message(sender, receiver, tag, 0, nbytes + tag)
        for tag in range(each)
        for sender in range(world)
        for receiver in range(world)
        if sender != receiver
    ]
    with pool.group(world) as group:
        assert group.call("program", program, 1, 3) == [""] * world


def test_thousands_of_short_messages(pool: Pool) -> None:
    """More than are kept for later, in the order of one tag and of many."""
    world = 3
    program = [
        programs.Message(sender, (sender + 1) % world, number % 2 * number, number // 2, 200)
        if number % 2 == 0
        else programs.Message(sender, (sender + 1) % world, number, 0, 200)
        for sender in range(world)
        for number in range(3000)
    ]
    with pool.group(world) as group:
        assert group.call("program", program, 3, 10) == [""] * world


def test_a_ring(pool: Pool) -> None:
    """Everybody sends on and receives, blocking, with nothing else in flight."""
    with pool.group(5) as group:
        assert group.call("ring", 32) == [""] * 5
