"""Codecs under test: one fixture per instruction set that this machine has."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings

from dpcomm import _core
from dpcomm.oracle import wire as oracle

settings.register_profile(
    "wire",
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("wire")

Array = npt.NDArray[Any]
POISON = 0xA5
GUARD = 64


class Guarded:
    """`size` poisoned bytes at an offset from 64-byte alignment, with guards on both sides."""

    def __init__(self, size: int, offset: int = 0) -> None:
        raw = np.full(size + 2 * GUARD + 64 + offset, POISON, np.uint8)
        start = GUARD + (-(raw.ctypes.data + GUARD)) % 64 + offset
        self._raw = raw
        self._start, self._end = start, start + size
        self.bytes: Array = raw[start : start + size]

    def fill(self, values: Array) -> Guarded:
        self.bytes[:] = np.ascontiguousarray(values).view(np.uint8)
        return self

    def check(self) -> None:
        """Fails if anything was written outside."""
        assert (self._raw[: self._start] == POISON).all(), "written before the buffer"
        assert (self._raw[self._end :] == POISON).all(), "written behind the buffer"


class Kernels:
    """The codecs of one instruction set, on arrays, each call into guarded and poisoned memory.

    `tile` splits a call into tiles of that many elements, `offset` moves tensors off alignment.
    """

    def __init__(self, isa: str) -> None:
        self.isa = isa

    def tiles(self, total: int, tile: int | None) -> list[tuple[int, int]]:
        step = tile or max(total, 1)
        return [(first, min(step, total - first)) for first in range(0, total, step)]

    def encode(
        self, wire: str, dtype: str, acc: Array, tile: int | None = None, offset: int = 0
    ) -> Array:
        return self._store(wire, dtype, acc, tile, offset, keep=False)[0]

    def keep(self, wire: str, dtype: str, acc: Array, tile: int | None = None) -> Array:
        """What acc becomes with `keep`."""
        return self._store(wire, dtype, acc, tile, 0, keep=True)[1]

    def _store(
        self, wire: str, dtype: str, acc: Array, tile: int | None, offset: int, keep: bool
    ) -> tuple[Array, Array]:
        total = acc.size
        out = Guarded(_core.wire_slice_bytes(wire, dtype, total), offset)
        mine = Guarded(acc.nbytes).fill(acc)
        for first, n in self.tiles(total, tile):
            part = mine.bytes[first * acc.itemsize : (first + n) * acc.itemsize]
            _core.wire_store(wire, dtype, self.isa, out.bytes, part, total, first, n, keep)
        out.check()
        mine.check()
        after = mine.bytes.view(acc.dtype)
        if not keep:
            assert_same_bits(after, acc)
        return out.bytes.copy(), after.copy()

    def decode(
        self,
        wire: str,
        dtype: str,
        data: Array,
        total: int,
        tile: int | None = None,
        offset: int = 0,
    ) -> Array:
        return self._read(wire, dtype, None, None, data, total, tile, offset)

    def combine(
        self,
        wire: str,
        dtype: str,
        op: str,
        acc: Array,
        data: Array,
        tile: int | None = None,
        offset: int = 0,
    ) -> Array:
        return self._read(wire, dtype, op, acc, data, acc.size, tile, offset)

    def _read(
        self,
        wire: str,
        dtype: str,
        op: str | None,
        acc: Array | None,
        data: Array,
        total: int,
        tile: int | None,
        offset: int,
    ) -> Array:
        kind = oracle.accumulator_dtype(dtype)
        source = Guarded(data.nbytes, offset).fill(data)
        out = Guarded(total * kind.itemsize)
        if acc is not None:
            out.fill(acc)
        for first, n in self.tiles(total, tile):
            part = out.bytes[first * kind.itemsize : (first + n) * kind.itemsize]
            at = (part, source.bytes, total, first, n)
            if op is None:
                _core.wire_load(wire, dtype, self.isa, *at)
            else:
                _core.wire_combine(wire, dtype, self.isa, op, *at)
        out.check()
        assert_same_bits(source.bytes, np.ascontiguousarray(data).view(np.uint8))
        return out.bytes.view(kind).copy()


def bits_of(values: Array) -> Array:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def assert_same_bits(got: Array, want: Array, nan_is_nan: bool = False) -> None:
    """Bit for bit; with `nan_is_nan` any NaN equals any other."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    same = bits_of(got) == bits_of(want)
    if nan_is_nan and got.dtype.kind == "f":
        same |= np.isnan(got) & np.isnan(want)
    bad = np.flatnonzero(~same)
    assert bad.size == 0, (
        f"{bad.size} of {same.size} differ, first at {bad[0]}: "
        f"{got[bad[0]]!r} ({bits_of(got)[bad[0]]:#x}), "
        f"wanted {want[bad[0]]!r} ({bits_of(want)[bad[0]]:#x})"
    )


@pytest.fixture(scope="session", params=_core.wire_isas())
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(request.param)


@pytest.fixture(scope="session")
def same_bits() -> Any:
    return assert_same_bits
