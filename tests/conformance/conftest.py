"""The pools of processes, one per transport, that all tests here share."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pool import Pool

from dpcomm import _core

LARGEST_WORLD = 9


@pytest.fixture(scope="session", params=_core.transports())
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Every transport of transports.def, with as many ranks as the largest world."""
    made = Pool(request.param, LARGEST_WORLD)
    yield made
    made.close()


@pytest.fixture(scope="session")
def seed() -> int:
    """Fresh in every run; the tests tell it in each case that fails."""
    fresh = secrets.randbits(30)
    print(f"conformance seed {fresh}")
    return fresh
