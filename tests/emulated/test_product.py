"""The campaign: every kernel x wire x dtype x op x world x channels x slots x size, on both paths.

About 320,000 cases for each path, an hour and a half of a core. DPCOMM_PRODUCT_SHARE=2/8 runs
the second of eight shares, so that a campaign can be spread over machines or days.
"""

from __future__ import annotations

import itertools
import os
import secrets

import pytest
import rows
import variants
from emulate import CAMPAIGN_DEADLINE_S, Emulation, check
from ptx import kernels

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(24 * 3600)]

BATCH = 500


def share() -> tuple[int, int]:
    """(which, of how many); which counts from 1."""
    which, _, of = os.environ.get("DPCOMM_PRODUCT_SHARE", "1/1").partition("/")
    if not 1 <= int(which) <= int(of):
        raise ValueError(f"DPCOMM_PRODUCT_SHARE is {which}/{of}; 1/8 is the first of eight")
    return int(which), int(of)


@pytest.fixture(scope="module", params=["source", *(f"sm_{arch}" for arch in kernels.ARCHS)])
def path(request: pytest.FixtureRequest) -> Emulation:
    """All kernels, as g++ compiles them or by way of PTX."""
    if request.param == "source":
        return Emulation(variants.source_path())
    if kernels.missing():
        pytest.skip(kernels.missing())
    return Emulation(kernels.ptx_path(request.param.removeprefix("sm_"), kernels.all_kernels()))


@pytest.mark.parametrize("kernel", rows.KERNELS, ids=lambda kernel: "-".join(map(str, kernel)))
def test_the_whole_product(path: Emulation, kernel: tuple[str, str, bool]) -> None:
    seed = secrets.randbits(32)
    which, of = share()
    print(f"seed {seed}, share {which}/{of}")
    cases = itertools.islice(rows.everything(kernel, seed), which - 1, None, of)
    while batch := list(itertools.islice(cases, BATCH)):
        check(path, batch, CAMPAIGN_DEADLINE_S)
