"""Messages that are damaged, lost or late: an error or a timeout, never a wrong result."""

from __future__ import annotations

import pytest
from ranks import Group, Stage

LIMIT = 1.0
LARGE = 1_500_000
COLLECTIVES = ["all_reduce", "broadcast", "reduce", "all_gather", "reduce_scatter"]
COLLECTIVES += ["gather", "scatter", "all_to_all"]
WHOLE = ("broadcast", "reduce")  # of the others ranks have blocks


def run_with(
    stage: Stage, world: int, faults: str, collective: str, count: int, path: str = "channels"
) -> set[str]:
    """Runs a collective some times; puppets compare what they got. The errors that came up."""
    errors: set[str] = set()
    with stage.group(world) as group:
        group.start(timeout=LIMIT, environment={"DPCOMM_FAULTS": faults, "DPCOMM_PATH": path})
        for _ in range(3):
            for outcome in group.outcomes("collective", collective, count):
                assert outcome.error != "AssertionError", outcome
                if outcome.error is not None:
                    errors.add(f"{outcome.error}: {outcome.text}")
    return errors


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("fault", ["retag", "shorten", "drop"])
def test_one_bad_message(stage: Stage, collective: str, fault: str) -> None:
    said = {
        "retag": ("InternalError", "damaged message"),
        "shorten": ("InternalError", "bytes from"),
        "drop": ("", ""),  # either the next message is seen to be in its place, or time runs out
    }[fault]
    if (fault, collective) == ("retag", "all_to_all"):
        # The tag has the number of elements in it: the message may look like one of another size.
        said = ("", "")
    sender = 0 if collective in ("broadcast", "scatter") else 1
    for number, count in ((1, 1000), (4, LARGE // (2 if collective not in WHOLE else 1))):
        errors = run_with(stage, 2, f"rank={sender},{fault}={number}", collective, count)
        assert len(errors) == 1, errors  # one text, on all ranks, in all later calls
        assert errors.pop().startswith(said[0] or ("TimeoutError", "UsageError", "InternalError"))


@pytest.mark.parametrize("count", [2, 1000, 30_000, LARGE])
@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
@pytest.mark.parametrize("fault", ["retag", "drop"])
def test_one_bad_arrival(stage: Stage, collective: str, fault: str, count: int) -> None:
    """On the board: another operation's tag, or nothing where the others wait for something."""
    said = {"retag": ("InternalError", "met another operation"), "drop": ("TimeoutError", "")}
    errors = run_with(stage, 2, f"rank=1,{fault}=1", collective, count, "auto")
    assert len(errors) == 1, errors
    error = errors.pop()
    assert error.startswith(said[fault][0])
    assert said[fault][1] in error


@pytest.mark.parametrize("number", [2, 3])
def test_a_stage_that_is_not_announced(stage: Stage, number: int) -> None:
    """Of a single copy: what is reduced, what has been read."""
    errors = run_with(stage, 3, f"rank=1,drop={number}", "all_reduce", LARGE, "auto")
    assert len(errors) == 1, errors
    assert errors.pop().startswith("TimeoutError")


def test_every_rank_loses_a_message(stage: Stage) -> None:
    errors = run_with(stage, 4, "drop=5", "all_reduce", LARGE)
    assert len(errors) == 1
    assert errors.pop().startswith(("TimeoutError", "UsageError", "InternalError"))


def test_late_and_stalled_messages_are_no_failure(stage: Stage) -> None:
    for faults in ("delay_us=300", "stall=0.5", "rank=1,delay_us=2000", "rank=0,stall=0.9"):
        for path in ("auto", "channels"):
            with stage.group(3) as group:
                variables = {"DPCOMM_FAULTS": faults, "DPCOMM_PATH": path}
                group.start(timeout=30, environment=variables)
                for collective in COLLECTIVES:
                    group.do("collective", collective, 30_000)


@pytest.mark.parametrize("end", ["timeout", "abort"])
def test_nothing_is_published_after_an_aborted_wait(stage: Stage, end: str) -> None:
    """Rank 0 has sent its part and waits; slots are free when its wait ends."""
    with stage.group(2) as group:
        group.start(timeout=LIMIT if end == "timeout" else 20)
        group.do("collective", "barrier")
        before = digest_of_channels(group)
        group[0].begin("collective", "all_reduce", 1000)
        if end == "abort":
            group[1].do("run", "import time; time.sleep(0.3)")
            group[1].do("abort", "enough")
        error = group[0].end().error
        assert error == ("TimeoutError" if end == "timeout" else "PeerError")
        stuck = digest_of_channels(group)
        assert stuck != before  # the digest does see a message
        for rank in group:
            for collective in ("all_reduce", "broadcast", "barrier"):
                assert rank.do_outcome("collective", collective, 1000).error == error
            assert rank.do_outcome("wait", rank.do("submit", "all_reduce", 1000)).error == error
        assert digest_of_channels(group) == stuck


def digest_of_channels(group: Group) -> str:
    """A digest of the shared memory but its beginning, where ranks speak of themselves."""
    source = (
        "import hashlib\n"
        "line = puppet.maps().splitlines()[0]\n"
        "first, last = (int(part, 16) for part in line.split()[0].split('-'))\n"
        "with open('/proc/self/mem', 'rb', 0) as memory:\n"
        "    memory.seek(first + skipped)\n"
        "    result = hashlib.sha256(memory.read(last - first - skipped)).hexdigest()"
    )
    digest: str = group[1].do("run", source, skipped=40 << 10)
    return digest
