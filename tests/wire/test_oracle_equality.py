"""Every instruction set gives the oracle's bits: every dtype, operator and wire format."""

from __future__ import annotations

import numpy as np
import pytest

from dpcomm.oracle import wire as oracle

LENGTHS = [0, 1, 7, 127, 128, 129, 255, 511, 512, 513, 1025, 2 * 512 + 128 + 3]
LOSSY = ["fp16", "bf16", "int8"]
IN_FP32 = ["float32", "float16", "bfloat16"]
PAIRS = [("native", dtype) for dtype in oracle.DTYPES] + [(w, d) for w in LOSSY for d in IN_FP32]
COMBINED = [
    (wire, dtype, op)
    for wire, dtype in PAIRS
    for op in oracle.OPS
    if op not in ("avg", "premul_sum")
    and oracle.is_supported(op, dtype)
    and (wire == "native" or op == "sum")
]


def floats_of_all_kinds(rng, n, bits):
    """Random bits, ordinary numbers of many magnitudes, and every special value."""
    kind = {16: np.float16, 32: np.float32, 64: np.float64}[bits]
    values = rng.integers(0, 2**bits, n, dtype=f"u{bits // 8}").view(kind)
    with np.errstate(over="ignore"):
        ordinary = (rng.standard_normal(n) * 2.0 ** rng.integers(-20, 15)).astype(kind)
    info = np.finfo(kind)
    positive = [0, np.inf, np.nan, info.max, info.max / 2, info.tiny, info.smallest_subnormal, 1]
    special = np.copysign(np.array(positive * 2, kind), np.repeat([1, -1], 8)).astype(kind)
    choice = rng.integers(0, 4, n)
    picked = np.where(choice == 0, values, ordinary)
    return np.where(choice == 1, special[rng.integers(0, special.size, n)], picked)


def tensor_of(rng, dtype, n):
    """A tensor of `dtype` with everything that can be in one."""
    storage = oracle.tensor_dtype(dtype)
    if storage.kind == "f":
        return floats_of_all_kinds(rng, n, storage.itemsize * 8)
    if dtype == "bfloat16":
        return (floats_of_all_kinds(rng, n, 32).view(np.uint32) >> 16).astype(np.uint16)
    if dtype == "bool":
        return rng.choice(np.array([0, 0, 1, 1, 2, 255], np.uint8), n)
    info = np.iinfo(storage)
    values = rng.integers(info.min, info.max, n, dtype=storage, endpoint=True)
    extremes = np.array([info.min, info.max, 0, 1], storage)
    return np.where(rng.random(n) < 0.3, extremes[rng.integers(0, 4, n)], values)


def accumulator_of(rng, dtype, n):
    """An accumulator with everything that can be in one; not only what a tensor can hold."""
    kind = oracle.accumulator_dtype(dtype)
    if kind.kind == "f":
        return floats_of_all_kinds(rng, n, kind.itemsize * 8)
    return oracle.load(dtype, tensor_of(rng, dtype, n))


def random_rng():
    seed = np.random.SeedSequence().entropy
    print("seed", seed)
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("wire", "dtype"), PAIRS)
def test_store(kernels, same_bits, wire, dtype):
    rng = random_rng()
    for n in LENGTHS:
        acc = accumulator_of(rng, dtype, n)
        want = oracle.encode(wire, dtype, acc)
        assert want.size == oracle.slice_bytes(wire, dtype, n)
        offset = 0 if wire in ("fp16", "int8") else 1
        same_bits(kernels.encode(wire, dtype, acc, offset=offset), want)
        same_bits(kernels.keep(wire, dtype, acc), oracle.as_sent(wire, dtype, acc))


@pytest.mark.parametrize(("wire", "dtype"), PAIRS)
def test_load(kernels, same_bits, wire, dtype):
    rng = random_rng()
    for n in LENGTHS:
        if wire == "native":
            data = tensor_of(rng, dtype, n).view(np.uint8)
        else:
            data = oracle.encode(wire, dtype, accumulator_of(rng, dtype, n))
        got = kernels.decode(wire, dtype, data, n, offset=1 if wire == "native" else 0)
        same_bits(got, oracle.decode(wire, dtype, data, n), nan_is_nan=True)
        if wire in ("fp16", "int8"):  # their payload holds canonical NaN only
            same_bits(got, oracle.decode(wire, dtype, data, n))


@pytest.mark.parametrize(("wire", "dtype", "op"), COMBINED)
def test_combine(kernels, same_bits, wire, dtype, op):
    rng = random_rng()
    for n in LENGTHS:
        acc = accumulator_of(rng, dtype, n)
        if wire == "native":
            data = tensor_of(rng, dtype, n).view(np.uint8)
        else:
            data = oracle.encode(wire, dtype, accumulator_of(rng, dtype, n))
        want = oracle.combine(op, dtype, acc, oracle.decode(wire, dtype, data, n))
        got = kernels.combine(wire, dtype, op, acc, data, offset=1 if wire == "native" else 0)
        same_bits(got, want, nan_is_nan=True)
        same_bits(kernels.encode("native", dtype, got), oracle.encode("native", dtype, want))


@pytest.mark.parametrize("wire", LOSSY)
@pytest.mark.parametrize("dtype", IN_FP32)
def test_tiles_give_the_bytes_of_one_call(kernels, same_bits, wire, dtype):
    rng = random_rng()
    block = max(oracle.BLOCK_ELEMS[wire], 64)
    total = 7 * block + 5
    acc, other = accumulator_of(rng, dtype, total), accumulator_of(rng, dtype, total)
    data = kernels.encode(wire, dtype, other)
    for blocks in (1, 2, 3, 7):
        tile = blocks * block
        same_bits(kernels.encode(wire, dtype, other, tile), data)
        same_bits(kernels.keep(wire, dtype, other, tile), kernels.keep(wire, dtype, other))
        same_bits(
            kernels.decode(wire, dtype, data, total, tile), kernels.decode(wire, dtype, data, total)
        )
        same_bits(
            kernels.combine(wire, dtype, "sum", acc, data, tile),
            oracle.combine("sum", dtype, acc, oracle.decode(wire, dtype, data, total)),
            nan_is_nan=True,
        )


@pytest.mark.parametrize("op", ["min", "max"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_min_max_do_not_depend_on_the_order_of_operands(kernels, same_bits, dtype, op):
    rng = random_rng()
    a, b = tensor_of(rng, dtype, 4096), tensor_of(rng, dtype, 4096)
    zeros = rng.random(4096) < 0.25
    signs = oracle.store(dtype, np.array([0.0, -0.0], oracle.accumulator_dtype(dtype)))
    a[zeros], b[zeros] = (rng.choice(signs, zeros.sum()) for _ in range(2))

    def result(first, second):
        acc = oracle.load(dtype, first)
        return kernels.encode(
            "native", dtype, kernels.combine("native", dtype, op, acc, second.view(np.uint8))
        )

    same_bits(result(a, b), result(b, a))
    either = np.isnan(oracle.load(dtype, a)) | np.isnan(oracle.load(dtype, b))
    got = oracle.load(dtype, result(a, b).view(a.dtype))
    assert (np.isnan(got) == either).all()
