"""Lives of communicators in one process: nothing remains, and nothing that ends badly hangs."""

from __future__ import annotations

import time

import pytest
from ranks import PATIENCE_S, Stage, expect_done_since, expect_error

LARGE = 1_500_000


def test_fifty_lives_leave_nothing(stage: Stage) -> None:
    with stage.group(2) as group:
        lives: list[list[dict[str, int]]] = []
        for life in range(50):
            group.start(timeout=10)
            group.do("collective", "all_reduce", 20_000)
            if life % 2:
                group.do("submit", "all_reduce", 20_000)  # with a progress thread
                group.do("wait", 0)
            group.do("close")
            group.do("forget")
            lives.append([rank.do("leftovers") for rank in group])
        for rank in range(2):
            early, late = lives[5][rank], lives[-1][rank]
            assert late["threads"] == []
            assert late["fds"] == early["fds"]
            assert late["maps"] == lives[0][rank]["maps"]
            assert late["rss_kib"] < early["rss_kib"] + 4096


def test_fifty_failures_leave_nothing(stage: Stage) -> None:
    with stage.group(2) as group:
        lives: list[dict[str, int]] = []
        for life in range(50):
            group.start(timeout=10)
            group[0].do("submit", "all_reduce", 20_000)
            if life % 3 == 0:
                group[1].do("abort", "again")
            elif life % 3 == 1:
                group[1].do("close")
            else:
                group[1].begin("collective", "barrier")
                assert group[1].end().error == "UsageError"
            assert group[0].do_outcome("wait", 0).error in ("PeerError", "UsageError")
            group.do("close")
            group.do("forget")
            lives.append(group[0].do("leftovers"))
        assert lives[-1]["threads"] == []
        assert lives[-1]["fds"] == lives[5]["fds"]
        assert lives[-1]["maps"] == lives[0]["maps"]
        assert lives[-1]["rss_kib"] < lives[5]["rss_kib"] + 4096


def test_the_name_is_enough_for_several_at_once(stage: Stage) -> None:
    """The failure of one communicator does not touch another one of the same processes."""
    with stage.group(2) as group:
        group.start(timeout=10)
        source = (
            "other = dpcomm.Communicator(rank, 2, init, name='other', timeout=10)\n"
            "puppet.other = other"
        )
        init = group.init()
        for rank in group:
            rank.begin("run", source, rank=rank.number, init=init)
        for outcome in group.end():
            assert outcome.error is None, outcome
        group[1].do("abort", "only this one")
        assert group[0].do_outcome("collective", "barrier").error == "PeerError"
        group.do("run", "x = np.ones(9); puppet.other.all_reduce(x); assert x[0] == 2")
        group.do("run", "puppet.other.close()")


@pytest.mark.parametrize("world", [2, 4])
def test_abort_ends_every_wait(stage: Stage, world: int) -> None:
    """In any number of threads, from another thread or a rank that does not wait: blocking calls,
    waits for collectives of which one runs, and for messages that nobody sends."""
    for aborter in (0, world - 1):
        with stage.group(world) as group:
            group.start(timeout=30)
            waiting = group.others(world - 1)  # the last rank never calls
            for rank in waiting:
                for _ in range(2):
                    rank.do("submit", "all_reduce", LARGE)
                rank.do("message", "recv", world - 1, 5, 100, async_op=True)
                for index in (0, 0, 1, 2):
                    rank.do("background", "wait", index)
                rank.do("background", "collective", "all_reduce", LARGE)
                rank.do("background", "message", "recv", world - 1, 6, 100)
            time.sleep(0.2)
            since = time.monotonic()
            group[aborter].do("abort", "enough")
            texts = set()
            for rank in waiting:
                outcomes = [rank.do_outcome("joined", thread) for thread in range(6)]
                expect_done_since(outcomes, since)
                for outcome in outcomes:
                    error, text, _, _ = outcome.value
                    assert error == "PeerError"
                    texts.add(text)
            assert texts == {f"rank {aborter}: enough"}
            expect_error(group.outcomes("collective", "barrier"), "PeerError", "enough")
            group.do("close")
            group.restart()


def test_close_while_another_thread_waits(stage: Stage) -> None:
    with stage.group(3) as group:
        group.start(timeout=30)
        group[0].do("background", "collective", "all_reduce", LARGE)
        group[1].begin("collective", "all_reduce", LARGE)
        time.sleep(0.2)
        since = time.monotonic()
        group[0].do("close")
        error, text, _, _ = group[0].do("joined", 0)
        assert error == "PeerError"
        said = f"{group[0].name} has closed its communicator with all_reduce #1 ({LARGE} x float32"
        assert expect_error([group[1].end()], "PeerError", said, "in flight", since=since) == text


def test_close_with_operations_in_flight(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start(timeout=30)
        for _ in range(5):
            group[0].do("submit", "all_reduce", LARGE)
        since = time.monotonic()
        group[0].do("close")
        outcomes = [group[0].do_outcome("wait", index) for index in range(5)]
        expect_done_since(outcomes, since)
        outcomes.append(group[1].do_outcome("collective", "all_reduce", LARGE))
        expect_error(outcomes, "PeerError", f"{group[0].name} has closed its communicator with all")
        assert group[0].do("leftovers")["threads"] == []


@pytest.mark.parametrize("world", [2, 4])
def test_all_close_after_a_death(stage: Stage, world: int) -> None:
    """Before anybody looked for the dead: every operation in flight, running or queued, on every
    rank still ends with the text that names the dead rank."""
    for victim in (0, world - 1):
        with stage.group(world) as group:
            group.start(timeout=30)
            group[victim].kill()
            assert group[victim].ended()
            source = (
                "works = [puppet.comm.all_reduce(np.ones(9), async_op=True) for _ in range(3)]\n"
                "puppet.works = [work.wait for work in works]\n"
                "puppet.comm.close()"
            )
            group.do("run", source)
            outcomes = [rank.do_outcome("wait", index) for rank in group for index in range(3)]
            said = f"{group[victim].name} died (no operation yet); noticed by"
            text = expect_error(outcomes, "PeerError", said, "all_reduce #1 (9 x float64")
            assert f"{group[victim].name}: did not arrive, died; no operation yet" in text


def test_a_handle_that_is_dropped(stage: Stage) -> None:
    """Its operation goes on, with the arrays that it needs; nobody waits for it."""
    with stage.group(2) as group:
        group.start(timeout=30)
        source = (
            "import gc, weakref\n"
            "class Array(np.ndarray): pass\n"
            "def submit():\n"
            "    array = np.ones(100_000, 'float32').view(Array)\n"
            "    puppet.comm.all_reduce(array, async_op=True)\n"
            "    return weakref.ref(array)\n"
            "puppet.arrays = [submit() for _ in range(3)]\n"
            "gc.collect()\n"
            "result = sum(ref() is not None for ref in puppet.arrays)"
        )
        assert group[0].do("run", source) == 3
        group[1].do("run", source)
        group.do("collective", "all_reduce", 1000)
        group.do("submit", "all_reduce", 1000)
        group.do("wait", 0)
        alive = "result = sum(ref() is not None for ref in puppet.arrays)"
        assert group[0].do("run", alive) == 0
        group[0].do("run", source)  # in flight at the end
        group[0].do("close")
        group[0].do("forget")
        assert group[0].do("run", alive) == 0


def test_use_after_close(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start(timeout=10)
        group.do("collective", "barrier")
        group.do("close")
        group.do("close")
        for command in ("collective", "submit"):
            expect_error(group.outcomes(command, "all_reduce", 10), "UsageError", "closed")
        group.do("abort", "nobody is there")
        group.do("close")
        group.restart()


def test_a_closed_communicator_disturbs_nobody(stage: Stage) -> None:
    """What a rank does after close() does not reach those still in their last operation."""
    with stage.group(2) as group:
        group.start(timeout=10)
        group[0].do("collective", "broadcast", 1000, root=0)  # done; rank 1 has not even called
        group[0].do("close")
        group[0].do("abort", "too late")
        group[1].do("collective", "broadcast", 1000, root=0)


EXITS = {
    "after synchronous calls": "",
    "with a progress thread": "puppet.comm.all_reduce(np.ones(10, 'f4'), async_op=True).wait()",
    "with an operation in flight": "puppet.comm.all_reduce(np.ones(10, 'f4'), async_op=True)",
    "with a thread in an operation": (
        "import threading\n"
        "def call():\n"
        "    try:\n"
        "        puppet.comm.all_reduce(np.ones(10, 'float32'))\n"
        "    except dpcomm.PeerError: pass\n"
        "threading.Thread(target=call, daemon=True).start()\n"
        "import time; time.sleep(0.1)"
    ),
}


@pytest.mark.parametrize("state", EXITS)
@pytest.mark.parametrize("held", ["by a global", "by a cycle"])
def test_the_interpreter_ends_without_close(stage: Stage, state: str, held: str) -> None:
    with stage.group(2) as group:
        group.start(timeout=60)
        shared = state == "with a progress thread"
        group.do("collective", "all_reduce", 10)
        keep = (
            "import builtins; builtins.kept = puppet"
            if held == "by a global"
            else ("loop = [puppet]; loop.append(loop)")
        )
        group[0].do("run", keep)
        for rank in group if shared else [group[0]]:
            rank.begin("run", EXITS[state])
        for outcome in group.end(None if shared else [group[0]]):
            assert outcome.error is None, outcome
        group[0].begin("interpreter_exit")
        assert group[0].ended(PATIENCE_S / 5), "the interpreter hangs"
        assert group[0].exit_signal() == 0, "the interpreter crashed"
        group[0].dead = True
        # What rank 0 had begun may still be completed with what it had sent, but nothing else.
        group[1].do_outcome("collective", "all_reduce", 10, verify=False)
        outcome = group[1].do_outcome("collective", "all_reduce", 10)
        expect_error([outcome], "PeerError", f"{group[0].name} has closed its communicator")
