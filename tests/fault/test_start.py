"""Starts that fail: who did not come or died is named, with the same text on every rank."""

from __future__ import annotations

import signal
import socket
import time
from typing import Any

import pytest
from ranks import Group, Outcome, Stage, expect_error, expect_in_time

KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)


def begin(group: Group, *absent: int, timeout: float, init: str = "", **options: Any) -> str:
    """Begins the start on all but some ranks; special={rank: options}. The address."""
    special = options.pop("special", {})
    init = init or group.init()
    for rank in group.others(*absent):
        rank.begin(
            "start",
            rank.number,
            len(group.ranks),
            init,
            timeout=timeout,
            **options,
            **special.get(rank.number, {}),
        )
    return init


def expect_timeout(outcomes: list[Outcome], timeout: float, *parts: str) -> None:
    expect_error(outcomes, "TimeoutError", *parts, f"did not come within {timeout:g} s")
    assert all(timeout * 0.9 < outcome.seconds for outcome in outcomes)
    expect_in_time(outcomes, limit=timeout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("absent", "said"),
    [((2,), "rank 2 did"), ((1, 3), "ranks 1, 3 did"), ((0, 2), "ranks 0, 2 did")],
)
def test_absent_ranks(stage: Stage, absent: tuple[int, ...], said: str) -> None:
    with stage.group(4) as group:
        begin(group, *absent, timeout=1.0)
        outcomes = group.end(group.others(*absent))
        expect_timeout(outcomes, 1.0, f"group 'default' of 4 ranks: {said} not come")
        group.restart()  # with all four


def test_absent_ranks_through_tcp(stage: Stage) -> None:
    with stage.group(3) as group:
        init = f"tcp://127.0.0.1:{free_port()}"
        begin(group, 1, timeout=1.0, init=init)
        expect_timeout(group.end(group.others(1)), 1.0, "rank 1 did not come")
        begin(group, 0, timeout=1.0, init=init)
        expect_error(group.end(group.others(0)), "TimeoutError", "rank 0 does not listen", init)
        begin(group, timeout=10.0, init=init)  # the same port again
        for outcome in group.end():
            assert outcome.error is None, outcome
        assert group[0].do("leftovers")["threads"] == []


def test_rank_0_dies_with_the_store(stage: Stage) -> None:
    with stage.group(3) as group:
        begin(group, 2, timeout=15.0, init=f"tcp://127.0.0.1:{free_port()}")
        time.sleep(0.3)
        since = group[0].kill()
        died = f"{group[0].name} died while group 'default' of 3 ranks started"
        expect_error([group[1].end()], "PeerError", died, since=since)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_dies_before_it_has_come(stage: Stage, victim: int) -> None:
    with stage.group(3) as group:
        special = {victim: {"deadly": (f"here/{victim}", False, KILL)}}
        begin(group, timeout=1.0, special=special)
        assert group[victim].ended()
        group[victim].dead = True
        expect_timeout(group.end(), 1.0, f"rank {victim} did not come")
        group.restart()


@pytest.mark.parametrize(
    ("victim", "key", "behind"),
    [
        (0, "here/0", True),
        (0, "offer/0", False),
        (0, "offer/0", True),
        (0, "verdict/0", False),
        (0, "verdict/0", True),
        (2, "here/2", True),
        (1, "answer/0/1", False),
        (2, "answer/0/2", True),
    ],
)
def test_a_rank_dies_after_it_has_come(stage: Stage, victim: int, key: str, behind: bool) -> None:
    with stage.group(3) as group:
        begin(group, timeout=15.0, special={victim: {"deadly": (key, behind, KILL)}})
        assert group[victim].ended()
        since = time.monotonic()
        group[victim].dead = True
        outcomes = group.end()
        if victim == 0:  # rank 0 is the one that would tell the others
            for outcome in outcomes:
                assert outcome.error == "PeerError", outcome
        expect_error(
            outcomes,
            "PeerError",
            f"{group[victim].name} died while group 'default' of 3 ranks started",
            since=since,
        )
        group.restart()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_stops_in_the_start(stage: Stage, victim: int) -> None:
    with stage.group(3) as group:
        key = "verdict/0" if victim == 0 else f"answer/0/{victim}"
        begin(group, timeout=1.0, special={victim: {"deadly": (key, False, STOP)}})
        outcomes = group.end(group.others(victim))
        stopped = f"{group[victim].name} came, but did not get ready within 1 s"
        expect_error(outcomes, "TimeoutError", stopped)
        expect_in_time(outcomes, limit=1.0)


def test_a_late_rank_is_no_failure(stage: Stage) -> None:
    for late in (0, 1):
        with stage.group(2) as group:
            init = begin(group, late, timeout=8.0)
            time.sleep(0.7)
            begin(group, 1 - late, timeout=8.0, init=init)
            for outcome in group.end():
                assert outcome.error is None, outcome
            group.do("collective", "all_reduce", 1000)


def test_a_rank_that_is_started_twice(stage: Stage) -> None:
    """Either the first two meet and the third is refused, or all are."""
    with stage.group(3) as group:
        init = group.init()
        for rank, number in zip(group, (0, 1, 1), strict=True):
            rank.begin("start", number, 2, init, timeout=2.0)
        outcomes = group.end()
        refused = [outcome for outcome in outcomes if outcome.error is not None]
        assert len(refused) in (1, 3), outcomes
        # Its place is taken, or the segment has lost its name by then.
        expect_error(refused, "InternalError", "the rank started twice")


def test_a_failure_right_after_the_start_is_no_failure_of_the_start(stage: Stage) -> None:
    source = (
        "comm = dpcomm.Communicator(rank, 3, init, name=name, timeout=10)\n"
        "if rank == 0: comm.abort('at once')\n"
        "puppet.comm = comm"
    )
    with stage.group(3) as group:
        init = group.init()
        for turn in range(15):
            for rank in group:
                rank.begin("run", source, rank=rank.number, init=init, name=f"turn{turn}")
            for outcome in group.end():
                assert outcome.error is None, outcome
            expect_error(group.outcomes("collective", "barrier"), "PeerError", "at once")


def test_threads_as_ranks_that_do_not_come(stage: Stage) -> None:
    with stage.group(1) as group:
        source = (
            "import threading\n"
            "texts = []\n"
            "def rank(number, world):\n"
            "    try:\n"
            "        comm = dpcomm.Communicator(number, world, transport='inproc', timeout=0.5)\n"
            "        x = np.ones(10)\n"
            "        comm.all_reduce(x)\n"
            "        texts.append(str(x[0]))\n"
            "    except dpcomm.TimeoutError as error:\n"
            "        texts.append(str(error))\n"
            "for ranks, world in (([0, 2], 4), ([0, 1], 2)):\n"  # the name is free again
            "    threads = [threading.Thread(target=rank, args=(r, world)) for r in ranks]\n"
            "    for t in threads: t.start()\n"
            "    for t in threads: t.join()\n"
            "result = texts"
        )
        texts = group[0].do("run", source)
        assert (
            texts[0]
            == texts[1]
            == "group 'default' of 4 ranks: ranks 1, 3 did not come within 0.5 s; there are "
            f"rank 0 {group[0].name[7:]}, rank 2 {group[0].name[7:]}"
        )
        assert texts[2:] == ["2.0", "2.0"]
