"""The kernels as nvcc emits them: PTX, translated to C++ (ptx/), gives the oracle's bits, no race,
and touches what the kernels do that g++ compiles.

In every run: all kernels for sm_90; for sm_80, sm_100 and sm_120 five that differ most (fp32
native, which every case needs, and fp16 with its blocks, both by slots and by packets, and exact
copies); and those for sm_90 under ThreadSanitizer. The campaign has all kernels for all of them,
plain and under ThreadSanitizer (the product of all choices is in test_product.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import pytest
import rows
from emulate import CAMPAIGN_DEADLINE_S, Case, Emulation, Operation, check, problems
from ptx import kernels

WHOLE = "90"
OTHERS = tuple(arch for arch in kernels.ARCHS if arch != WHOLE)
RANDOM_CASES = 60

needs_nvcc = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing() or "-")
pytestmark = [needs_nvcc, pytest.mark.slow, pytest.mark.timeout(900)]


def built(arch: str, names: Sequence[str], thread_sanitizer: bool = False) -> Emulation:
    return Emulation(kernels.ptx_path(arch, names, thread_sanitizer), thread_sanitizer)


def some(names: Sequence[str], count: int, seed: int) -> list[Case]:
    """Random cases that these kernels can run."""
    drawn = rows.drawn(count * 12, seed, wire=("native", "fp16"), dtype=("float32", "uint8"))
    return [case for case in drawn if kernels.served(case, names)][:count]


def for_threads(names: Sequence[str], each: int, seed: int) -> list[Case]:
    """Small cases, some for every schedule and for packets."""
    wires = {name.rsplit("_", 1)[1] for name in names}
    cases: list[Case] = []
    for number, kernel in enumerate(rows.KERNELS):
        drawn = rows.drawn(
            each * 200, seed + number, **rows.FOR_THREADS, kernel=kernel, wire=tuple(sorted(wires))
        )
        cases += [case for case in drawn if kernels.served(case, names)][:each]
    return cases


@pytest.fixture(scope="module")
def whole() -> Emulation:
    return built(WHOLE, kernels.all_kernels())


def test_every_pair_of_choices_gives_the_bits_of_the_oracle(whole: Emulation) -> None:
    check(whole, rows.covering())


def test_random_cases_give_the_bits_of_the_oracle(whole: Emulation) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    check(whole, rows.drawn(RANDOM_CASES, seed))


@pytest.mark.parametrize("arch", OTHERS)
def test_other_architectures_give_the_bits_of_the_oracle(arch: str) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    cases = some(kernels.FEW, RANDOM_CASES, seed)
    assert len(cases) == RANDOM_CASES
    check(built(arch, kernels.FEW), cases)


def test_there_is_no_race() -> None:
    cases = for_threads(kernels.FEW, 1, 7)
    assert len(cases) == len(rows.KERNELS)
    check(built(WHOLE, kernels.FEW, thread_sanitizer=True), cases)


# What has to be alike; polls depend on the turns that were drawn.
SAME = ("fences", "acquires", "flag_stores", "packet_stores")


def counted(emulation: Emulation, case: Case) -> list[dict[str, int]]:
    (result,) = emulation.run([case])
    assert not problems(case, result)
    return result.counts()


@pytest.mark.parametrize(
    "operation",
    [
        Operation("all_reduce", "ring", wire="fp16", count=40_000, ctas=2),
        Operation("all_reduce", "two_shot", wire="int8", count=40_000, ctas=2),
        Operation("all_reduce", "double_tree", "bfloat16", count=40_000, ctas=2),
        Operation("all_reduce", "one_shot", wire="fp16", count=3000),
        Operation("all_gather", "direct", "int32", count=5001),
    ],
    ids=lambda o: f"{o.collective}-{o.algorithm}-{o.dtype}-{o.wire}",
)
def test_ptx_touches_what_the_sources_touch(
    whole: Emulation, source: Emulation, operation: Operation
) -> None:
    """Bytes of tensors and staging, by owner; fences, acquires and flags."""
    case = Case(
        world=4, operations=(operation,), ctas=2, slots=4, slot_bytes=4112, packets=4096, count=True
    )
    for by_ptx, by_source in zip(counted(whole, case), counted(source, case), strict=True):
        moved = {key for key in by_source if key.endswith("_bytes") and "state" not in key}
        assert "tensor_read_bytes" in moved
        for key in (*SAME, *sorted(moved)):
            assert by_ptx.get(key) == by_source[key], key


# --- campaign ------------------------------------------------------------------------------------
@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("arch", kernels.ARCHS)
def test_all_kernels(arch: str) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    emulation = built(arch, kernels.all_kernels())
    check(emulation, rows.covering(), CAMPAIGN_DEADLINE_S)
    for number in range(20):
        check(emulation, rows.drawn(500, seed + number), CAMPAIGN_DEADLINE_S)


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
@pytest.mark.parametrize("arch", kernels.ARCHS)
def test_no_race_in_any_kernel(arch: str) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    names = kernels.all_kernels()
    check(
        built(arch, names, thread_sanitizer=True), for_threads(names, 10, seed), CAMPAIGN_DEADLINE_S
    )
