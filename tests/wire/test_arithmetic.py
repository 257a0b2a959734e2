"""Premultiplication, division and the fused sum, against the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dpcomm import _core
from dpcomm.errors import UsageError
from dpcomm.oracle import wire as oracle

FLOATING = ["float32", "float16", "bfloat16", "float64"]


def random_floats(rng, n, kind=np.float32):
    values = rng.integers(
        0, 2 ** (8 * np.dtype(kind).itemsize), n, dtype=f"u{np.dtype(kind).itemsize}"
    )
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, np.finfo(kind).max, 1e-40, 3, -7], kind)
    picked = np.where(rng.random(n) < 0.5, rng.standard_normal(n).astype(kind), values.view(kind))
    return np.where(rng.random(n) < 0.2, special[rng.integers(0, special.size, n)], picked)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("factor", [0.5, 1 / 3, 1e-30, 1e30, 0.0, -2.0, float("nan"), 1e39])
def test_premultiply(kernels, same_bits, dtype, factor):
    acc = random_floats(np.random.default_rng(), 1043, oracle.accumulator_dtype(dtype))
    acc = oracle.load(dtype, oracle.store(dtype, acc))
    want = oracle.premultiply(dtype, acc, factor)
    _core.wire_premultiply(dtype, kernels.isa, acc, factor)
    same_bits(acc, want)


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 1024, 16777217])
def test_divide_floating(kernels, same_bits, dtype, divisor):
    acc = random_floats(np.random.default_rng(), 1043, oracle.accumulator_dtype(dtype))
    want = oracle.divide(dtype, acc, divisor)
    _core.wire_divide(dtype, kernels.isa, acc, divisor)
    same_bits(acc, want, nan_is_nan=True)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64"])
@pytest.mark.parametrize("divisor", [1, 2, 3, 127, 128, 300, 70000, 2**31, 2**62])
def test_divide_integers_truncates_toward_zero(kernels, same_bits, dtype, divisor):
    info = np.iinfo(dtype)
    edges = [info.min, info.min + 1, -7, -6, -1, 0, 1, 6, 7, info.max - 1, info.max]
    acc = np.array([x for x in edges if x >= info.min], dtype)
    want = np.array([int(abs(int(x)) // divisor) * (-1 if x < 0 else 1) for x in acc], dtype)
    same_bits(oracle.divide(dtype, acc, divisor), want)
    _core.wire_divide(dtype, kernels.isa, acc, divisor)
    same_bits(acc, want)


def test_bool_has_no_arithmetic_and_integers_no_factor(kernels):
    acc = np.zeros(8, np.uint8)
    with pytest.raises(UsageError):
        _core.wire_divide("bool", kernels.isa, acc, 2)
    for dtype in ("bool", "int32"):
        with pytest.raises(UsageError):
            _core.wire_premultiply(dtype, kernels.isa, acc, 2.0)


@pytest.mark.parametrize("sources", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("destinations", [1, 2, 3])
def test_sum_f32(kernels, same_bits, sources, destinations):
    rng = np.random.default_rng()
    for n, divisor in itertools.product([0, 1, 15, 63, 64, 65, 129, 1000], [1, 2, 3, sources]):
        held = [random_floats(rng, n + 1) for _ in range(sources)]
        # Sources at addresses that are not even aligned to a float.
        shifted = [np.empty(4 * n + 5, np.uint8) for _ in range(sources)]
        for raw, values in zip(shifted, held, strict=True):
            raw[1 : 1 + 4 * n] = values[:n].view(np.uint8)
        want = held[0][:n]
        for other in held[1:]:
            want = oracle.combine("sum", "float32", want, other[:n])
        want = oracle.store("float32", oracle.divide("float32", want, divisor))
        outs = [np.full(n + 2, 7.0, np.float32) for _ in range(destinations)]
        _core.wire_sum_f32(
            kernels.isa, [out[1 : n + 1] for out in outs], [raw[1:] for raw in shifted], divisor, n
        )
        for out in outs:
            same_bits(out[1 : n + 1], want)
            assert out[0] == 7.0
            assert out[n + 1] == 7.0


def test_sum_f32_into_a_source(kernels, same_bits):
    rng = np.random.default_rng()
    for place in range(3):
        held = [random_floats(rng, 777) for _ in range(3)]
        with np.errstate(all="ignore"):
            want = oracle.store("float32", (held[0] + held[1]) + held[2])
        other = np.empty(777, np.float32)
        _core.wire_sum_f32(kernels.isa, [other, held[place]], held, 1, 777)
        same_bits(other, want)
        same_bits(held[place], want)


def test_sum_f32_keeps_the_order(kernels):
    big, one = np.full(100, 2.0**30, np.float32), np.ones(100, np.float32)
    out = np.empty(100, np.float32)
    _core.wire_sum_f32(kernels.isa, [out], [big, one, -big], 1, 100)
    assert (out == 0).all()
    _core.wire_sum_f32(kernels.isa, [out], [big, -big, one], 1, 100)
    assert (out == 1).all()
