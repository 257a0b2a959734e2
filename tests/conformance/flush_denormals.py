"""The calling thread's flush-to-zero bits (MXCSR), as torch.set_flush_denormal sets them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
from collections.abc import Iterator

AVAILABLE = platform.machine() in ("x86_64", "AMD64")
_FLUSH = 0x8040  # FTZ and DAZ
_STORE, _LOAD = (
    b"\x0f\xae\x1f\xc3",
    b"\x0f\xae\x17\xc3",
)  # stmxcsr [rdi]; ret and ldmxcsr [rdi]; ret


def _machine_code() -> tuple[ctypes._CFunctionType, ctypes._CFunctionType, mmap.mmap]:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_STORE + _LOAD)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    kind = ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_uint32))
    return kind(address), kind(address + len(_STORE)), page


if AVAILABLE:
    _store, _load, _page = _machine_code()


def _get() -> int:
    value = ctypes.c_uint32()
    _store(ctypes.byref(value))
    return value.value


def is_flushing() -> bool:
    """Whether both bits are set in this thread."""
    return _get() & _FLUSH == _FLUSH


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    """Denormals are flushed in this thread."""
    before = _get()
    _load(ctypes.byref(ctypes.c_uint32(before | _FLUSH)))
    try:
        yield
    finally:
        _load(ctypes.byref(ctypes.c_uint32(before)))
