"""Shapes of trees, read off the plans."""

from __future__ import annotations

import pytest

from dpcomm import schedule
from dpcomm.schedule import PlanStep, Primitive

WORLDS = [*range(2, 66), 127, 128, 129, 1000]


def tree_steps(world: int, tree: int) -> dict[int, PlanStep]:
    """The up step of every rank in one tree."""
    steps = schedule.plan("double_tree", world)
    return {s.rank: s for s in steps if s.lane == 2 * tree}


@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_is_a_leaf_in_at_most_one_tree(world: int) -> None:
    leaves = [
        {r for r, s in tree_steps(world, tree).items() if not s.recv_peers} for tree in (0, 1)
    ]
    assert not leaves[0] & leaves[1]
    if world % 2 == 0:
        assert leaves[0] | leaves[1] == set(range(world))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("tree", [0, 1])
def test_each_tree_spans_all_ranks_with_binary_nodes(world: int, tree: int) -> None:
    steps = tree_steps(world, tree)
    parents = {c: r for r, s in steps.items() for c in s.recv_peers}
    roots = [r for r, s in steps.items() if Primitive.COPY in s.primitive]
    assert len(roots) == 1
    assert set(parents) | set(roots) == set(range(world))
    assert all(len(s.recv_peers) <= 2 for s in steps.values())
    depth = max(depth_of(rank, parents) for rank in range(world))
    assert depth == (world - world % 2).bit_length() - 1 + world % 2
    assert schedule.find("double_tree").roundings(world) == depth + 1


def depth_of(rank: int, parents: dict[int, int]) -> int:
    depth = 0
    while rank in parents:
        rank = parents[rank]
        depth += 1
    return depth


@pytest.mark.parametrize("world", [2, 4, 6, 8, 16, 64])
def test_the_load_of_a_double_tree_is_even(world: int) -> None:
    """Inside one tree and a leaf in the other: two messages up and at most two down."""
    sent = dict.fromkeys(range(world), 0)
    for step in schedule.plan("double_tree", world):
        sent[step.rank] += len(step.send_peers)
    assert max(sent.values()) <= 4
    assert sum(sent.values()) == 4 * (world - 1)


@pytest.mark.parametrize("collective", ["broadcast", "reduce"])
@pytest.mark.parametrize("world", [2, 3, 7, 8, 31])
def test_rooted_trees_have_logarithmic_depth(collective: str, world: int) -> None:
    for root in {0, 1, world - 1}:
        steps = schedule.plan("tree", world, collective=collective, root=root)
        if collective == "broadcast":
            parents = {s.rank: s.recv_peers[0] for s in steps if s.recv_peers}
        else:
            parents = {s.rank: s.send_peers[0] for s in steps if s.send_peers}
        assert root not in parents
        assert max(depth_of(r, parents) for r in range(world)) == world.bit_length() - 1


@pytest.mark.parametrize("world", [2, 3, 5, 8, 13, 32])
def test_rotated_trees_use_logarithmically_many_channels(world: int) -> None:
    for collective in ("all_gather", "reduce_scatter"):
        steps = schedule.plan("tree", world, collective=collective)
        peers = {p for s in steps if s.rank == 0 for p in s.send_peers}
        assert len(peers) == (world - 1).bit_length()
