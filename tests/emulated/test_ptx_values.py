"""PTX instructions that compute: each one, translated to C++ and run, against Python and NumPy.

The inputs are all pairs of edge values, and random bits that are fresh in every run.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ptx.harness import HEADER, Program, entry

Number = Any
COUNT = 512  # threads, one for each set of inputs
BITS = {**{f"{k}{b}": b for k in "bus" for b in (8, 16, 32, 64)}, "f32": 32, "f64": 64, "pred": 8}
BITS |= {"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32}
EDGE_FLOATS = [0.0, 1.0, 1.5, 2.5, 0.5, 3e-45, 1e-39, 1.1754943508222875e-38, 65504.0, 65520.0]
EDGE_FLOATS += [2.0**-14, 2.0**-25, 2.0**31, 2.0**32, 2.0**63, 3.3e38, math.inf]
# In the middle between two values of fp16 and of bf16, below an even one and above it.
EDGE_FLOATS += [1 + odd * 2.0**-last for odd in (1, 3) for last in (11, 8)]
EDGE_FLOATS += [odd * 2.0**-25 for odd in (3, 5)]
MEETING = [0.0, -0.0, 1.0, math.inf, math.nan]  # all pairs of these occur


@dataclass(frozen=True)
class Case:
    """An instruction from %a, %b, %c to %d, and what it has to give."""

    text: str  # "add.s32 %d, %a, %b"
    result: str  # type of %d
    inputs: tuple[str, ...]
    expected: Callable[..., Number]

    @property
    def name(self) -> str:
        whole = f"{self.text} {self.result} {self.inputs}"
        return "k_" + "".join(c if c.isalnum() else f"_{ord(c):x}" for c in whole)


def wrap(value: int, ptx_type: str) -> int:
    """`value` modulo 2^bits, in the range of the type."""
    bits = BITS[ptx_type]
    value %= 1 << bits
    return value - (1 << bits) if ptx_type[0] == "s" and value >> (bits - 1) else value


def clamp(value: int, ptx_type: str) -> int:
    bits = BITS[ptx_type]
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if ptx_type[0] == "s" else (0, 0)
    return max(low, min(high if ptx_type[0] == "s" else (1 << bits) - 1, value))


def bits_of(value: int, ptx_type: str) -> int:
    return value % (1 << BITS[ptx_type])


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


# --- integers ------------------------------------------------------------------------------------
def integer_cases() -> Iterator[Case]:
    for t in (f"{k}{b}" for k in "us" for b in (16, 32, 64)):
        two, three = (t, t), (t, t, t)
        yield Case(f"add.{t} %d, %a, %b", t, two, lambda a, b: a + b)
        yield Case(f"sub.{t} %d, %a, %b", t, two, lambda a, b: a - b)
        yield Case(f"mul.lo.{t} %d, %a, %b", t, two, lambda a, b: a * b)
        yield Case(f"mul.hi.{t} %d, %a, %b", t, two, lambda a, b, t=t: a * b >> BITS[t])
        yield Case(f"mad.lo.{t} %d, %a, %b, %c", t, three, lambda a, b, c: a * b + c)
        yield Case(
            f"mad.hi.{t} %d, %a, %b, %c", t, three, lambda a, b, c, t=t: (a * b >> BITS[t]) + c
        )
        yield Case(f"div.{t} %d, %a, %b", t, two, lambda a, b: truncated(a, b) if b else -1)
        yield Case(f"rem.{t} %d, %a, %b", t, two, lambda a, b: a - truncated(a, b) * b if b else a)
        yield Case(f"min.{t} %d, %a, %b", t, two, min)
        yield Case(f"max.{t} %d, %a, %b", t, two, max)
        yield Case(f"sad.{t} %d, %a, %b, %c", t, three, lambda a, b, c: c + abs(a - b))
        yield Case(f"add.{t} %d, %a, 7", t, (t,), lambda a: a + 7)
        if t[0] == "s":
            yield Case(f"neg.{t} %d, %a", t, (t,), lambda a: -a)
            yield Case(f"abs.{t} %d, %a", t, (t,), abs)
        if BITS[t] < 64:
            w = f"{t[0]}{2 * BITS[t]}"
            yield Case(f"mul.wide.{t} %d, %a, %b", w, two, lambda a, b: a * b)
            yield Case(f"mad.wide.{t} %d, %a, %b, %c", w, (t, t, w), lambda a, b, c: a * b + c)
    two_signed = ("s32", "s32")
    yield Case("add.sat.s32 %d, %a, %b", "s32", two_signed, lambda a, b: clamp(a + b, "s32"))
    yield Case("sub.sat.s32 %d, %a, %b", "s32", two_signed, lambda a, b: clamp(a - b, "s32"))


# --- bits ----------------------------------------------------------------------------------------
def lop3(a: int, b: int, c: int, table: int) -> int:
    bit = 0
    for i in range(32):
        index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        bit |= (table >> index & 1) << i
    return bit


def prmt(a: int, b: int, choice: int) -> int:
    content = (b << 32 | a).to_bytes(8, "little")
    chosen = []
    for i in range(4):
        nibble = choice >> 4 * i & 15
        byte = content[nibble & 7]
        chosen.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(chosen), "little")


def bfe(a: int, place: int, length: int, t: str) -> int:
    """Bit by bit, as the PTX ISA words it."""
    a, place, length, top = bits_of(a, t), place & 255, length & 255, BITS[t] - 1
    sign = 0 if t[0] == "u" or length == 0 else a >> min(place + length - 1, top) & 1
    result = 0
    for i in range(top + 1):
        inside = i < length and place + i <= top
        result |= (a >> (place + i) & 1 if inside else sign) << i
    return result


def bfi(a: int, b: int, place: int, length: int, t: str) -> int:
    place, length = place & 255, length & 255
    for i in range(length):
        if place + i < BITS[t]:
            b = b & ~(1 << (place + i)) | (a >> i & 1) << (place + i)
    return b


def bfind(a: int, t: str) -> int:
    a = ~a if a < 0 else a
    return a.bit_length() - 1


def bit_cases() -> Iterator[Case]:
    for n in (16, 32, 64):
        t = f"b{n}"
        yield Case(f"and.{t} %d, %a, %b", t, (t, t), lambda a, b: a & b)
        yield Case(f"or.{t} %d, %a, %b", t, (t, t), lambda a, b: a | b)
        yield Case(f"xor.{t} %d, %a, %b", t, (t, t), lambda a, b: a ^ b)
        yield Case(f"and.{t} %d, %a, -256", t, (t,), lambda a: a & -256)
        yield Case(f"not.{t} %d, %a", t, (t,), lambda a: ~a)
        yield Case(f"cnot.{t} %d, %a", t, (t,), lambda a: int(a == 0))
        yield Case(f"shl.{t} %d, %a, %b", t, (t, "u32"), lambda a, b: a << min(b, 99))
        for k in "bus":
            typed = f"{k}{n}"
            yield Case(
                f"shr.{typed} %d, %a, %b", typed, (typed, "u32"), lambda a, b: a >> min(b, 99)
            )
    for n in (32, 64):
        t = f"b{n}"
        yield Case(f"popc.{t} %d, %a", "u32", (t,), lambda a: bin(a).count("1"))
        yield Case(f"clz.{t} %d, %a", "u32", (t,), lambda a, n=n: n - a.bit_length())
        yield Case(f"brev.{t} %d, %a", t, (t,), lambda a, n=n: int(f"{a:0{n}b}"[::-1], 2))
        yield Case(
            f"bfi.{t} %d, %a, %b, %c, %e",
            t,
            (t, t, "u32", "u32"),
            lambda a, b, p, n, t=t: bfi(a, b, p, n, t),
        )
        for k in "us":
            typed = f"{k}{n}"
            yield Case(f"bfind.{typed} %d, %a", "u32", (typed,), lambda a, t=typed: bfind(a, t))
            yield Case(
                f"bfind.shiftamt.{typed} %d, %a",
                "u32",
                (typed,),
                lambda a, n=n, t=typed: -1 if bfind(a, t) < 0 else n - 1 - bfind(a, t),
            )
            yield Case(
                f"bfe.{typed} %d, %a, %b, %c",
                typed,
                (typed, "u32", "u32"),
                lambda a, p, n, t=typed: bfe(a, p, n, t),
            )
    three = ("b32", "b32", "b32")
    for table in (0x96, 0xE8, 0x1D, 0xFF, 0x00):
        yield Case(
            f"lop3.b32 %d, %a, %b, %c, {table}",
            "b32",
            three,
            lambda a, b, c, t=table: lop3(a, b, c, t),
        )
    yield Case("prmt.b32 %d, %a, %b, %c", "b32", three, prmt)
    yield Case("prmt.b32 %d, %a, %b, 0x5410U", "b32", three[:2], lambda a, b: prmt(a, b, 0x5410))
    for mode, amount in (("wrap", lambda c: c & 31), ("clamp", lambda c: min(c, 32))):
        yield Case(
            f"shf.l.{mode}.b32 %d, %a, %b, %c",
            "b32",
            three,
            lambda a, b, c, n=amount: (b << 32 | a) << n(c) >> 32,
        )
        yield Case(
            f"shf.r.{mode}.b32 %d, %a, %b, %c",
            "b32",
            three,
            lambda a, b, c, n=amount: (b << 32 | a) >> n(c),
        )


# --- floating point ------------------------------------------------------------------------------
def minimum(a: Number, b: Number) -> Number:
    if np.isnan(a) or np.isnan(b):
        return b if np.isnan(a) else a
    return min((a, b), key=lambda x: (x, not np.signbit(x)))


def maximum(a: Number, b: Number) -> Number:
    return -minimum(-a, -b)


def saturated(a: Number) -> Number:
    return 0.0 if np.isnan(a) else maximum(0.0, minimum(1.0, a))


def propagating(function: Callable[..., Number]) -> Callable[..., Number]:
    return lambda a, b: np.nan if np.isnan(a) or np.isnan(b) else function(a, b)


def exact_fma(a: Number, b: Number, c: Number) -> Number:
    """One rounding, to double."""
    if not all(map(np.isfinite, (a, b, c))) or a == 0 or b == 0 or c == 0:
        return a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def float_cases() -> Iterator[Case]:
    for t in ("f32", "f64"):
        two = (t, t)
        for rounding in ("", ".rn"):
            yield Case(f"add{rounding}.{t} %d, %a, %b", t, two, lambda a, b: a + b)
            yield Case(f"sub{rounding}.{t} %d, %a, %b", t, two, lambda a, b: a - b)
            yield Case(f"mul{rounding}.{t} %d, %a, %b", t, two, lambda a, b: a * b)
        yield Case(f"div.rn.{t} %d, %a, %b", t, two, lambda a, b: a / b)
        yield Case(f"rcp.rn.{t} %d, %a", t, (t,), lambda a: type(a)(1) / a)
        yield Case(f"sqrt.rn.{t} %d, %a", t, (t,), np.sqrt)
        yield Case(f"min.{t} %d, %a, %b", t, two, minimum)
        yield Case(f"max.{t} %d, %a, %b", t, two, maximum)
        yield Case(f"neg.{t} %d, %a", t, (t,), lambda a: -a)
        yield Case(f"abs.{t} %d, %a", t, (t,), np.abs)
        yield Case(f"copysign.{t} %d, %a, %b", t, two, lambda a, b: np.copysign(b, a))
    two = ("f32", "f32")
    yield Case("min.NaN.f32 %d, %a, %b", "f32", two, propagating(minimum))
    yield Case("max.NaN.f32 %d, %a, %b", "f32", two, propagating(maximum))
    yield Case("add.sat.f32 %d, %a, %b", "f32", two, lambda a, b: saturated(a + b))
    yield Case("fma.rn.f64 %d, %a, %b, %c", "f64", ("f64", "f64", "f64"), exact_fma)
    yield Case("add.f32 %d, %a, 0f3F800000", "f32", ("f32",), lambda a: a + np.float32(1))
    yield Case("mul.f64 %d, %a, 0d3FE0000000000000", "f64", ("f64",), lambda a: a * 0.5)
    for t in ("f32", "f64"):
        for name, test in {
            "finite": np.isfinite,
            "infinite": np.isinf,
            "number": lambda a: not np.isnan(a),
            "notanumber": np.isnan,
            "normal": lambda a: np.isfinite(a) and abs(a) >= np.finfo(type(a)).tiny,
        }.items():
            yield Case(f"testp.{name}.{t} %d, %a", "pred", (t,), lambda a, test=test: int(test(a)))


# --- comparisons ---------------------------------------------------------------------------------
ORDERED: dict[str, Callable[..., bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a < b or a > b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def comparison_cases() -> Iterator[Case]:
    for name, test in ORDERED.items():
        for t in ("u16", "s16", "u32", "s32", "u64", "s64", "f32", "f64"):
            yield Case(f"setp.{name}.{t} %d, %a, %b", "pred", (t, t), test)
        for t in ("f32", "f64"):
            yield Case(
                f"setp.{name}u.{t} %d, %a, %b",
                "pred",
                (t, t),
                lambda a, b, test=test: np.isnan(a) or np.isnan(b) or test(a, b),
            )
    for alias, name in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
        yield Case(f"setp.{alias}.u32 %d, %a, %b", "pred", ("u32", "u32"), ORDERED[name])
    for t in ("b16", "b32", "b64"):
        yield Case(f"setp.eq.{t} %d, %a, %b", "pred", (t, t), ORDERED["eq"])
    two = ("f32", "f32")
    yield Case("setp.nan.f32 %d, %a, %b", "pred", two, lambda a, b: np.isnan(a) or np.isnan(b))
    yield Case("setp.num.f64 %d, %a, %b", "pred", ("f64", "f64"), lambda a, b: a == a and b == b)
    ints = ("s32", "s32")
    for logic, combine in {
        "and": lambda x, y: x and y,
        "or": lambda x, y: x or y,
        "xor": lambda x, y: x != y,
    }.items():
        yield Case(
            f"setp.gt.s32 %q, %a, 0; setp.lt.{logic}.s32 %d, %a, %b, !%q",
            "pred",
            ints,
            lambda a, b, combine=combine: combine(a < b, not a > 0),
        )
    yield Case("setp.lt.s32 %q|%d, %a, %b", "pred", ints, lambda a, b: not a < b)
    yield Case(
        "setp.gt.s32 %q, %a, 0; setp.lt.and.s32 %r|%d, %a, %b, %q",
        "pred",
        ints,
        lambda a, b: not a < b and a > 0,
    )
    yield Case(
        "setp.gt.s32 %q, %a, 0; setp.lt.s32 %r, %a, %b; and.pred %d, %q, %r",
        "pred",
        ints,
        lambda a, b: 0 < a < b,
    )
    yield Case("setp.gt.s32 %q, %a, 0; not.pred %d, %q", "pred", ints, lambda a, b: a <= 0)
    yield Case("set.lt.u32.s32 %d, %a, %b", "u32", ints, lambda a, b: -(a < b))
    yield Case("set.lt.f32.f32 %d, %a, %b", "f32", two, lambda a, b: float(a < b))
    for t in ("b16", "s32", "u64", "f32", "f64"):
        yield Case(
            f"setp.gt.s32 %q, %c, 0; selp.{t} %d, %a, %b, %q",
            t,
            (t, t, "s32"),
            lambda a, b, c: a if c > 0 else b,
        )
    yield Case(
        "slct.s32.s32 %d, %a, %b, %c", "s32", (*ints, "s32"), lambda a, b, c: a if c >= 0 else b
    )
    yield Case(
        "slct.f32.f32 %d, %a, %b, %c", "f32", (*two, "f32"), lambda a, b, c: a if c >= 0 else b
    )


# --- moves and conversions -----------------------------------------------------------------------
def move_cases() -> Iterator[Case]:
    yield Case("mov.b32 %d, %a", "b32", ("f32",), lambda a: a.view(np.uint32))
    yield Case("mov.b32 %d, %a", "f32", ("b32",), lambda a: np.uint32(a).view(np.float32))
    yield Case("mov.f32 %d, 0f7F800000", "f32", ("f32",), lambda a: math.inf)
    yield Case("mov.u64 %d, -2", "u64", ("u64",), lambda a: -2)
    yield Case("mov.b64 %d, {%a, %b}", "b64", ("b32", "b32"), lambda a, b: b << 32 | a)
    yield Case("mov.b32 %d, {%a, %b}", "b32", ("b16", "b16"), lambda a, b: b << 16 | a)
    yield Case("mov.b32 {_, %d}, %a", "b16", ("b32",), lambda a: a >> 16)
    yield Case("mov.b64 {%d, _}, %a", "b32", ("b64",), lambda a: a)
    yield Case(
        "mov.b64 %d, {%a, %b, %b, %a}",
        "b64",
        ("b16", "b16"),
        lambda a, b: a << 48 | b << 32 | b << 16 | a,
    )
    yield Case(
        "{ .reg .b128 both; mov.b128 both, {%a, %b}; mov.b128 {_, %d}, both; }",
        "b64",
        ("b64", "b64"),
        lambda a, b: b,
    )
    yield Case("@!%q mov.b32 %d, %a", "b32", ("b32",), lambda a: a)


def rounded(value: float, mode: str) -> float:
    if not math.isfinite(value):
        return value
    whole = {"rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil, "rni": round}[mode](value)
    return math.copysign(float(whole), value)


def to_integer(value: Number, mode: str, source: str, result: str) -> int:
    value = float(value)
    if math.isnan(value):
        return 1 << (BITS[result] - 1) if "f64" in source or BITS[result] == 64 else 0
    if math.isinf(value):
        return clamp(int(math.copysign(1 << 70, value)), result)
    return clamp(int(rounded(value, mode)), result)


def to_bfloat(value: Number) -> int:
    """The nearer one of the two neighbours, the even one in the middle."""
    if np.isnan(value):
        return 0x7FFF
    down = int(np.float32(value).view(np.uint32)) >> 16
    if not np.isfinite(value):
        return down
    exact = abs(float(value))
    low, high = (from_bfloat((down & 0x7FFF) + i) for i in (0, 1))
    high = high if math.isfinite(high) else 2.0**128
    up = exact - low > high - exact or (exact - low == high - exact and down & 1)
    return down + int(up)


def from_bfloat(bits: int) -> float:
    return float(np.uint32(bits << 16).view(np.float32))


def half_bits(value: Number) -> int:
    return 0x7FFF if np.isnan(value) else int(np.float16(value).view(np.uint16))


def conversion_cases() -> Iterator[Case]:
    integers = [f"{k}{b}" for k in "us" for b in (8, 16, 32, 64)]
    for source, result in itertools.product(integers, integers):
        if source == result:
            continue
        yield Case(f"cvt.{result}.{source} %d, %a", result, (source,), lambda a: a)
        yield Case(
            f"cvt.sat.{result}.{source} %d, %a", result, (source,), lambda a, t=result: clamp(a, t)
        )
    for t in ("f32", "f64"):
        for other in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"):
            kind = np.float32 if t == "f32" else np.float64
            yield Case(
                f"cvt.rn.{t}.{other} %d, %a", t, (other,), lambda a, kind=kind: exact(a, kind)
            )
        for mode in ("rni", "rzi", "rmi", "rpi"):
            yield Case(
                f"cvt.{mode}.{t}.{t} %d, %a", t, (t,), lambda a, mode=mode: rounded(float(a), mode)
            )
            for other in ("s8", "u16", "s32", "u32", "s64", "u64"):
                yield Case(
                    f"cvt.{mode}.{other}.{t} %d, %a",
                    other,
                    (t,),
                    lambda a, mode=mode, s=t, r=other: to_integer(a, mode, s, r),
                )
        yield Case(f"cvt.rn.f16.{t} %d, %a", "b16", (t,), half_bits)
    yield Case("cvt.rn.f32.f64 %d, %a", "f32", ("f64",), np.float32)
    yield Case("cvt.f64.f32 %d, %a", "f64", ("f32",), np.float64)
    yield Case("cvt.sat.f32.f32 %d, %a", "f32", ("f32",), saturated)
    yield Case("cvt.f32.f16 %d, %a", "f32", ("b16",), lambda a: np.uint16(a).view(np.float16))
    yield Case("cvt.f64.f16 %d, %a", "f64", ("b16",), lambda a: np.uint16(a).view(np.float16))
    yield Case("cvt.f32.bf16 %d, %a", "f32", ("b16",), from_bfloat)
    yield Case("cvt.rn.bf16.f32 %d, %a", "b16", ("f32",), to_bfloat)
    yield Case("cvt.rn.f16.s32 %d, %a", "b16", ("s32",), lambda a: half_bits(float(a)))
    yield Case("cvt.rni.s32.f16 %d, %a", "s32", ("b16",), half_to_integer)
    two = ("f32", "f32")
    yield Case(
        "cvt.rn.f16x2.f32 %d, %a, %b", "b32", two, lambda a, b: half_bits(a) << 16 | half_bits(b)
    )
    yield Case(
        "cvt.rn.bf16x2.f32 %d, %a, %b", "b32", two, lambda a, b: to_bfloat(a) << 16 | to_bfloat(b)
    )


def half_to_integer(bits: int) -> int:
    return to_integer(float(np.uint16(bits).view(np.float16)), "rni", "f16", "s32")


def exact(value: int, kind: Callable[[Number], Number]) -> Number:
    """An integer rounded once to `kind`; int64 to float through NumPy is one rounding, too."""
    return kind(np.uint64(value) if value >= 0 else np.int64(value))


CASES = [
    *integer_cases(),
    *bit_cases(),
    *float_cases(),
    *comparison_cases(),
    *move_cases(),
    *conversion_cases(),
]


# --- running -------------------------------------------------------------------------------------
def register_type(t: str) -> str:
    return t if t in ("f32", "f64") else f"b{max(16, BITS[t])}"


def kernel(case: Case) -> str:
    """Thread i: its inputs from the arrays p1, p2, ..., its result to p0."""
    lines = ["\t.reg .pred %q, %r;", "\t.reg .b32 %i;", "\t.reg .b64 %x, %y;"]
    lines += ["\tmov.u32 %i, %tid.x;", "\tsetp.ne.b32 %q, %i, %i;"]
    for name, t, index in zip("abce", case.inputs, range(1, 5), strict=False):
        lines += [
            f"\t.reg .{register_type(t)} %{name};",
            f"\tld.param.u64 %x, [p{index}];",
            f"\tmul.wide.u32 %y, %i, {BITS[t] // 8};",
            "\tadd.s64 %x, %x, %y;",
            f"\tld.global.{t if t[0] != 'p' else 'u8'} %{name}, [%x];",
        ]
    lines.append(f"\t.reg .{'pred' if case.result == 'pred' else register_type(case.result)} %d;")
    lines.append("\t" + case.text + ("" if case.text.startswith("{") else ";"))
    stored = "%d"
    if case.result == "pred":
        lines += ["\t.reg .u16 %s;", "\tselp.u16 %s, 1, 0, %d;"]
        stored = "%s"
    lines += [
        "\tld.param.u64 %x, [p0];",
        f"\tmul.wide.u32 %y, %i, {BITS[case.result] // 8};",
        "\tadd.s64 %x, %x, %y;",
        f"\tst.global.{'u8' if case.result == 'pred' else case.result} [%x], {stored};",
        "\tret;",
    ]
    return entry(case.name, 5, "\n".join(lines))


def dtype(t: str) -> np.dtype[Any]:
    if t in ("f32", "f64"):
        return np.dtype(f"f{BITS[t] // 8}")
    return np.dtype(f"{'i' if t[0] == 's' else 'u'}{BITS[t] // 8}")


def edges(t: str) -> list[Number]:
    if t in ("f32", "f64"):
        return [s * x for x in EDGE_FLOATS for s in (1, -1)] + [math.nan]
    bits = BITS[t]
    near = [0, 1, 2, 7, 31, 32, 33, 63, 64, 255, 256, bits - 1, bits]
    ends = [(1 << bits) - 1, (1 << bits) - 2, (1 << (bits - 1)) - 1, 1 << (bits - 1)]
    return [wrap(x, t) for x in near + ends]


def random_bits(t: str, generator: random.Random) -> Number:
    bits = generator.getrandbits(BITS[t])
    unsigned = np.array([bits], dtype=f"u{BITS[t] // 8}")
    value = unsigned.view(dtype(t))[0]
    if t in ("f32", "f64") and generator.random() < 0.5:  # numbers that meet each other
        value = dtype(t).type(generator.uniform(-300, 300))
    return value


def inputs_of(case: Case, generator: random.Random) -> list[np.ndarray[Any, Any]]:
    columns: list[list[Number]] = [[] for _ in case.inputs]
    products = list(itertools.product(*map(edges, case.inputs)))
    rows = generator.sample(products, min(len(products), COUNT // 2))
    if len(case.inputs) == 2 and set(case.inputs) <= {"f32", "f64"}:
        rows += itertools.product(MEETING, MEETING)
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    for column, t in zip(columns, case.inputs, strict=True):
        column += [random_bits(t, generator) for _ in range(COUNT - len(column))]
    with np.errstate(all="ignore"):
        return [np.array(c, dtype=dtype(t)) for c, t in zip(columns, case.inputs, strict=True)]


@pytest.fixture(scope="module")
def program() -> Program:
    assert len({case.name for case in CASES}) == len(CASES)
    return Program("values", HEADER + "".join(map(kernel, CASES)))


@pytest.fixture(scope="module")
def seed() -> int:
    return random.SystemRandom().getrandbits(32)


def scalar(value: Number, t: str) -> Number:
    return value if t in ("f32", "f64") else int(value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.text} to {case.result}")
def test_values(program: Program, case: Case, seed: int) -> None:
    inputs = inputs_of(case, random.Random(seed))
    result = np.full(COUNT, 0x5A, dtype=dtype(case.result))
    assert program.run(case.name, [result, *inputs, *[0] * (4 - len(inputs))], threads=COUNT) == ""
    for index in range(COUNT):
        row = [scalar(array[index], t) for array, t in zip(inputs, case.inputs, strict=True)]
        with np.errstate(all="ignore"):
            wanted = case.expected(*row)
            if case.result in ("f32", "f64"):
                wanted = dtype(case.result).type(wanted)
                same = wanted.tobytes() == result[index].tobytes()
                same = same or (np.isnan(wanted) and np.isnan(result[index]))
            else:
                same = wrap(int(wanted), case.result) == int(result[index])
        assert same, f"seed {seed}: {case.text} of {row}: {result[index]!r}, wanted {wanted!r}"


@pytest.mark.parametrize(
    "text", ["add.f32 %d, %a, %b", "max.f32 %d, %a, %b", "div.rn.f32 %d, %a, %b"]
)
def test_nan_is_the_device_s(program: Program, text: str) -> None:
    case = next(case for case in CASES if case.text == text)
    nans = np.array([0x7FC00001] * COUNT, dtype=np.uint32)
    result = np.zeros(COUNT, dtype=np.uint32)
    assert program.run(case.name, [result, nans, nans, 0, 0], threads=COUNT) == ""
    assert set(result.tolist()) == {0x7FFFFFFF}
