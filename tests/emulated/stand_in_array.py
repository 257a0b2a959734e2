"""Arrays on a device, as libraries hand them over, without a library and without a device.

The memory is whatever address the caller has: host memory for tests of the reader, memory of the
emulated device for tests of the communicator. C structures of DLPack 0.x and 1.x.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

CUDA, CUDA_HOST, ROCM, CUDA_MANAGED = 2, 3, 10, 13
READ_ONLY, COPIED = 1, 2

# dtype -> (code of DLPack, bits, typestr of __cuda_array_interface__)
DTYPES = {
    "float32": (2, 32, "<f4"),
    "float64": (2, 64, "<f8"),
    "float16": (2, 16, "<f2"),
    "bfloat16": (4, 16, "<V2"),
    "int8": (0, 8, "|i1"),
    "uint8": (1, 8, "|u1"),
    "int16": (0, 16, "<i2"),
    "int32": (0, 32, "<i4"),
    "int64": (0, 64, "<i8"),
    "bool": (6, 8, "|b1"),
}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


#: Arrays that were handed over and not released: their owner may be gone before the reader is.
_lent: list[DLPackArray] = []

_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class DLPackArray:
    """An array with DLPack alone. `released` counts the calls of the deleter.

    Args:
        address, shape, dtype: What it is; `strides` in elements, or None.
        device: (type of DLPack, ordinal).
        version: (major, minor) of what it gives, or None for a library from before version 1.
        order: Called with the stream of each export.
    """

    def __init__(
        self,
        address: int,
        shape: Sequence[int],
        dtype: str = "float32",
        *,
        strides: Sequence[int] | None = None,
        byte_offset: int = 0,
        device: tuple[int, int] = (CUDA, 0),
        version: tuple[int, int] | None = (1, 0),
        flags: int = 0,
        order: Callable[[int | None], None] = lambda stream: None,
    ) -> None:
        self.shape = tuple(shape)
        self.released = 0
        self.streams: list[int | None] = []
        self._device, self._version, self._flags, self._order = device, version, flags, order
        self._deleter = _Deleter(self._release)
        self._exports: list[ctypes.Structure] = []
        code, bits, _ = DTYPES[dtype]
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * len(strides))(*strides)
        self.tensor = _Tensor(
            address, *device, len(shape), code, bits, 1, self._shape, self._strides, byte_offset
        )

    def _release(self, _: int) -> None:
        self.released += 1
        _lent.remove(self)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(self, *, stream: int | None = None, **keywords: Any) -> Any:
        asked = keywords.pop("max_version", None)
        if keywords or (self._version is None and asked is not None):
            raise TypeError("unexpected keyword argument")
        self.streams.append(stream)
        self._order(stream)
        deleter = ctypes.cast(self._deleter, ctypes.c_void_p)
        made: ctypes.Structure
        if self._version is not None and asked is not None:
            made = _Versioned(*self._version, None, deleter, self._flags, self.tensor)
            name = b"dltensor_versioned"
        else:
            made, name = _Managed(self.tensor, None, deleter), b"dltensor"
        self._exports.append(made)
        _lent.append(self)
        return _new_capsule(ctypes.addressof(made), name, None)


class InterfaceArray:
    """An array with __cuda_array_interface__ alone; `changes` replace or add entries of it."""

    def __init__(
        self, address: int, shape: Sequence[int], dtype: str = "float32", **changes: Any
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = f"stand_in.{dtype}"
        size = math.prod(shape)
        self.__cuda_array_interface__ = {
            "shape": self.shape,
            "typestr": DTYPES[dtype][2],
            "data": (address if size else 0, False),
            "version": 3,
            "strides": None,
            **changes,
        }
