"""A rank that does not come to an operation: TimeoutError says who, and what it did last."""

from __future__ import annotations

import signal
import time

import pytest
from ranks import Group, Outcome, Stage, expect_error, expect_in_time

LARGE = 1_500_000
LIMIT = 1.0


def expect_timeout(outcomes: list[Outcome], *parts: str, limit: float = LIMIT) -> str:
    text = expect_error(outcomes, "TimeoutError", f"not complete after {limit:g} s", *parts)
    expect_in_time(outcomes, limit=limit)
    assert max(outcome.seconds for outcome in outcomes) > 0.9 * limit
    return text


def expect_unusable(group: Group, text: str) -> None:
    """Later calls give the same error on every rank, and the ranks can begin anew."""
    assert expect_error(group.outcomes("collective", "barrier"), "TimeoutError") == text
    group.do("close")
    group.restart()


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_that_do_not_call(stage: Stage, world: int) -> None:
    with stage.group(world) as group:
        group.start(timeout=LIMIT)
        group.do("collective", "all_reduce", 77)
        absent = [1, 3] if world == 4 else [world - 1]
        callers = group.others(*absent)
        for rank in callers:
            rank.begin("collective", "reduce_scatter", 50, dtype="int64")
        text = expect_timeout(
            group.end(callers),
            "reduce_scatter #2 (50 x int64, sum",
            *[
                f"{group[rank].name} has not called it (finished last: all_reduce #1 (77 x float32"
                for rank in absent
            ],
        )
        for rank in callers:
            assert f"{rank.name} has not called" not in text
        expect_unusable(group, text)


def test_the_limit_of_a_call(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start(timeout=60)
        group[0].begin("collective", "broadcast", root=1, timeout=0.7)
        text = expect_timeout([group[0].end()], "root 1", "no operation yet", limit=0.7)
        expect_unusable(group, text)


def test_a_limit_of_the_wait_for_a_handle_ends_only_the_wait(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start(timeout=20)
        group[0].do("submit", "all_reduce", 1000)
        group[0].begin("wait", 0, timeout=0.3)
        expect_error([group[0].end()], "TimeoutError", "0.3 s of waiting; it goes on")
        group[1].do("collective", "all_reduce", 1000)
        group[0].do("wait", 0)
        group.do("collective", "barrier")


def test_asynchronous_operations(stage: Stage) -> None:
    with stage.group(3) as group:
        group.start(timeout=LIMIT)
        callers = group.others(2)
        for rank in callers:
            for _ in range(3):
                rank.do("submit", "all_reduce", 1000)
        for rank in callers:
            rank.begin("wait", 2)
        text = expect_timeout(group.end(callers), f"{group[2].name} has not called it")
        for rank in callers:  # all that were queued end alike
            for index in (0, 1):
                rank.begin("wait", index)
                assert rank.end().text == text
        expect_unusable(group, text)


@pytest.mark.parametrize("algorithm", ["ring", "double_tree", "two_shot"])
def test_a_rank_that_stops_in_the_middle(stage: Stage, algorithm: str) -> None:
    """Whoever runs out of time first names the one that stopped, not the neighbour it waits for."""
    with stage.group(4) as group:
        group.start(timeout=LIMIT, environment={"DPCOMM_FAULTS": "stop=3,rank=2"})
        group.begin("collective", "all_reduce", LARGE, algorithm=algorithm)
        others = group.others(2)
        text = expect_timeout(
            group.end(others),
            f"every rank has called it, but {group[2].name} has given no sign of life for",
            f"in all_reduce #1 ({LARGE} x float32",
            "finished last: nothing",
        )
        for rank in others:
            assert f"{rank.name} has given no sign" not in text
        # It wakes up and finds out.
        group[2].signal(signal.SIGCONT)
        assert expect_error([group[2].end()], "TimeoutError") == text
        expect_unusable(group, text)


def test_a_rank_that_is_stopped_while_it_waits(stage: Stage) -> None:
    with stage.group(3) as group:
        group.start(timeout=2.0)
        group[0].begin("collective", "all_reduce", LARGE)
        time.sleep(0.3)
        group[0].signal(signal.SIGSTOP)
        assert group[0].stopped()
        for rank in group.others(0):
            rank.begin("collective", "all_reduce", LARGE)
        text = expect_timeout(
            group.end(group.others(0)), f"{group[0].name} has given no sign of life", limit=2.0
        )
        group[0].signal(signal.SIGCONT)
        assert group[0].end().text == text


def test_a_rank_that_is_stopped_between_operations(stage: Stage) -> None:
    with stage.group(3) as group:
        group.start(timeout=LIMIT)
        group.do("collective", "barrier")
        group[1].signal(signal.SIGSTOP)
        assert group[1].stopped()
        for rank in group.others(1):
            rank.begin("collective", "all_reduce", 10)
        text = expect_timeout(
            group.end(group.others(1)),
            f"{group[1].name} has not called it (finished last: barrier #1)",
        )
        group[1].signal(signal.SIGCONT)
        expect_unusable(group, text)


def test_a_short_stop_is_no_failure(stage: Stage) -> None:
    with stage.group(3) as group:
        group.start(timeout=20)
        for victim in range(3):
            group.begin("collective", "all_reduce", LARGE)
            group[victim].signal(signal.SIGSTOP)
            time.sleep(0.3)
            group[victim].signal(signal.SIGCONT)
            for outcome in group.end():
                assert outcome.error is None, outcome
