"""Fixtures of the failure tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import ranks


@pytest.fixture(scope="session")
def stage() -> Iterator[ranks.Stage]:
    """Makes groups of processes that play ranks."""
    stage = ranks.Stage()
    yield stage
    stage.close()


@pytest.fixture(autouse=True)
def nothing_in_shm() -> Iterator[None]:
    """No segment remains in /dev/shm, whatever happened."""
    before = ranks.named_segments()
    yield
    assert ranks.named_segments() <= before


def summary() -> list[str]:
    times = sorted(ranks.TIMES)
    if not times:
        return []
    return [
        f"failures: {len(times)} times all survivors raised, after "
        f"{times[len(times) // 2][0]:.2f} s in the middle and {times[-1][0]:.2f} s at most "
        f"({times[-1][1]})"
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # this is one of several workers
    if output is not None:
        output.setdefault("lines", []).extend(summary())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in summary():
        terminalreporter.write_line(line)
