"""A peer that dies: every rank that waits raises PeerError naming it, all with the same text."""

from __future__ import annotations

import os
import signal
import time

import pytest
from ranks import Group, Stage, expect_error

from dpcomm import schedule

WORLDS = [2, 3, 4]
LARGE = 1_500_000  # elements; more than all slots of a channel hold
ALGORITHMS = [
    (collective, algorithm.name)
    for collective in schedule.COLLECTIVES
    for algorithm in schedule.algorithms(collective)
]


def count_for(collective: str, world: int) -> int:
    return LARGE if collective in ("all_reduce", "broadcast", "reduce") else LARGE // world


def expect_death(group: Group, victim: int, since: float, *parts: str) -> str:
    """The survivors' commands in progress, and their next ones, end with the same PeerError."""
    text = expect_error(group.end(), "PeerError", f"{group[victim].name} died", *parts, since=since)
    again = expect_error(group.outcomes("collective", "all_reduce", 10), "PeerError")
    assert again == text
    return text


@pytest.mark.parametrize("world", WORLDS)
def test_between_operations(stage: Stage, world: int) -> None:
    for victim in range(world):
        with stage.group(world) as group:
            group.start()
            group.do("collective", "all_reduce", 100)
            group[victim].kill()
            assert group[victim].ended()
            since = time.monotonic()
            group.begin("collective", "all_reduce", 200)
            expect_death(
                group, victim, since, "finished last: all_reduce #1 (100 x float32", "all_reduce #2"
            )
            group.do("close")
            if world > 2:
                group.restart()


@pytest.mark.parametrize("world", WORLDS)
def test_while_others_sleep_in_a_wait(stage: Stage, world: int) -> None:
    for manner in ("collective", "submit"):
        with stage.group(world) as group:
            group.start()
            victim = world - 1
            survivors = group.others(victim)
            for rank in survivors:
                rank.begin(manner, "all_reduce", 1000)
            if manner == "submit":
                for outcome in group.end(survivors):
                    assert outcome.error is None
                for rank in survivors:
                    rank.begin("wait", 0)
            time.sleep(0.2)
            since = group[victim].kill()
            expect_death(group, victim, since, "no operation yet")
            group.do("close")
            assert all(rank.do("leftovers")["threads"] == [] for rank in group)


@pytest.mark.parametrize(("collective", "algorithm"), ALGORITHMS)
def test_in_the_middle_of_a_large_message(stage: Stage, collective: str, algorithm: str) -> None:
    for world in (2, 4) if collective == "all_reduce" else (3,):
        # The one that others wait for: the root that sends, a rank that sends to the root (to which
        # the root listens first, so that nobody is done before).
        victim = {"broadcast": 0, "scatter": 0, "gather": 1}.get(collective, world - 1)
        faults = {"DPCOMM_FAULTS": f"kill=3,rank={victim}"}
        with stage.group(world) as group:
            group.start(environment=faults)
            group.begin("collective", collective, count_for(collective, world), algorithm=algorithm)
            assert group[victim].ended(), "the victim lives: it has sent no third message"
            group[victim].dead = True
            expect_death(
                group, victim, time.monotonic(), f"in {collective} #1", "finished last: nothing"
            )


@pytest.mark.parametrize(("collective", "algorithm"), [*ALGORITHMS, ("barrier", "")])
def test_before_its_part_of_an_operation(stage: Stage, collective: str, algorithm: str) -> None:
    """In operations of one direction a rank may rightly be done before it can know."""
    world = 3
    options = {"algorithm": algorithm} if algorithm else {}
    with stage.group(world) as group:
        group.start()
        group.do("collective", "barrier")
        victim = world - 1 if collective in ("broadcast", "scatter") else 0
        for rank in group.others(victim):
            rank.begin("collective", collective, count_for(collective, world), **options)
        time.sleep(0.1)
        since = group[victim].kill()
        outcomes = group.end()
        raised = [outcome for outcome in outcomes if outcome.error is not None]
        assert raised
        text = expect_error(raised, "PeerError", f"{group[victim].name} died", since=since)
        again = expect_error(group.outcomes("collective", "barrier"), "PeerError")
        assert again == text


def test_two_at_once(stage: Stage) -> None:
    with stage.group(4) as group:
        group.start()
        for rank in group.others(1, 3):
            rank.begin("collective", "all_reduce", LARGE)
        time.sleep(0.1)
        group[1].kill()
        since = group[3].kill()
        text = expect_error(group.end(), "PeerError", since=since)
        assert f"{group[1].name} died" in text or f"{group[3].name} died" in text
        group.restart()


def test_the_rank_that_is_waited_for_is_busy_and_another_is_dead(stage: Stage) -> None:
    """In a ring of four, rank 0 waits for rank 3 alone, which computes for long; rank 2 is dead."""
    with stage.group(4) as group:
        group.start(algorithm="ring")
        group.do("collective", "all_reduce", 1000)
        group[2].kill()
        assert group[2].ended()
        since = time.monotonic()
        group[0].begin("collective", "all_reduce", 1000)
        text = expect_error([group[0].end()], "PeerError", f"{group[2].name} died", since=since)
        for number in (1, 3):
            group[number].begin("collective", "all_reduce", 1000)
        assert expect_error(group.end(group.others(0, 2)), "PeerError") == text


def test_its_forked_workers_live_on(stage: Stage) -> None:
    """Neither workers made before the group nor after it keep their rank alive."""
    with stage.group(3) as group:
        workers = [group[2].do("fork", "sleep")]
        group.start()
        workers.append(group[2].do("fork", "sleep"))
        try:
            group.do("collective", "all_reduce", 1000)
            for rank in group.others(2):
                rank.begin("collective", "all_reduce", 1000)
            time.sleep(0.1)
            since = group[2].kill()
            expect_death(group, 2, since)
            group.restart()
        finally:
            for worker in workers:
                os.kill(worker, 0)  # they did live on
                os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("manner", ["exit", "os_exit", "raise", "drop"])
def test_a_worker_that_ends_disturbs_nothing(stage: Stage, manner: str) -> None:
    with stage.group(2) as group:
        group.start(timeout=5)
        group.do("submit", "all_reduce", 1000)  # a progress thread, which the worker will not have
        group.do("wait", 0)
        for rank in group:
            code, _ = rank.do("fork", manner)
            assert code == {"exit": 0, "os_exit": 3, "raise": 1, "drop": 0}[manner]
            group.do("collective", "all_reduce", 1000)
        time.sleep(0.2)  # longer than a wait goes without asking for the dead
        group[0].begin("collective", "all_reduce", LARGE)
        time.sleep(0.2)
        group[1].begin("collective", "all_reduce", LARGE)
        for outcome in group.end():
            assert outcome.error is None, outcome


def test_a_killed_worker_disturbs_nothing(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start(timeout=5)
        for rank in group:
            for _ in range(3):
                worker = rank.do("fork", "sleep")
                os.kill(worker, signal.SIGKILL)
        group[0].begin("collective", "all_reduce", LARGE)
        time.sleep(0.3)
        group[1].begin("collective", "all_reduce", LARGE)
        for outcome in group.end():
            assert outcome.error is None, outcome


def test_a_worker_that_uses_the_communicator(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start(timeout=5)
        group[0].do("submit", "all_reduce", 1000)  # in flight at the fork
        code, said = group[0].do("fork", "use")
        assert code == 0
        assert said.split() == ["UsageError"] * 4
        group[1].do("collective", "all_reduce", 1000)
        group[0].do("wait", 0)
        group.do("collective", "broadcast", 1000)


@pytest.mark.parametrize("world", [2, 4])
def test_at_the_end(stage: Stage, world: int) -> None:
    """A rank that dies or closes after its last operation is nobody's failure."""
    with stage.group(world) as group:
        group.start()
        group.do("collective", "all_reduce", 1000)
        group[0].kill()
        group.do("close")
        for rank in group:
            left = rank.do("leftovers")
            assert left["threads"] == []
        group.restart()


def test_one_that_has_closed(stage: Stage) -> None:
    with stage.group(3) as group:
        group.start()
        group.do("collective", "all_reduce", 1000)
        group[1].do("close")
        since = time.monotonic()
        for rank in group.others(1):
            rank.begin("collective", "barrier")
        expect_error(
            group.end(group.others(1)),
            "PeerError",
            f"{group[1].name} has closed its communicator",
            "finished last: all_reduce #1",
            since=since,
        )
