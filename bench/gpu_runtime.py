"""The few calls of CUDA's runtime that gpu_check.py and the tests make, by ctypes.

Streams, events and graphs are handles (numbers), memory is an address.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ANY_DIRECTION = 4  # cudaMemcpyDefault
NON_BLOCKING = 1
RELAXED = 2
MULTIPROCESSORS, MAJOR, MINOR, COOPERATIVE = 16, 75, 76, 95  # cudaDeviceAttr

Pointer = ctypes.c_void_p


class CudaError(RuntimeError):
    """A call of CUDA's gave an error; `number` is CUDA's, 0 where there is none."""

    def __init__(self, text: str, number: int = 0) -> None:
        super().__init__(text)
        self.number = number


def libraries() -> Iterator[Path | str]:
    """Where libcudart may be, likeliest first."""
    emulated = os.environ.get("FAKE_CUDA_LIBRARY")
    if emulated:
        yield emulated
        return
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    yield from sorted(packages.glob("*/lib/libcudart.so*"), reverse=True)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        for folder in ("lib64", "lib"):
            yield from sorted((Path(home or "/nowhere") / folder).glob("libcudart.so*"))
    found = ctypes.util.find_library("cudart")
    if found:
        yield found


def load(library: Path | None = None) -> ctypes.CDLL:
    """Raises CudaError with advice where there is none."""
    for path in (library,) if library else libraries():
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError:
            continue
        loaded.cudaGetErrorString.restype = ctypes.c_char_p
        return loaded
    raise CudaError("no libcudart: set CUDA_HOME, or pip install nvidia-cuda-runtime")


class Runtime:
    """One device of this process."""

    def __init__(self, device: int = 0, library: Path | None = None) -> None:
        self.library = load(library)
        self.device = device
        self.call("cudaSetDevice", device)

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.library, name)(*arguments)
        if error:
            text = self.library.cudaGetErrorString(error).decode()
            self.library.cudaGetLastError()
            raise CudaError(f"{name}: {text} ({error})", error)

    def made(self, name: str, *arguments: Any) -> int:
        """A call that gives a handle through its first argument."""
        handle = Pointer()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def number(self, name: str, *arguments: Any) -> int:
        """A call that gives an int through its first argument."""
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def attribute(self, which: int) -> int:
        return self.number("cudaDeviceGetAttribute", which, self.device)

    def name(self) -> str:
        properties = ctypes.create_string_buffer(16384)  # the name comes first
        try:
            self.call("cudaGetDeviceProperties", properties, self.device)
        except (CudaError, AttributeError):
            return "?"
        return properties.value.decode(errors="replace")

    # --- memory ---
    def allocate(self, size_bytes: int) -> int:
        return self.made("cudaMalloc", ctypes.c_size_t(max(size_bytes, 1)))

    def free(self, address: int) -> None:
        self.call("cudaFree", Pointer(address))

    def write(self, address: int, array: Array) -> None:
        """Complete on return."""
        data = np.ascontiguousarray(array)
        size = ctypes.c_size_t(data.nbytes)
        self.call("cudaMemcpy", Pointer(address), Pointer(data.ctypes.data), size, ANY_DIRECTION)

    def read(self, address: int, count: int, dtype: Any) -> Array:
        """Complete on return."""
        array = np.empty(count, dtype)
        size = ctypes.c_size_t(array.nbytes)
        self.call("cudaMemcpy", Pointer(array.ctypes.data), Pointer(address), size, ANY_DIRECTION)
        return array

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """In stream order."""
        size = ctypes.c_size_t(size_bytes)
        arguments = (Pointer(target), Pointer(source), size, ANY_DIRECTION, Pointer(stream))
        self.call("cudaMemcpyAsync", *arguments)

    # --- order and time ---
    def stream(self, flags: int = NON_BLOCKING) -> int:
        return self.made("cudaStreamCreateWithFlags", flags)

    def synchronize(self, stream: int | None = None) -> None:
        """Waits for a stream, or for the device."""
        if stream is None:
            self.call("cudaDeviceSynchronize")
        else:
            self.call("cudaStreamSynchronize", Pointer(stream))

    def event(self) -> int:
        return self.made("cudaEventCreate")

    def record(self, event: int, stream: int) -> None:
        self.call("cudaEventRecord", Pointer(event), Pointer(stream))

    def microseconds(self, start: int, end: int) -> float:
        """Between two events that are complete."""
        value = ctypes.c_float()
        self.call("cudaEventElapsedTime", ctypes.byref(value), Pointer(start), Pointer(end))
        return value.value * 1e3

    # --- graphs ---
    def begin_capture(self, stream: int, mode: int = RELAXED) -> None:
        self.call("cudaStreamBeginCapture", Pointer(stream), mode)

    def end_capture(self, stream: int) -> int:
        """The executable graph."""
        graph = Pointer()
        self.call("cudaStreamEndCapture", Pointer(stream), ctypes.byref(graph))
        executable = self.made("cudaGraphInstantiate", graph, ctypes.c_ulonglong(0))
        self.call("cudaGraphDestroy", graph)
        return executable

    def launch_graph(self, executable: int, stream: int) -> None:
        self.call("cudaGraphLaunch", Pointer(executable), Pointer(stream))


class DeviceArray:
    """Memory on a device with ``__cuda_array_interface__``, which dpcomm.Communicator takes."""

    def __init__(self, runtime: Runtime, array: Array) -> None:
        self.runtime, self.count, self.dtype = runtime, array.size, array.dtype
        self.device = runtime.device
        self.address = runtime.allocate(array.nbytes)
        runtime.write(self.address, array)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": (self.count,),
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "version": 3,
            "stream": None,
        }

    def write(self, array: Array) -> None:
        self.runtime.write(self.address, array)

    def read(self) -> Array:
        return self.runtime.read(self.address, self.count, self.dtype)

    def free(self) -> None:
        self.runtime.free(self.address)
