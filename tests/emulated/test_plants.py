"""Faults planted in the device kernels: each is found by the finder that has to find it.

`python tests/emulated/plants.py` prints who else does.
"""

from __future__ import annotations

import plants
import pytest


@pytest.mark.parametrize("plant", plants.PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found(plant: plants.Plant) -> None:
    assert plants.found_by(plants.SourcePath(), plant, (plant.finder,))


def test_nothing_is_found_where_nothing_is_planted() -> None:
    assert plants.found_by(plants.SourcePath(), None, plants.FINDERS) == {}
