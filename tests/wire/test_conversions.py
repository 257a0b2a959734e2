"""Conversions to and from 16 bits: every pattern, every midpoint."""

from __future__ import annotations

import numpy as np
import pytest

from dpcomm.oracle import wire as oracle

ALL = np.arange(1 << 16, dtype=np.uint16)


def neighbourhoods(dtype):
    """Every value of a 16-bit dtype, every midpoint to the next, one ulp around; both signs."""
    infinity, beyond = (0x7C00, 2.0**16) if dtype == "float16" else (0x7F80, 2.0**128)
    finite = oracle.load(dtype, ALL[:infinity].view(oracle.tensor_dtype(dtype))).astype(np.float64)
    midpoints = (finite + np.append(finite[1:], beyond)) / 2
    centres = np.concatenate([finite, midpoints]).astype(np.float32)
    assert (centres.astype(np.float64) == np.concatenate([finite, midpoints])).all()
    bits = centres.view(np.uint32).astype(np.int64)
    around = np.concatenate([np.maximum(bits - 1, 0), bits, bits + 1]).astype(np.uint32)
    return np.concatenate([around, around | np.uint32(1 << 31)]).view(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_pattern_decodes(kernels, same_bits, dtype):
    got = kernels.decode("native", dtype, ALL.view(np.uint8), ALL.size)
    if dtype == "float16":
        with np.errstate(invalid="ignore"):
            want = ALL.view(np.float16).astype(np.float32)
    else:
        want = (ALL.astype(np.uint32) << 16).view(np.float32)
    same_bits(got, want, nan_is_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_pattern_survives_the_round_trip(kernels, same_bits, dtype):
    data = kernels.encode(
        "native", dtype, kernels.decode("native", dtype, ALL.view(np.uint8), ALL.size)
    ).view(np.uint16)
    infinity, nan = (0x7C00, 0x7E00) if dtype == "float16" else (0x7F80, 0x7FC0)
    want = np.where(infinity < (ALL & 0x7FFF), np.uint16(nan), ALL)
    same_bits(data, want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_around_every_value_and_midpoint(kernels, same_bits, dtype):
    acc = neighbourhoods(dtype)
    same_bits(kernels.encode("native", dtype, acc), oracle.encode("native", dtype, acc))


def test_rounding_to_fp16_on_random_bits(kernels, same_bits):
    rng = np.random.default_rng()
    bits = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    bits[::2] = (bits[::2] & 0x8FFFFFFF) | 0x30000000  # where fp16 has its values
    acc = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        want = acc.astype(np.float16).view(np.uint16)
    want[np.isnan(acc)] = 0x7E00
    same_bits(kernels.encode("native", "float16", acc).view(np.uint16), want)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_any_nan_is_stored_as_the_canonical_one(kernels, dtype):
    kind = oracle.accumulator_dtype(dtype)
    bits, mantissa = {4: (np.uint32, 23), 8: (np.uint64, 52)}[kind.itemsize]
    exponent = (1 << (8 * kind.itemsize - 1)) - (1 << mantissa)
    payloads = [1, 2, 1 << (mantissa - 1), (1 << mantissa) - 1, 1 << (mantissa // 2)]
    patterns = [sign | exponent | p for p in payloads for sign in (0, 1 << (8 * kind.itemsize - 1))]
    acc = np.array(patterns * 3, bits).view(kind)
    stored = kernels.encode("native", dtype, acc)
    width = oracle.tensor_dtype(dtype).itemsize
    canonical = {
        "float32": 0x7FC00000,
        "float64": 0x7FF8000000000000,
        "float16": 0x7E00,
        "bfloat16": 0x7FC0,
    }[dtype]
    assert (stored.view(f"u{width}") == canonical).all()


def test_bool_is_stored_as_zero_or_one(kernels):
    tensor = np.arange(256, dtype=np.uint8)
    acc = kernels.decode("native", "bool", tensor, 256)
    assert (acc == (tensor != 0)).all()
    for op, want in {"sum": 1, "product": 1, "bxor": 0, "min": 1, "max": 1}.items():
        got = kernels.combine(
            "native", "bool", op, np.full(4, 2, np.uint8), np.full(4, 255, np.uint8)
        )
        assert (kernels.encode("native", "bool", got) == want).all()
