"""Ranks that call different operations: UsageError names both, on every rank."""

from __future__ import annotations

import time
from typing import Any

import pytest
from ranks import Group, Stage, expect_error

Call = tuple[str, dict[str, Any]]

# What rank 0 calls, what the last rank calls, what the text has to say of the two calls.
PAIRS: dict[str, tuple[Call, Call, str, str]] = {
    "count": (
        ("all_reduce", {"count": 1000}),
        ("all_reduce", {"count": 1001}),
        "all_reduce #2 (1000 x float32, sum",
        "all_reduce #2 (1001 x float32, sum",
    ),
    "large count": (
        ("all_reduce", {"count": 2_000_000}),
        ("all_reduce", {"count": 2_000_001}),
        "(2000000 x",
        "(2000001 x",
    ),
    "dtype of the same size": (
        ("all_reduce", {"dtype": "int32"}),
        ("all_reduce", {"dtype": "float32"}),
        "1000 x int32",
        "1000 x float32",
    ),
    "op": (
        ("all_reduce", {"op": "max", "verify": False}),
        ("all_reduce", {}),
        "float32, max",
        "float32, sum",
    ),
    "collective": (
        ("all_gather", {}),
        ("all_reduce", {}),
        "all_gather #2",
        "all_reduce #2",
    ),
    "barrier": (("barrier", {}), ("all_reduce", {}), "barrier #2", "all_reduce #2"),
    "root of reduce": (
        ("reduce", {"root": 0, "count": 1_500_000}),
        ("reduce", {"root": 1, "count": 1_500_000}),
        "root 0",
        "root 1",
    ),
    "algorithm": (
        ("all_reduce", {"algorithm": "ring"}),
        ("all_reduce", {"algorithm": "double_tree"}),
        ", ring)",
        ", double_tree)",
    ),
    "wire": (
        ("all_reduce", {"count": 100_000, "wire": "fp16", "verify": False}),
        ("all_reduce", {"count": 100_000, "verify": False}),
        "wire fp16",
        "two_shot)",
    ),
    "both wait for the other as root": (
        ("broadcast", {"root": 1}),
        ("broadcast", {"root": 0}),
        "root 1",
        "root 0",
    ),
}


def expect_disagreement(group: Group, since: float, *parts: str) -> str:
    text = expect_error(group.end(), "UsageError", "ranks disagree", *parts, since=since)
    assert expect_error(group.outcomes("collective", "barrier"), "UsageError") == text
    return text


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_different_calls(stage: Stage, world: int, name: str) -> None:
    (first, first_options), (last, last_options), said_first, said_last = PAIRS[name]
    with stage.group(world) as group:
        group.start(wire_links="all")
        group.do("collective", "all_reduce", 10)
        since = time.monotonic()
        for rank in group:
            odd = rank.number == world - 1
            rank.begin(
                "collective", last if odd else first, **(last_options if odd else first_options)
            )
        outcomes = group.end()
        wrong = [outcome for outcome in outcomes if outcome.error is not None]
        assert wrong, "nobody noticed"
        text = expect_error(
            wrong,
            "UsageError",
            "ranks disagree",
            group[world - 1].name,
            said_first,
            said_last,
            since=since,
        )
        # Who was done before (a root that only sends) is told by its next call.
        again = expect_error(group.outcomes("collective", "all_reduce", 10), "UsageError")
        assert again == text
        group.do("close")
        group.restart()


@pytest.mark.parametrize("world", [2, 4])
def test_asynchronous_calls(stage: Stage, world: int) -> None:
    with stage.group(world) as group:
        group.start()
        for rank in group:
            rank.do("submit", "all_reduce", 1000)
            rank.do("submit", "all_reduce", 2000 + (rank.number == 1))
            rank.do("submit", "broadcast", 1000)
        group.do("wait", 0)
        since = time.monotonic()
        group.begin("wait", 1)
        text = expect_disagreement(
            group, since, group[1].name, "all_reduce #2 (2000 x", "all_reduce #2 (2001 x"
        )
        group.begin("wait", 2)
        assert expect_error(group.end(), "UsageError") == text


def test_one_waits_and_the_other_calls_synchronously(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start()
        group[0].do("submit", "all_reduce", 1000)
        since = time.monotonic()
        group[1].begin("collective", "all_reduce", 1000, dtype="float64")
        expect_error(
            [group[1].end()], "UsageError", "1000 x float64", "1000 x float32", since=since
        )
        group[0].begin("wait", 0)
        expect_error([group[0].end()], "UsageError", "1000 x float64", "1000 x float32")


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_rank_that_has_gone_ahead(stage: Stage, ahead: int) -> None:
    """A root may be done with several broadcasts before the others call their first operation."""
    with stage.group(3) as group:
        group.start()
        for _ in range(ahead):
            group[0].do("collective", "broadcast", 1000, root=0)
        since = time.monotonic()
        for rank in group.others(0):
            rank.begin("collective", "all_reduce", 500)
        expect_error(
            group.end(group.others(0)),
            "UsageError",
            f"{group[0].name} called broadcast #1 (1000 x float32, root 0",
            "called all_reduce #1 (500 x float32",
            since=since,
        )
        expect_error([group[0].do_outcome("collective", "barrier")], "UsageError", "broadcast #1")


def test_each_its_own_root_and_nobody_waits(stage: Stage) -> None:
    """Both broadcasts are over on the rank that called them; the next operation finds out."""
    with stage.group(2) as group:
        group.start()
        for rank in group:
            rank.do("collective", "broadcast", 1000, root=rank.number)
        since = time.monotonic()
        group.begin("collective", "all_reduce", 1000)
        expect_disagreement(
            group,
            since,
            "broadcast #1 (1000 x float32, root 0",
            "broadcast #1 (1000 x float32, root 1",
        )


def test_one_operation_more_than_the_others(stage: Stage) -> None:
    with stage.group(2) as group:
        group.start()
        group[0].begin("collective", "all_reduce", 100)
        time.sleep(0.1)
        group[1].do("close")  # it thinks that it is done
        expect_error(
            [group[0].end()], "PeerError", f"{group[1].name} has closed", "no operation yet"
        )


# What every rank calls; `mine` are the sizes that it knows of, and its buffers fit its own call.
UNEQUAL = {
    "all_gather": "puppet.comm.all_gather(ones(mine[rank]), out=ones(sum(mine)), counts=mine)",
    "gather": "puppet.comm.gather(ones(mine[rank]), 0, out=ones(sum(mine)), counts=mine)",
    "scatter": ("puppet.comm.scatter(ones(sum(mine)), last, out=ones(mine[rank]), counts=mine)"),
    "reduce_scatter": (
        "puppet.comm.reduce_scatter(ones(sum(mine)), out=ones(mine[rank]), counts=mine)"
    ),
}
ONES = "ones = lambda n: np.ones(n, np.float32)\n"


@pytest.mark.parametrize("change", [3, -3])
@pytest.mark.parametrize("name", UNEQUAL)
def test_different_sizes_of_blocks(stage: Stage, name: str, change: int) -> None:
    """Rank 1 has another size for the last rank; a sum that is the same does not hide it."""
    with stage.group(3) as group:
        group.start()
        since = time.monotonic()
        for rank in group:
            mine = [7, 0 if change > 0 else 3, 5000 + (change if rank.number == 1 else 0)]
            if rank.number == 1:
                mine[0] -= change
            source = ONES + UNEQUAL[name] + "\npuppet.comm.barrier()"
            rank.begin("run", source, mine=mine, rank=rank.number, last=2)
        expect_disagreement(
            group, since, f"{group[1].name} called {name} #1", "unequal blocks, digest"
        )


@pytest.mark.parametrize(
    ("sent", "expected"), [(5, 7), (7, 5), (0, 4), (4, 0), (500_000, 500_001), (500_001, 3)]
)
@pytest.mark.parametrize("world", [2, 4])
def test_a_pair_that_disagrees_about_its_block(
    stage: Stage, world: int, sent: int, expected: int
) -> None:
    """Rank 1 sends `sent` elements to rank 0, which expects another number. All others agree."""
    with stage.group(world) as group:
        group.start()
        since = time.monotonic()
        for rank in group:
            row, column = [2] * world, [2] * world
            if rank.number == 0:
                column[1] = expected
            if rank.number == 1:
                row[0] = sent
            source = ONES + (
                "puppet.comm.all_to_all(ones(sum(row)), counts=row, recv_counts=column)\n"
                "puppet.comm.barrier()"
            )
            rank.begin("run", source, row=row, column=column)
        expect_disagreement(
            group,
            since,
            f"{group[1].name} sends {sent} elements to {group[0].name}, which expects {expected}",
            "all_to_all #1",
        )


def test_one_rank_gives_counts_and_the_others_do_not(stage: Stage) -> None:
    """Which is no disagreement where the sizes are the same."""
    with stage.group(3) as group:
        group.start()
        for rank in group:
            sizes = [4] * 3 if rank.number == 1 else None
            source = ONES + (
                "result = puppet.comm.all_gather(ones(4), counts=sizes).size\n"
                "result += puppet.comm.all_to_all(\n"
                "    ones(12), counts=sizes, recv_counts=sizes).size\n"
            )
            rank.begin("run", source, sizes=sizes)
        assert [outcome.value for outcome in group.end()] == [24, 24, 24]


def test_a_call_that_makes_no_sense_harms_nobody(stage: Stage) -> None:
    """What one rank alone can see is raised before anything is sent."""
    with stage.group(2) as group:
        group.start()
        for options in (
            {"op": "band"},
            {"algorithm": "nonsense"},
            {"wire": "fp4"},
            {"op": "plus"},
            {"timeout": -1.0},
        ):
            outcome = group[0].do_outcome("collective", "all_reduce", 1000, **options)
            assert outcome.error == "UsageError", outcome
        for source in (
            "broadcast(np.ones(4), 2)",
            "gather(np.ones(4), -1)",
            "scatter(np.ones(4), 0, counts=[1, 2])",
            "scatter(np.ones(3), 0)",
            "scatter(None, 1)",
            "all_to_all(np.ones(3))",
            "all_to_all(np.ones(4), counts=[3, 1])",
            "all_to_all(np.ones(4), counts=[3, 1], recv_counts=[2, 2], out=np.ones(4))",
            "all_to_all(np.ones(4), recv_counts=[3, 1])",
            "all_gather(np.ones(4), counts=[4, 1, 1])",
            "all_gather(np.ones(4), counts=[3, 4])",
            "all_gather(np.ones(0), counts=[2**62, 2**62], out=np.ones(1))",
            "reduce_scatter(np.ones(4), counts=[-1, 5])",
            "reduce_scatter(np.ones(4), counts=[])",
        ):
            outcome = group[0].do_outcome("run", f"puppet.comm.{source}")
            assert outcome.error == "UsageError", (source, outcome)
        group.do("collective", "all_reduce", 1000)
