"""The choice of instruction set, and what the bindings refuse."""

from __future__ import annotations

import numpy as np
import pytest

from dpcomm import _core
from dpcomm.errors import UsageError
from dpcomm.oracle import wire as oracle


def test_scalar_is_always_there_and_auto_takes_the_best(monkeypatch):
    monkeypatch.delenv("DPCOMM_ISA", raising=False)
    assert _core.wire_isas()[0] == "scalar"
    assert _core.wire_best_isa() == _core.wire_isas()[-1]


def test_the_variable_decides(monkeypatch):
    for isa in _core.wire_isas():
        monkeypatch.setenv("DPCOMM_ISA", isa)
        assert _core.wire_best_isa() == isa
    monkeypatch.setenv("DPCOMM_ISA", "sse9")
    with pytest.raises(UsageError, match="DPCOMM_ISA=sse9"):
        _core.wire_best_isa()


@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["float64", "int32", "bool"])
def test_a_lossy_wire_carries_fp32_and_narrower_only(wire, dtype):
    with pytest.raises(UsageError):
        _core.wire_slice_bytes(wire, dtype, 8)


@pytest.mark.parametrize("dtype", oracle.DTYPES)
@pytest.mark.parametrize("op", oracle.OPS)
def test_which_operators_combine(kernels, dtype, op):
    acc = np.zeros(4, oracle.accumulator_dtype(dtype))
    tensor = np.zeros(4, oracle.tensor_dtype(dtype))
    call = ("native", dtype, kernels.isa, op, acc, tensor, 4, 0, 4)
    if op in ("avg", "premul_sum") or not oracle.is_supported(op, dtype):
        with pytest.raises(UsageError):
            _core.wire_combine(*call)
    else:
        _core.wire_combine(*call)


def test_tiles_and_buffers_are_checked():
    acc, base = np.zeros(1024, np.float32), np.zeros(4096, np.uint8)
    with pytest.raises(UsageError, match="tile"):
        _core.wire_load("fp16", "float32", "scalar", acc, base, 1024, 100, 512)
    with pytest.raises(UsageError, match="tile"):
        _core.wire_load("fp16", "float32", "scalar", acc, base, 1024, 512, 513)
    with pytest.raises(UsageError, match="bytes"):
        _core.wire_load("native", "float32", "scalar", acc[:3], base, 4, 0, 4)
    with pytest.raises(UsageError, match=r"wire format .* is not known"):
        _core.wire_slice_bytes("fp8", "float32", 1)


@pytest.mark.parametrize("wire", oracle.WIRES)
def test_slice_bytes(wire):
    for total in [0, 1, 127, 128, 129, 511, 512, 513, 8192, 8193, 10**9 + 7]:
        want = oracle.slice_bytes(wire, "float32", total)
        assert _core.wire_slice_bytes(wire, "float32", total) == want
    assert _core.wire_slice_bytes("fp16", "float32", 513) == 16 + 2 * 513
    assert _core.wire_slice_bytes("fp16", "float32", 512 * 16 + 1) == 32 + 2 * (512 * 16 + 1)
    assert _core.wire_slice_bytes("int8", "float32", 129) == 16 + 129
    assert _core.wire_slice_bytes("bf16", "float32", 129) == 258
