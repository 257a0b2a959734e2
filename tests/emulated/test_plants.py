"""Faults planted in the device kernels: each is found by the finder that has to find it.

`python tests/emulated/plants.py` prints who else does.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import plants
import pytest
import variants
from ptx import kernels

PATHS = [
    plants.SourcePath(),
    pytest.param(
        plants.PtxPath(),
        marks=pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing() or "-"),
    ),
]
pytestmark = pytest.mark.timeout(600)
each_path = pytest.mark.parametrize("path", PATHS, ids=("source", "ptx"))


@pytest.fixture(scope="module", autouse=True)
def built_ahead() -> Iterator[None]:
    """Compiles what the next tests need while one runs."""
    with ThreadPoolExecutor(variants.JOBS) as pool:
        for plant in plants.PLANTS:
            for path in (plants.SourcePath(), plants.PtxPath()):
                if plant.finder != "lint" and (path.name == "source" or not kernels.missing()):
                    pool.submit(path.emulation, plant, plant.finder == "threads")
        yield
        pool.shutdown(cancel_futures=True)


@each_path
@pytest.mark.parametrize("plant", plants.PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found(plant: plants.Plant, path: plants.AnyPath) -> None:
    found = plants.found_by(path, plant, (plant.finder,))
    assert plant.finder in found, found


@each_path
def test_nothing_is_found_where_nothing_is_planted(path: plants.AnyPath) -> None:
    assert plants.found_by(path, plants.SOUND, plants.FINDERS) == {}
