"""Properties of the lossy wire formats on drawn data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpcomm.oracle import wire as oracle

LOSSY = ["fp16", "bf16", "int8"]
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 127, 128, 129, 511, 512, 513, 1024, 1025]), st.integers(0, 1700)
)
PATTERNS = st.lists(st.integers(0, 2**32 - 1), max_size=40).map(
    lambda bits: np.array(bits, np.uint32).view(np.float32)
)


@st.composite
def finite_arrays(draw, least=-149, largest=127):
    """Finite floats: a centre exponent for all, a spread, and some zeros of both signs."""
    n = draw(LENGTHS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    centre, spread = draw(st.integers(least, largest)), draw(st.sampled_from([0, 3, 12, 30, 60]))
    exponents = np.clip(rng.integers(-spread, spread + 1, n) + centre, least, largest)
    magnitude = np.ldexp(rng.uniform(1, 2, n), exponents)
    with np.errstate(over="ignore"):
        values = (magnitude * rng.choice([-1, 1], n)).astype(np.float32)
    values[rng.random(n) < draw(st.sampled_from([0.0, 0.1, 0.95]))] *= 0
    return np.where(np.isfinite(values), values, np.float32(1))


def blocks_of(wire, values):
    block = oracle.BLOCK_ELEMS[wire] if wire != "bf16" else max(values.size, 1)
    for first in range(0, values.size, block):
        yield slice(first, first + block)


@pytest.mark.parametrize("wire", LOSSY)
@given(acc=PATTERNS)
def test_bits_equal_the_oracle(kernels, same_bits, wire, acc):
    data = kernels.encode(wire, "float32", acc)
    same_bits(data, oracle.encode(wire, "float32", acc))
    same_bits(
        kernels.decode(wire, "float32", data, acc.size),
        oracle.decode(wire, "float32", data, acc.size),
    )


@pytest.mark.parametrize("wire", LOSSY)
@given(acc=finite_arrays())
def test_keep_is_what_a_reader_decodes(kernels, same_bits, wire, acc):
    data = kernels.encode(wire, "float32", acc)
    same_bits(kernels.keep(wire, "float32", acc), kernels.decode(wire, "float32", data, acc.size))


@pytest.mark.parametrize("wire", LOSSY)
@given(acc=finite_arrays())
def test_a_second_round_trip_changes_nothing(kernels, same_bits, wire, acc):
    once = kernels.keep(wire, "float32", acc)
    same_bits(kernels.keep(wire, "float32", once), once)


@pytest.mark.parametrize("wire", LOSSY)
@given(acc=finite_arrays())
def test_error_of_one_rounding(kernels, wire, acc):
    got = kernels.keep(wire, "float32", acc)
    exact = acc.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - exact)
    if wire == "bf16":
        rounds_to_infinity = np.abs(exact) >= (1 - 2.0**-9) * 2.0**128
        assert (np.isinf(got) == rounds_to_infinity).all()
        limit = np.maximum(UNIT[wire] * np.abs(exact), 2.0**-134)
        assert (error <= limit)[~rounds_to_infinity].all()
        return
    assert np.isfinite(got).all()
    for part in blocks_of(wire, acc):
        largest = np.abs(exact[part]).max(initial=0.0)
        if wire == "fp16":
            smallest = 2.0 ** (max(int(np.frexp(largest * (1 + 2.0**-12))[1]) - 1, -112) - 38)
            limit = np.maximum(UNIT[wire] * np.abs(exact[part]), smallest / 2)
        else:
            limit = np.maximum(largest / 127, 2.0**-127)
        assert (error[part] <= limit).all()


@pytest.mark.parametrize("wire", LOSSY)
@given(acc=finite_arrays(), k=st.integers(-250, 250))
def test_powers_of_two_commute(kernels, same_bits, wire, acc, k):
    exact = acc.astype(np.float64)
    nonzero = np.abs(exact[exact != 0])
    # Into range, so that no drawn case is thrown away: neither end may leave fp32's numbers.
    least = {"fp16": -149, "bf16": -126, "int8": -149}[wire]
    floor = {"fp16": -149, "bf16": -126, "int8": -120}[wire]
    lowest = int(np.frexp(nonzero.min(initial=1.0))[1]) - 1
    highest = int(np.frexp(nonzero.max(initial=1.0))[1]) - 1
    k = min(max(k, least - lowest), 126 - highest)
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.ldexp(exact, k).astype(np.float32)
    survives = (np.ldexp(scaled.astype(np.float64), -k) == exact) & (np.abs(exact) < 2.0**127)
    for part in blocks_of(wire, acc):
        tops = [np.abs(v[part].astype(np.float64)).max(initial=0.0) for v in (acc, scaled)]
        in_range = all(top == 0 or top >= 2.0**floor for top in tops)
        if wire == "bf16":
            in_range = lowest >= -126
        if not (survives[part].all() and in_range):
            continue
        once = kernels.keep(wire, "float32", acc[part]).astype(np.float64)
        twice = kernels.keep(wire, "float32", scaled[part])
        same_bits(twice, np.ldexp(once, k).astype(np.float32))


@pytest.mark.parametrize("wire", LOSSY)
@given(acc=finite_arrays(), seed=st.integers(0, 2**32))
def test_non_finite_stays_at_its_element(kernels, same_bits, wire, acc, seed):
    """Law 7, and the finite neighbours decode as if it was not there."""
    rng = np.random.default_rng(seed)
    n = acc.size
    at = rng.random(n) < 0.1
    dirty = acc.copy()
    dirty[at] = rng.choice(np.array([np.inf, -np.inf, np.nan], np.float32), at.sum())
    clean = np.where(at, np.float32(0), acc)
    got, want = kernels.keep(wire, "float32", dirty), kernels.keep(wire, "float32", clean)
    same_bits(got[~at], want[~at])
    assert not np.isfinite(got[at]).any()
    if wire == "int8":
        assert np.isnan(got[at]).all()
    else:
        same_bits(got[at], oracle.store("float32", dirty[at]))


@pytest.mark.parametrize("wire", ["native", *LOSSY])
@given(acc=PATTERNS, seed=st.integers(0, 2**32))
def test_non_finite_survives_a_sum(kernels, wire, acc, seed):
    other = np.random.default_rng(seed).standard_normal(acc.size).astype(np.float32)
    for a, b in ((acc, other), (other, acc)):
        total = kernels.combine(
            wire, "float32", "sum", a.copy(), kernels.encode(wire, "float32", b)
        )
        stored = kernels.keep(wire, "float32", total)
        assert not np.isfinite(stored[~np.isfinite(acc)]).any()


@pytest.mark.parametrize("wire", LOSSY)
def test_zeros_keep_what_they_can_of_their_sign(kernels, same_bits, wire):
    acc = np.array([0.0, -0.0] * 700, np.float32)
    got = kernels.keep(wire, "float32", acc)
    same_bits(got, acc if wire != "int8" else np.abs(acc))


def test_fp16_keeps_denormals_of_fp32(kernels, same_bits):
    """A block of nothing but denormals is rounded to 11 bits like any other."""
    bits = np.arange(1, 1 << 11, dtype=np.uint32)
    for shift in range(12):
        acc = (bits << shift).view(np.float32)
        same_bits(kernels.keep("fp16", "float32", acc), acc)
    acc = np.array([0x7FFFFF, 0x7FFFFE, 0x1001, 0x801, 3], np.uint32).view(np.float32)
    want = np.array([0x800000, 0x800000, 0x1000, 0x800, 3], np.uint32).view(np.float32)
    same_bits(kernels.keep("fp16", "float32", acc), want)


def test_fp16_encodes_alike_after_a_largest_that_rounds_up(kernels, same_bits):
    """The largest rounds to the next power of two; the scale must not move in the next hop."""
    small = np.ldexp(np.arange(1.0, 512.0), -39)
    acc = np.append(small, 2 - 2.0**-12).astype(np.float32)
    once = kernels.keep("fp16", "float32", acc)
    assert once[-1] == 2
    same_bits(kernels.keep("fp16", "float32", once), once)


def test_fp16_keeps_28_binades_below_the_largest(kernels, same_bits):
    acc = np.ldexp(1 + 2.0**-10, np.arange(-28, 1)).astype(np.float32)
    same_bits(kernels.keep("fp16", "float32", acc), acc)


@pytest.mark.parametrize("wire", ["fp16", "int8"])
def test_the_largest_floats_stay_finite(kernels, wire):
    bits = np.arange(0x7F7FFFFF - 0x30000, 0x7F800000, 37, dtype=np.uint32)
    bits[-1] = 0x7F7FFFFF
    acc = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    got = kernels.keep(wire, "float32", acc)
    assert np.isfinite(got).all()
    limit = 2.0**-11 if wire == "fp16" else 1 / 127
    assert (np.abs(got.astype(np.float64) / acc - 1) <= limit).all()


@pytest.mark.parametrize("wire", ["fp16", "int8"])
def test_blocks_do_not_see_each_other(kernels, same_bits, wire):
    block = oracle.BLOCK_ELEMS[wire]
    rng = np.random.default_rng()
    parts = [(rng.standard_normal(block) * s).astype(np.float32) for s in (1e-30, 1e30, 1.0)]
    parts.append(parts[2][:5])
    got = kernels.keep(wire, "float32", np.concatenate(parts))
    want = np.concatenate([kernels.keep(wire, "float32", part) for part in parts])
    same_bits(got, want)
