"""Pictures of schedules: one for every algorithm, in the order of cause and effect."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpcomm import schedule
from dpcomm.schedule import drawing

pytest.importorskip("matplotlib")

ALGORITHMS = schedule.algorithms()
IDS = [f"{a.collective}-{a.name}" for a in ALGORITHMS]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
@pytest.mark.parametrize("world", [1, 4, 8])
def test_messages_go_down_in_time(algorithm: schedule.Algorithm, world: int) -> None:
    steps = schedule.plan(algorithm.name, world, collective=algorithm.collective, slices=2)
    placed, messages = drawing._schedule(steps)
    assert len(placed) == len(steps)
    assert len(messages) == sum(len(s.send_peers) for s in steps)
    assert all(m.receiver.time > m.sender.time for m in messages)
    times = [(p.step.rank, p.step.lane, p.time) for p in placed]
    assert len(set(times)) == len(times)


@pytest.mark.parametrize(
    ("collective", "algorithm", "end"),
    [
        ("all_reduce", "ring", 15),
        ("all_reduce", "two_shot", 15),
        ("all_reduce", "one_shot", 2),
        ("all_reduce", "double_tree", 7),
        ("broadcast", "tree", 4),
        ("reduce_scatter", "tree", 8),
    ],
)
def test_the_picture_has_as_many_rows_as_the_algorithm_has_steps(
    collective: str, algorithm: str, end: int
) -> None:
    placed, _ = drawing._schedule(schedule.plan(algorithm, 8, collective=collective))
    assert max(p.time for p in placed) + 1 == end


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"picture.{ending}"
    schedule.draw("double_tree", 4, path, slices=2)
    data = path.read_bytes()
    assert len(data) > 5000
    assert (b"PNG" if ending == "png" else b"<svg") in data[:1000]
