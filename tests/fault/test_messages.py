"""Messages between two ranks whose peer dies, stops, does not come, or leaves."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from ranks import (
    PATIENCE_S,
    Group,
    Rank,
    Stage,
    expect_done_since,
    expect_error,
    expect_in_time,
)

LARGE = 64 << 20
SHORT = 100
LIMIT = 1.0


def wait_until_begun(*ranks: Rank) -> None:
    """Until they have the thread that their first send or receive starts."""
    deadline = time.monotonic() + PATIENCE_S
    for rank in ranks:
        tasks = Path(f"/proc/{rank.pid}/task")
        while "dpcomm-messages" not in [(t / "comm").read_text().strip() for t in tasks.iterdir()]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def expect_end(group: Group, text: str, error: str) -> None:
    """Whatever the ranks call next gives the same error; nothing of dpcomm is left then."""
    again = [rank.do_outcome("message", "recv", None, 9, 1) for rank in group]
    again += group.outcomes("collective", "all_reduce", 10)
    assert expect_error(again, error) == text
    group.do("close")
    assert all(rank.do("leftovers")["threads"] == [] for rank in group)


@pytest.mark.parametrize("nbytes", [SHORT, LARGE])
@pytest.mark.parametrize("kind", ["send", "recv", "any"])
def test_a_peer_dies_while_others_wait_for_it(stage: Stage, kind: str, nbytes: int) -> None:
    """Rank 0 waits for rank 1, which dies; rank 2 for rank 0."""
    with stage.group(3) as group:
        group.start()
        peer = None if kind == "any" else 1
        group[0].begin("message", "send" if kind == "send" else "recv", peer, 5, nbytes)
        group[2].begin("message", "recv", 0, 5, nbytes)
        wait_until_begun(group[0], group[2])
        time.sleep(0.1)
        since = group[1].kill()
        text = expect_error(
            group.end(), "PeerError", f"{group[1].name} died", f"{nbytes} bytes", since=since
        )
        expect_end(group, text, "PeerError")
        group.restart()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [1, 2, 5, 60])
def test_a_peer_dies_in_the_middle_of_a_message(stage: Stage, victim: int, number: int) -> None:
    """In place of its packet `number`: an announcement, an answer, data; both send."""
    faults = {"DPCOMM_FAULTS": f"rank={victim},kill={number}"}
    with stage.group(2) as group:
        group.start(environment=faults)
        for rank in group:
            rank.do("message", "recv", 1 - rank.number, 1, LARGE, async_op=True)
        for rank in group:
            rank.begin("message", "send", 1 - rank.number, 1, LARGE)
        assert group[victim].ended()
        since = time.monotonic()
        group[victim].dead = True
        survivor = group[1 - victim]
        sent = survivor.end()  # its own may be through before the victim has come so far
        survivor.begin("wait", 0)
        text = expect_error(
            [survivor.end()], "PeerError", f"{group[victim].name} died", since=since
        )
        assert (sent.error, sent.text) in ((None, ""), ("PeerError", text))


def test_what_was_sent_before_a_death_is_received(stage: Stage) -> None:
    """A sender whose last bytes are in the channel is through with them."""
    nbytes = 130_000  # as much as all slots hold
    with stage.group(2) as group:
        group.start()
        index = group[1].do("message", "recv", 0, 1, nbytes, async_op=True)
        group[0].do("message", "send", 1, 1, nbytes)
        group[1].begin("wait", index)
        group[0].kill()
        outcome = group[1].end()
        assert outcome.error is None, outcome
        assert outcome.value == 0


@pytest.mark.parametrize(("kind", "nbytes"), [("send", LARGE), ("recv", SHORT), ("any", SHORT)])
def test_a_peer_that_does_not_come(stage: Stage, kind: str, nbytes: int) -> None:
    with stage.group(3) as group:
        group.start(timeout=LIMIT)
        group.do("collective", "all_reduce", 77)
        index = group[1].do("message", "send", 0, 8, 12, async_op=True, timeout=30)
        peer = None if kind == "any" else 1
        group[0].begin("message", "send" if kind == "send" else "recv", peer, 5, nbytes)
        group[2].begin("message", "recv", 0, 4, SHORT, timeout=30)
        outcomes = group.end([group[0], group[2]])
        group[1].begin("wait", index)
        outcomes.append(group[1].end())
        what = "send of" if kind == "send" else "receive of"
        parts = [f"{what} {nbytes} bytes", "tag 5", f"not complete after {LIMIT:g} s"]
        parts += ["12 bytes with tag 8"]
        if kind != "any":
            parts += [group[1].name, "all_reduce #1 (77 x float32"]
        text = expect_error(outcomes, "TimeoutError", *parts)
        expect_in_time(outcomes, limit=LIMIT)
        expect_end(group, text, "TimeoutError")
        group.restart()


@pytest.mark.parametrize(("victim", "number"), [(0, 1), (0, 2), (0, 60), (1, 1)])
def test_a_peer_that_stops_in_the_middle(stage: Stage, victim: int, number: int) -> None:
    """A stopped rank is not dead: the time limit ends the message, also for the rank itself."""
    faults = {"DPCOMM_FAULTS": f"rank={victim},stop={number}"}
    with stage.group(2) as group:
        group.start(timeout=LIMIT, environment=faults)
        group[0].begin("message", "send", 1, 3, LARGE)
        group[1].begin("message", "recv", 0, 3, LARGE)
        assert group[victim].stopped()
        survivor = group[1 - victim].end()
        text = expect_error([survivor], "TimeoutError", f"{LARGE} bytes", group[victim].name)
        expect_in_time([survivor], limit=LIMIT)
        group[victim].signal(signal.SIGCONT)
        assert expect_error([group[victim].end()], "TimeoutError") == text
        expect_end(group, text, "TimeoutError")


def test_a_rank_that_leaves(stage: Stage) -> None:
    """Who needs it hears of it; who does not goes on."""
    with stage.group(3) as group:
        group.start()
        group[2].do("close")
        group[0].begin("message", "send", 1, 0, SHORT)
        assert group[1].do("message", "recv", None, 0, SHORT) == 0
        assert group[0].end().error is None
        since = time.monotonic()
        group[0].begin("message", "recv", 2, 0, SHORT)
        group[1].begin("message", "recv", 0, 0, SHORT)
        parts = (f"{group[2].name} has closed its communicator", "receive of 100 bytes from rank 2")
        expect_error(group.end([group[0], group[1]]), "PeerError", *parts, since=since)


@pytest.mark.parametrize("end", ["abort", "close"])
def test_an_end_from_another_thread(stage: Stage, end: str) -> None:
    with stage.group(2) as group:
        group.start()
        index = group[0].do("background", "message", "send", 1, 0, LARGE)
        other = group[1].do("background", "message", "recv", 0, 1, SHORT)
        wait_until_begun(*group)
        since = time.monotonic()
        group[0].do(end, *(["enough"] if end == "abort" else []))
        for rank, thread in ((group[0], index), (group[1], other)):
            outcome = rank.do_outcome("joined", thread)
            expect_done_since([outcome], since)
            error, text, _, _ = outcome.value
            assert error == "PeerError"
            assert f"{group[0].name} has closed its" in text if end == "close" else "enough" in text
        group.do("close")
        assert all(rank.do("leftovers")["threads"] == [] for rank in group)


def test_a_close_after_a_death(stage: Stage) -> None:
    """Who leaves with a message in flight says that its peer is dead, as a collective does."""
    with stage.group(3) as group:
        group.start(timeout=30)
        for rank in group.others(2):
            rank.do("message", "recv", 2, 7, SHORT, async_op=True)
        group[2].kill()
        assert group[2].ended()
        group.do("close")
        outcomes = group.outcomes("wait", 0)
        expect_error(outcomes, "PeerError", f"{group[2].name} died", "100 bytes from rank 2")
        assert all(rank.do("leftovers")["threads"] == [] for rank in group)


def test_ctrl_c(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start()
        group[0].begin("message", "recv", 1, 0, SHORT)
        group[1].begin("message", "recv", 0, 0, SHORT)
        wait_until_begun(*group)
        time.sleep(0.1)
        since = time.monotonic()
        group[0].signal(signal.SIGINT)
        assert group[0].end().error == "KeyboardInterrupt"
        expect_error([group[1].end()], "PeerError", "rank 0", "interrupted in recv", since=since)


def test_a_forked_child_may_not_use_messages(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start()
        group[0].do("message", "recv", 1, 0, SHORT, async_op=True)
        said = group[0].do(
            "run",
            "import os\n"
            "reader, writer = os.pipe()\n"
            "if os.fork() == 0:\n"
            "    for use in (lambda: puppet.comm.send(np.ones(1), 1), puppet.works[0]):\n"
            "        try:\n"
            "            use()\n"
            "        except Exception as error:\n"
            "            os.write(writer, (type(error).__name__ + ' ').encode())\n"
            "    os._exit(0)\n"
            "os.wait()\n"
            "result = os.read(reader, 100)\n",
        )
        assert said == b"UsageError UsageError "
        group[0].begin("wait", 0)
        group[1].do("message", "send", 0, 0, SHORT)
        assert group[0].end().error is None
