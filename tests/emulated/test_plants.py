"""Faults planted in the device kernels: each is found by the finder that has to find it.

`python tests/emulated/plants.py` prints who else does.
"""

from __future__ import annotations

import plants
import pytest
from ptx import kernels

PATHS = [
    plants.SourcePath(),
    pytest.param(
        plants.PtxPath(),
        marks=pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing() or "-"),
    ),
]
each_path = pytest.mark.parametrize("path", PATHS, ids=("source", "ptx"))


@each_path
@pytest.mark.parametrize("plant", plants.PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found(plant: plants.Plant, path: plants.AnyPath) -> None:
    assert plants.found_by(path, plant, (plant.finder,))


@each_path
def test_nothing_is_found_where_nothing_is_planted(path: plants.AnyPath) -> None:
    assert plants.found_by(path, plants.SOUND, plants.FINDERS) == {}
