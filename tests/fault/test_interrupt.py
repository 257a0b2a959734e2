"""Ctrl-C: a rank that waits in native code reacts within about a second."""

from __future__ import annotations

import signal
import socket
import time

import pytest
from ranks import PATIENCE_S, Stage, expect_error, expect_in_time

LARGE = 1_500_000
ROUND = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.mark.parametrize("collective", ["all_reduce", "broadcast", "barrier"])
def test_in_an_operation(stage: Stage, collective: str) -> None:
    """The operation cannot be left half done: the communicator ends on all ranks."""
    with stage.group(3) as group:
        group.start(timeout=60)
        group.do("run", ROUND)
        for rank in group.others(2):
            rank.begin("collective", collective, LARGE, root=2)
        time.sleep(0.2)
        since = time.monotonic()
        group[0].signal(signal.SIGINT)
        outcome = group[0].end()
        assert outcome.error == "KeyboardInterrupt", outcome
        expect_in_time([outcome], since)
        said = f"{group[0].name} was interrupted in {collective}"
        text = expect_error([group[1].end()], "PeerError", said, since=since)
        again = expect_error(group.outcomes("collective", "barrier"), "PeerError")
        assert again == text
        group.do("close")
        group.restart()


def test_in_a_synchronous_call_behind_asynchronous_ones(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start(timeout=60)
        group[0].do("run", ROUND)
        group[0].do("submit", "all_reduce", LARGE)
        group[0].begin("collective", "all_reduce", LARGE)
        time.sleep(0.2)
        since = time.monotonic()
        group[0].signal(signal.SIGINT)
        outcome = group[0].end()
        assert outcome.error == "KeyboardInterrupt"
        expect_in_time([outcome], since)
        outcome = group[1].do_outcome("collective", "barrier")
        expect_error([outcome], "PeerError", "was interrupted")


def test_in_the_wait_for_a_handle(stage: Stage) -> None:
    """Only the wait ends; the operation goes on and can be waited for again."""
    with stage.group(2) as group:
        group.start(timeout=60)
        group[0].do("run", ROUND)
        group[0].do("submit", "all_reduce", LARGE)
        for _ in range(2):
            group[0].begin("wait", 0)
            time.sleep(0.2)
            since = time.monotonic()
            group[0].signal(signal.SIGINT)
            outcome = group[0].end()
            assert outcome.error == "KeyboardInterrupt"
            expect_in_time([outcome], since)
        group[1].do("collective", "all_reduce", LARGE)
        group[0].do("wait", 0)
        group.do("collective", "barrier")


def test_a_handler_that_raises_nothing(stage: Stage) -> None:
    """It runs while the wait lasts, and the wait goes on."""
    with stage.group(2) as group:
        group.start(timeout=60)
        source = (
            "import signal, time\n"
            "puppet.seen = []\n"
            "signal.signal(signal.SIGUSR1, lambda *_: puppet.seen.append(time.monotonic()))"
        )
        group[0].do("run", source)
        group[0].begin("collective", "all_reduce", LARGE)
        time.sleep(0.2)
        sent = time.monotonic()
        for _ in range(3):
            group[0].signal(signal.SIGUSR1)
            time.sleep(0.2)
        time.sleep(0.5)
        called = time.monotonic()
        group[1].do("collective", "all_reduce", LARGE)
        assert group[0].end().error is None
        seen = group[0].do("run", "result = puppet.seen")
        assert sent <= seen[0] < called


def test_in_other_threads_nothing_is_asked(stage: Stage) -> None:
    """Python runs handlers in the main thread only: that is where Ctrl-C arrives."""
    with stage.group(2) as group:
        group.start(timeout=60)
        group[0].do("run", ROUND)
        group[0].do("background", "collective", "all_reduce", LARGE)
        group[0].begin("run", "import time; time.sleep(30)")
        time.sleep(0.2)
        group[0].signal(signal.SIGINT)
        assert group[0].end().error == "KeyboardInterrupt"
        group[1].do("collective", "all_reduce", LARGE)
        assert group[0].do("joined", 0)[0] is None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("store", ["file", "tcp"])
def test_in_the_start(stage: Stage, rank: int, store: str) -> None:
    with stage.group(2) as group:
        init = group.init()
        if store == "tcp":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                init = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        group.do("run", ROUND)
        group[rank].begin("start", rank, 2, init, timeout=60)
        time.sleep(0.3)
        since = time.monotonic()
        group[rank].signal(signal.SIGINT)
        outcome = group[rank].end()
        assert outcome.error == "KeyboardInterrupt"
        expect_in_time([outcome], since)
        assert group[rank].do("leftovers")["threads"] == []
        group.restart()


def test_in_a_program_with_its_own_end(stage: Stage) -> None:
    """A script that Ctrl-C ends in a wait does end, and the others learn of it."""
    with stage.group(2) as group:
        group.start(timeout=60)
        group[0].do("run", ROUND)
        group[0].begin("run", "puppet.comm.barrier(); raise SystemExit")
        time.sleep(0.2)
        group[0].signal(signal.SIGINT)
        assert group[0].end().error == "KeyboardInterrupt"
        group[0].begin("interpreter_exit")
        assert group[0].ended(PATIENCE_S / 5)
        group[0].dead = True
        outcome = group[1].do_outcome("collective", "barrier")
        expect_error([outcome], "PeerError", f"{group[0].name} was interrupted in barrier #1")
