"""What collectives take from arrays on a device: DLPack, __cuda_array_interface__, streams."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stand_in_array import (
    COPIED,
    CUDA_HOST,
    CUDA_MANAGED,
    DTYPES,
    READ_ONLY,
    ROCM,
    DLPackArray,
    InterfaceArray,
)

from dpcomm import Communicator, _core
from dpcomm.device_arrays import caller_stream, empty_maker, on_device, stream_handle
from dpcomm.errors import UsageError

ADDRESS = 0x7F0000001000  # nobody looks there


@pytest.fixture
def alone() -> Any:
    with Communicator(0, 1) as made:
        yield made


# --- DLPack ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [None, (1, 0), (1, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dlpack(dtype: str, version: tuple[int, int] | None) -> None:
    array = DLPackArray(ADDRESS, (3, 5), dtype, version=version, device=(2, 1), byte_offset=16)
    seen = _core.describe_array(array, writable=True, stream=0x77)
    assert seen == (ADDRESS + 16, 15, dtype, "CUDA device 1")
    assert array.streams == [0x77]  # before the consumer's stream, not another one
    assert array.released == 1


def test_dlpack_takes_one_for_the_legacy_default_stream() -> None:
    array = DLPackArray(ADDRESS, (2,))
    _core.describe_array(array)
    assert array.streams == [1]  # the protocol has no 0


def test_dlpack_on_the_host() -> None:
    array = DLPackArray(ADDRESS, (2,), device=(CUDA_HOST, 0))
    assert _core.describe_array(array, stream=5) == (ADDRESS, 2, "float32", "the CPU")
    assert array.streams == [None]


def test_managed_memory_belongs_to_no_device() -> None:
    array = DLPackArray(ADDRESS, (2,), device=(CUDA_MANAGED, 3))
    assert _core.describe_array(array)[3] == "a CUDA device"


@pytest.mark.parametrize("strides", [None, (6, 3, 1), (17, 3, 1)])
def test_contiguous_strides(strides: tuple[int, ...] | None) -> None:
    array = DLPackArray(ADDRESS, (1, 2, 3), strides=strides)  # that of one row does not matter
    assert _core.describe_array(array)[1] == 6


@pytest.mark.parametrize(
    ("changes", "writable", "text"),
    [
        ({"strides": (1, 2)}, False, "the array is not C-contiguous; pass a contiguous copy"),
        ({"strides": (-3, 1)}, False, "not C-contiguous"),
        ({"flags": READ_ONLY}, True, "the array is read-only"),
        ({"flags": COPIED}, True, "gives a copy of it"),
        ({"version": (2, 0)}, False, "comes as DLPack 2.0; dpcomm knows version 1"),
    ],
)
def test_refused_and_not_held(changes: dict[str, Any], writable: bool, text: str) -> None:
    array = DLPackArray(ADDRESS, (2, 3), **changes)
    with pytest.raises(UsageError, match=text):
        _core.describe_array(array, writable)
    assert array.released == 1


@pytest.mark.parametrize(("device", "text"), [(ROCM, "a ROCm device"), (7, "type 7 of DLPack")])
def test_other_devices(device: int, text: str) -> None:
    array = DLPackArray(ADDRESS, (2,), device=(device, 0))
    with pytest.raises(UsageError, match=text):
        _core.describe_array(array)
    assert array.streams == []


def test_a_read_only_array_can_be_an_input() -> None:
    array = DLPackArray(ADDRESS, (2,), flags=READ_ONLY)
    assert _core.describe_array(array, writable=False)[0] == ADDRESS


@pytest.mark.parametrize(
    ("code", "bits", "lanes"), [(5, 64, 1), (1, 16, 1), (2, 32, 2), (2, 8, 1), (6, 16, 1)]
)
def test_other_dtypes(code: int, bits: int, lanes: int) -> None:
    array = DLPackArray(ADDRESS, (2,))
    array.tensor.code, array.tensor.bits, array.tensor.lanes = code, bits, lanes
    with pytest.raises(UsageError, match=f"code {code} of {bits} bits is not supported"):
        _core.describe_array(array)


def test_what_the_library_raises_comes_through() -> None:
    def refuse(_: int | None) -> None:
        raise BufferError("needs a gradient")

    with pytest.raises(BufferError, match="needs a gradient"):
        _core.describe_array(DLPackArray(ADDRESS, (2,), order=refuse))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert _core.describe_array(DLPackArray(0, shape, strides=(5,) * len(shape)))[1] == 0
    assert _core.describe_array(InterfaceArray(ADDRESS, shape))[:2] == (0, 0)


def test_a_scalar() -> None:
    assert _core.describe_array(DLPackArray(ADDRESS, ()))[1] == 1
    assert _core.describe_array(InterfaceArray(ADDRESS, ()))[1] == 1


# --- __cuda_array_interface__ ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_interface(dtype: str) -> None:
    array = InterfaceArray(ADDRESS, (3, 5), dtype)
    assert _core.describe_array(array, writable=True) == (ADDRESS, 15, dtype, "a CUDA device")


@pytest.mark.parametrize("device", [3, SimpleNamespace(id=3)])
def test_interface_with_a_device(device: Any) -> None:
    array = InterfaceArray(ADDRESS, (2,))
    array.device = device
    assert _core.describe_array(array)[3] == "CUDA device 3"


def test_interface_with_strides_in_bytes() -> None:
    assert _core.describe_array(InterfaceArray(ADDRESS, (2, 3), strides=(12, 4)))[1] == 6


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"strides": (4, 8)}, "not C-contiguous"),
        ({"strides": (3, 1)}, "not C-contiguous"),
        ({"strides": (4,)}, "strides of another shape"),
        ({"data": (ADDRESS, True)}, "the array is read-only"),
        ({"mask": object()}, "an array with a mask is not supported"),
        ({"typestr": ">f4"}, "dtype '>f4' is not supported"),
        ({"typestr": "<c8"}, "dtype '<c8' is not supported"),
        ({"typestr": "<u4"}, "dtype '<u4' is not supported"),
        ({"typestr": "<V2"}, "dtype '<V2' is not supported"),
        ({"typestr": "|V16"}, "is not supported"),
        ({"typestr": ""}, "is not supported"),
        ({"shape": (-1, 3)}, "a negative dimension"),
    ],
)
def test_interface_refused(changes: dict[str, Any], text: str) -> None:
    array = InterfaceArray(ADDRESS, (2, 3))
    array.__cuda_array_interface__.update(changes)
    with pytest.raises(UsageError, match=text):
        _core.describe_array(array, writable=True)


@pytest.mark.parametrize("key", ["shape", "typestr", "data"])
def test_interface_with_a_part_missing(key: str) -> None:
    array = InterfaceArray(ADDRESS, (2, 3))
    del array.__cuda_array_interface__[key]
    with pytest.raises(UsageError, match=f"InterfaceArray' has no {key}"):
        _core.describe_array(array)


# --- streams --------------------------------------------------------------------------------------


class _Protocol:
    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 0x40


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (0, 0),
        (1, 1),
        (2, 2),
        (0xDEAD0, 0xDEAD0),
        (SimpleNamespace(ptr=0x10), 0x10),
        (SimpleNamespace(cuda_stream=0x20), 0x20),
        (SimpleNamespace(handle=SimpleNamespace(value=0x30)), 0x30),
        (SimpleNamespace(handle=SimpleNamespace(value=None)), 0),
        (_Protocol(), 0x40),
        (SimpleNamespace(__cuda_stream__=(0, 0x50)), 0x50),
    ],
)
def test_stream_handles(stream: Any, handle: int) -> None:
    assert stream_handle(stream) == handle


@pytest.mark.parametrize(
    "stream", [-1, 1 << 64, True, "0", object(), SimpleNamespace(__cuda_stream__=4)]
)
def test_what_is_no_stream(stream: Any) -> None:
    with pytest.raises(UsageError, match=r"is not a CUDA stream|__cuda_stream__ of"):
        stream_handle(stream)


def test_an_explicit_stream_wins() -> None:
    assert caller_stream(9, InterfaceArray(ADDRESS, (2,), stream=5), None) == 9


def test_the_stream_that_the_array_names() -> None:
    ours, none = InterfaceArray(ADDRESS, (2,), stream=5), InterfaceArray(ADDRESS, (2,))
    assert caller_stream(None, ours, None) == 5
    assert caller_stream(None, none, ours) == 5
    assert caller_stream(None, none, none) == 0
    assert caller_stream(None, np.ones(2), None) == 0
    legacy = InterfaceArray(ADDRESS, (2,), stream=1)
    assert caller_stream(None, legacy, legacy) == 1
    with pytest.raises(UsageError, match=r"different streams \(0x5 and 0x1\); pass stream="):
        caller_stream(None, ours, legacy)
    with pytest.raises(UsageError, match="stream 0 is ambiguous"):
        caller_stream(None, InterfaceArray(ADDRESS, (2,), stream=0))


class _Device:
    """A device of the fake CuPy: a context in which it is the current one."""

    current = threading.local()

    def __init__(self, ordinal: int) -> None:
        self.id = ordinal

    def __enter__(self) -> None:
        _Device.current.ordinal = self.id

    def __exit__(self, *_: object) -> None:
        _Device.current.ordinal = 0


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What of CuPy dpcomm uses; the current stream of device d is 0x100 + d."""
    module = ModuleType("cupy")

    class NDArray(InterfaceArray):
        def __init__(self, shape: tuple[int, ...], dtype: str, ordinal: int) -> None:
            super().__init__(ADDRESS, shape, dtype, stream=0x5)
            self.device, self.dtype = _Device(ordinal), dtype

    chosen: list[int] = []

    class Stream:
        def __init__(self, handle: int) -> None:
            self._handle = handle

        def __enter__(self) -> None:
            chosen.append(self._handle)

        def __exit__(self, *_: object) -> None:
            chosen.pop()

    def current_stream() -> Any:
        own = 0x100 + getattr(_Device.current, "ordinal", 0)
        return SimpleNamespace(ptr=chosen[-1] if chosen else own)

    def empty(shape: tuple[int, ...], dtype: str) -> Any:
        made = NDArray(shape, dtype, _Device.current.ordinal)
        made.made_on = current_stream().ptr  # type: ignore[attr-defined]
        return made

    module.ndarray = NDArray  # type: ignore[attr-defined]
    module.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        get_current_stream=current_stream,
        ExternalStream=Stream,
        Stream=SimpleNamespace(null=Stream(0)),
    )
    module.empty = empty  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_the_current_stream_of_cupy(cupy: Any) -> None:
    assert caller_stream(None, cupy.ndarray((2,), "float32", 0), None) == 0x100
    assert caller_stream(None, cupy.ndarray((2,), "float32", 3), None) == 0x103
    assert caller_stream(SimpleNamespace(ptr=7), cupy.ndarray((2,), "float32", 3)) == 7


def test_results_are_made_by_cupy_where_it_made_the_array(cupy: Any) -> None:
    for stream, expected in ((None, 0x103), (7, 7), (0, 0), (1, 0)):
        shape, empty = empty_maker(cupy.ndarray((2, 3), "int64", 3), "all_gather", stream)
        made = empty((4, *shape))
        assert isinstance(made, cupy.ndarray)
        assert (made.shape, made.dtype, made.device.id) == ((4, 2, 3), "int64", 3)
        assert made.made_on == expected


def test_other_results_have_to_be_given(alone: Communicator) -> None:
    for array in (InterfaceArray(ADDRESS, (2,)), DLPackArray(ADDRESS, (2,))):
        for collective in (alone.all_gather, alone.reduce_scatter):
            with pytest.raises(UsageError, match="on a device for the result; pass out="):
                collective(array)


def test_where_arrays_lie() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for array in (np.ones(2), torch.ones(2), bytearray(2), DLPackArray(1, (2,), device=(1, 0))):
        assert not on_device(array)
        assert caller_stream(None, array) == 0
    managed = DLPackArray(ADDRESS, (2,), device=(CUDA_MANAGED, 0))
    for array in (managed, DLPackArray(ADDRESS, (2,)), InterfaceArray(ADDRESS, (2,))):
        assert on_device(array)


# --- in a communicator ----------------------------------------------------------------------------


def test_mixed_places(alone: Communicator) -> None:
    here = np.ones(2, np.float32)
    with pytest.raises(UsageError, match="input lies on CUDA device 1, output on the CPU"):
        alone.all_reduce(DLPackArray(ADDRESS, (2,), device=(2, 1)), out=here)
    with pytest.raises(UsageError, match="input lies on the CPU, output on a CUDA device"):
        alone.all_reduce(here, out=InterfaceArray(ADDRESS, (2,)))
    first, second = (DLPackArray(ADDRESS, (2,), device=(2, n)) for n in (1, 2))
    with pytest.raises(UsageError, match="input lies on CUDA device 1, output on CUDA device 2"):
        alone.all_reduce(first, out=second)
    assert (first.released, second.released) == (1, 1)


def test_without_a_device(alone: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DPCOMM_CUDA_LIBRARY", raising=False)
    if _has_a_device():
        pytest.skip("there is a device")
    array = DLPackArray(ADDRESS, (2,))
    for async_op in (False, True):
        with pytest.raises(UsageError, match="no CUDA device: "):
            alone.all_reduce(array, async_op=async_op)
    assert array.released == 4  # as input and as output
    alone.all_reduce(np.ones(2))  # it goes on
    alone.synchronize()


def _has_a_device() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def test_a_refused_array_on_a_device_is_not_held(alone: Communicator) -> None:
    array = InterfaceArray(ADDRESS, (2, 3), strides=(4, 8))
    gone = weakref.ref(array)
    with pytest.raises(UsageError, match="not C-contiguous"):
        alone.all_reduce(array)
    del array
    gc.collect()
    assert gone() is None


def test_importing_dpcomm_imports_no_library_of_arrays() -> None:
    import subprocess

    code = "import sys, dpcomm; print([m for m in ('cupy', 'numba', 'torch') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
