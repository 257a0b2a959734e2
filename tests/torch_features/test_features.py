"""What torch builds on process groups, on dpcomm as on gloo, on two ranks and on four."""

from __future__ import annotations

import calls
import checkpoints
import meshes
import pipelines
import pytest
import training
from both import report, run
from harness import launch

TWO = [*training.CHECKS, *pipelines.TWO]
FOUR = [*calls.CHECKS, *meshes.CHECKS, *pipelines.FOUR, *checkpoints.CHECKS]


def on_two(rank: int, world: int) -> dict[str, str]:
    return run(TWO)


def on_four(rank: int, world: int) -> dict[str, str]:
    return run(FOUR)


@pytest.fixture(scope="module")
def two() -> list[dict[str, str]]:
    return launch(on_two, 2).results


@pytest.fixture(scope="module")
def four() -> list[dict[str, str]]:
    return launch(on_four, 4).results


@pytest.mark.parametrize("check", [check.__name__ for check in TWO])
def test_two_ranks(check: str, two: list[dict[str, str]]) -> None:
    report(two, check)


@pytest.mark.parametrize("check", [check.__name__ for check in FOUR])
def test_four_ranks(check: str, four: list[dict[str, str]]) -> None:
    report(four, check)
