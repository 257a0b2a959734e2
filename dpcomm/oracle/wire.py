"""Wire formats and the arithmetic of reductions, bit for bit (docs/wire_formats.md).

Three kinds of array occur. A *tensor* has the dtype of the tensor, bfloat16 as its uint16 bits and
bool as uint8. An *accumulator* is float32 for the floating dtypes of 32 bits and fewer, and has the
tensor's dtype else. A *slice* is an array of uint8, the bytes that go on the wire.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = [
    "BLOCK_ELEMS",
    "DTYPES",
    "OPS",
    "WIRES",
    "accumulator_dtype",
    "as_sent",
    "combine",
    "decode",
    "divide",
    "encode",
    "finish",
    "is_supported",
    "load",
    "may_be_lossy",
    "premultiply",
    "slice_bytes",
    "store",
    "tensor_dtype",
]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

WIRES: Final = ("native", "fp16", "bf16", "int8")
OPS: Final = ("sum", "avg", "premul_sum", "product", "min", "max", "band", "bor", "bxor")
#: Elements that share a scale.
BLOCK_ELEMS: Final = {"native": 1, "fp16": 512, "bf16": 1, "int8": 128}

_TENSOR: Final[dict[str, npt.DTypeLike]] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "bool": np.uint8,
}
DTYPES: Final = tuple(_TENSOR)
_IN_FP32: Final = ("float32", "float16", "bfloat16")
_FLOATING: Final = (*_IN_FP32, "float64")
#: The block exponent is never below this, so that both scales are normal floats.
_LEAST_EXPONENT: Final = {"fp16": -112, "int8": -120}
#: The block's largest magnitude, at 2^exponent, goes on the wire at 2^this.
_TARGET_EXPONENT: Final = {"fp16": 14, "int8": 6}
_PAYLOAD: Final[dict[str, npt.DTypeLike]] = {"fp16": np.float16, "int8": np.int8}


def tensor_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of a tensor: uint16 for bfloat16, uint8 for bool."""
    return np.dtype(_TENSOR[dtype])


def accumulator_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of an accumulator for tensors of `dtype`."""
    return np.dtype(np.float32) if dtype in _IN_FP32 else tensor_dtype(dtype)


def may_be_lossy(op: str, dtype: str) -> bool:
    """True if a reduction by `op` over `dtype` may go in a lossy wire format (law 8)."""
    return dtype in _IN_FP32 and op in ("sum", "avg", "premul_sum")


def is_supported(op: str, dtype: str) -> bool:
    """True if `op` makes sense on tensors of `dtype`."""
    if op == "premul_sum":
        return dtype in _FLOATING
    if op == "avg":
        return dtype != "bool"
    if op in ("band", "bor", "bxor"):
        return dtype not in _FLOATING
    return True


# --- tensors --------------------------------------------------------------------------------------


def load(dtype: str, tensor: Array) -> Array:
    """The accumulator of a tensor; exact."""
    if dtype == "bfloat16":
        widened: Array = (tensor.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return widened
    if dtype == "bool":
        tensor = tensor != 0
    acc: Array = tensor.astype(accumulator_dtype(dtype))
    return acc


def store(dtype: str, acc: Array) -> Array:
    """The tensor of an accumulator: rounded to nearest even, NaN canonical."""
    if dtype == "bfloat16":
        return _bf16_bits(acc)
    if dtype == "bool":
        acc = acc != 0
    with np.errstate(over="ignore", invalid="ignore"):
        return _canonical(acc.astype(tensor_dtype(dtype)))


def _canonical(values: Array) -> Array:
    """A copy with every NaN the canonical one: positive, quiet, no payload."""
    if values.dtype.kind != "f":
        return values.copy()
    nan = {2: np.uint16(0x7E00), 4: np.uint32(0x7FC00000), 8: np.uint64(0x7FF8000000000000)}
    bits = values.view(f"u{values.itemsize}").copy()
    bits[np.isnan(values)] = nan[values.itemsize]
    result: Array = bits.view(values.dtype)
    return result


def _widen(values: Float32) -> npt.NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return values.astype(np.float64)


def _bf16_bits(acc: Float32) -> npt.NDArray[np.uint16]:
    """Float32 rounded to 8 significant bits (and to multiples of 2^-133), as bits of bf16."""
    wide = _widen(acc)
    finite = np.isfinite(wide)
    _, exponent = np.frexp(np.where(finite, wide, 0.0))
    unit = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = np.where(finite, np.rint(wide / unit) * unit, wide).astype(np.float32)
    bits = _canonical(rounded).view(np.uint32) >> np.uint32(16)
    return bits.astype(np.uint16)


# --- slices ---------------------------------------------------------------------------------------


def _blocks(wire: str, total: int) -> int:
    return -(-total // BLOCK_ELEMS[wire])


def _header_bytes(wire: str, total: int) -> int:
    return -(-_blocks(wire, total) // 16) * 16 if wire in _PAYLOAD else 0


def slice_bytes(wire: str, dtype: str, total: int) -> int:
    """Bytes of a slice of `total` elements, header included."""
    element = {"native": tensor_dtype(dtype).itemsize, "fp16": 2, "bf16": 2, "int8": 1}[wire]
    return _header_bytes(wire, total) + total * element


def encode(wire: str, dtype: str, acc: Array) -> Bytes:
    """The slice of an accumulator of shape (total,), as an array of slice_bytes() bytes."""
    if wire == "native":
        return store(dtype, acc).view(np.uint8)
    if wire == "bf16":
        return _bf16_bits(acc).view(np.uint8)
    header = np.zeros(_header_bytes(wire, acc.size), np.uint8)
    payload = np.empty(acc.size, _PAYLOAD[wire])
    for block in range(_blocks(wire, acc.size)):
        part = slice(block * BLOCK_ELEMS[wire], (block + 1) * BLOCK_ELEMS[wire])
        exponent = _block_exponent(wire, acc[part])
        header[block] = exponent + 127
        payload[part] = _BLOCK_ENCODERS[wire](acc[part], exponent)
    return np.concatenate([header, payload.view(np.uint8)])


def decode(wire: str, dtype: str, data: Bytes, total: int) -> Array:
    """The accumulator, of shape (total,), that a reader of a slice gets."""
    if wire == "native":
        return load(dtype, data[: slice_bytes(wire, dtype, total)].view(tensor_dtype(dtype)))
    if wire == "bf16":
        return load("bfloat16", data[: 2 * total].view(np.uint16))
    at = _header_bytes(wire, total)
    payload = data[at : slice_bytes(wire, dtype, total)].view(_PAYLOAD[wire])
    bytes_ = data[: _blocks(wire, total)].astype(np.int64)
    exponents = np.repeat(bytes_ - 127 - _TARGET_EXPONENT[wire], BLOCK_ELEMS[wire])[:total]
    wide = payload.astype(np.float64)
    if wire == "int8":
        wide[payload == -128] = np.nan
    return _canonical(np.ldexp(wide, exponents).astype(np.float32))


def as_sent(wire: str, dtype: str, acc: Array) -> Array:
    """What a reader of the encoded accumulator sees (law 2)."""
    return decode(wire, dtype, encode(wire, dtype, acc), acc.size)


def _block_exponent(wire: str, block: Float32) -> int:
    """floor(log2) of the largest finite magnitude, within what the format allows.

    For fp16 it is that of the magnitude rounded to 11 bits, which may be the next power of two.
    """
    finite = np.abs(block[np.isfinite(block)].astype(np.float64))
    significand, above = np.frexp(finite.max(initial=0.0))
    if significand == 0:
        return _LEAST_EXPONENT[wire]
    exponent = int(above) - 1
    if wire == "fp16" and np.rint(significand * 2.0**11) == 2.0**11:
        exponent += 1
    return min(max(exponent, _LEAST_EXPONENT[wire]), 127)


def _encode_fp16_block(block: Float32, exponent: int) -> npt.NDArray[np.float16]:
    wide = _widen(block)
    # A finite number stays finite: nothing finite may decode to 2^128.
    top = np.ldexp(1.0 - 2.0**-11, 128)
    wide = np.where(np.isfinite(wide), np.clip(wide, -top, top), wide)
    scaled = np.ldexp(wide, _TARGET_EXPONENT["fp16"] - exponent)
    rounded: npt.NDArray[np.float16] = _canonical(scaled.astype(np.float16))
    return rounded


def _encode_int8_block(block: Float32, exponent: int) -> npt.NDArray[np.int8]:
    finite = np.isfinite(block)
    wide = np.where(finite, block, 0.0).astype(np.float64)
    scaled = np.rint(np.ldexp(wide, _TARGET_EXPONENT["int8"] - exponent))
    return np.where(finite, np.clip(scaled, -127, 127), -128).astype(np.int8)


_BLOCK_ENCODERS: Final = {"fp16": _encode_fp16_block, "int8": _encode_int8_block}


# --- arithmetic on accumulators -------------------------------------------------------------------


def combine(op: str, dtype: str, acc: Array, other: Array) -> Array:
    """`acc op other` in the accumulation type; AVG and PREMUL_SUM combine by SUM.

    NaN is NaN here, of any bits; store and encode make it canonical.
    """
    with np.errstate(all="ignore"):
        if dtype == "bool":
            return _combine_bool(op, acc, other)
        if op in ("min", "max"):
            return _extreme(op, acc, other)
        if op == "product":
            return np.multiply(acc, other)
        if op in ("band", "bor", "bxor"):
            bitwise = {"band": np.bitwise_and, "bor": np.bitwise_or, "bxor": np.bitwise_xor}
            result: Array = bitwise[op](acc, other)
            return result
        return np.add(acc, other)


def _combine_bool(op: str, acc: Array, other: Array) -> Array:
    a, b = acc != 0, other != 0
    if op in ("sum", "max", "bor"):
        result: Array = a | b
    elif op == "bxor":
        result = a ^ b
    else:
        result = a & b
    return result.astype(np.uint8)


def _extreme(op: str, a: Array, b: Array) -> Array:
    """NaN propagates; -0 is less than +0, whatever the order of the operands."""
    result: Array = np.minimum(a, b) if op == "min" else np.maximum(a, b)
    if a.dtype.kind != "f":
        return result
    zeros = (a == 0) & (b == 0)
    either, both = np.signbit(a) | np.signbit(b), np.signbit(a) & np.signbit(b)
    sign = np.where(either if op == "min" else both, -1.0, 1.0).astype(a.dtype)
    return _canonical(np.where(zeros, np.copysign(np.zeros_like(a), sign), result))


def premultiply(dtype: str, acc: Array, factor: float) -> Array:
    """PREMUL_SUM's contribution: times the factor in the accumulation type, rounded to `dtype`."""
    with np.errstate(all="ignore"):
        product = acc * accumulator_dtype(dtype).type(factor)
    return load(dtype, store(dtype, product))


def divide(dtype: str, acc: Array, divisor: int) -> Array:
    """AVG's division in the accumulation type; integers truncate toward zero."""
    if dtype in _FLOATING:
        with np.errstate(all="ignore"):
            quotient: Array = np.divide(acc, accumulator_dtype(dtype).type(divisor))
        return quotient
    wide = acc.astype(np.int64)
    floor = wide // divisor
    truncated: Array = (floor + ((wide < 0) & (wide % divisor != 0))).astype(acc.dtype)
    return truncated


def finish(op: str, dtype: str, acc: Array, world_size: int) -> Array:
    """The result of a reduction before it is stored: AVG divides, all else stays."""
    return divide(dtype, acc, world_size) if op == "avg" else acc
