"""The fake CUDA runtime from Python, for ranks of a test: memory, streams, events and graphs."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
TO_DEVICE, TO_HOST, ANY = 1, 2, 4
NON_BLOCKING, NO_TIMING = 1, 2
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
NOT_READY = 600
VARIABLE = "FAKE_CUDA_LIBRARY"  # names the library to the ranks

Pointer = ctypes.c_void_p


class CudaError(RuntimeError):
    """A call gave an error; `number` is CUDA's."""

    def __init__(self, call: str, number: int, text: str) -> None:
        super().__init__(f"{call}: {text} ({number})")
        self.number = number


class Runtime:
    """The calls that tests make, for one device. Streams, events and graphs are handles."""

    def __init__(self, device: int = 0, library: Path | None = None) -> None:
        self.library = ctypes.CDLL(str(library or os.environ[VARIABLE]))
        self.library.cudaGetErrorString.restype = ctypes.c_char_p
        self.device = device
        self.call("cudaSetDevice", device)

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.library, name)(*arguments)
        if error:
            text = self.library.cudaGetErrorString(error).decode()
            self.library.cudaGetLastError()
            raise CudaError(name, error, text)

    def made(self, name: str, *arguments: Any) -> int:
        """A call that gives a handle through its first argument."""
        handle = Pointer()
        self.call(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    # --- memory ---
    def allocate(self, size_bytes: int) -> int:
        return self.made("cudaMalloc", ctypes.c_size_t(max(size_bytes, 1)))

    def free(self, address: int) -> None:
        self.call("cudaFree", Pointer(address))

    def write(self, address: int, array: Array) -> None:
        """Complete on return."""
        data = np.ascontiguousarray(array)
        size = ctypes.c_size_t(data.nbytes)
        self.call("cudaMemcpy", Pointer(address), Pointer(data.ctypes.data), size, TO_DEVICE)

    def read(self, address: int, count: int, dtype: Any) -> Array:
        array = np.empty(count, dtype)
        size = ctypes.c_size_t(array.nbytes)
        self.call("cudaMemcpy", Pointer(array.ctypes.data), Pointer(address), size, TO_HOST)
        return array

    def pinned(self, array: Array) -> int:
        """A copy in pinned memory, for copies that are done when their turn comes."""
        size = array.nbytes
        address = self.made("cudaMallocHost", ctypes.c_size_t(max(size, 1)))
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, size)
        return address

    def host(self, address: int, count: int, dtype: Any) -> Array:
        """What lies in pinned memory."""
        array = np.empty(count, dtype)
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        return array

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """In stream order."""
        size = ctypes.c_size_t(size_bytes)
        self.call("cudaMemcpyAsync", Pointer(target), Pointer(source), size, ANY, Pointer(stream))

    def fill(self, address: int, value: int, size_bytes: int, stream: int) -> None:
        """In stream order."""
        size = ctypes.c_size_t(size_bytes)
        self.call("cudaMemsetAsync", Pointer(address), value, size, Pointer(stream))

    # --- order ---
    def stream(self, flags: int = NON_BLOCKING) -> int:
        return self.made("cudaStreamCreateWithFlags", flags)

    def sleep(self, stream: int, seconds: float) -> None:
        """In stream order."""
        function = ctypes.cast(ctypes.CDLL(None).usleep, Pointer)
        self.call("cudaLaunchHostFunc", Pointer(stream), function, Pointer(int(seconds * 1e6)))

    def destroy_stream(self, stream: int) -> None:
        self.call("cudaStreamDestroy", Pointer(stream))

    def synchronize(self, stream: int | None = None) -> None:
        if stream is None:
            self.call("cudaDeviceSynchronize")
        else:
            self.call("cudaStreamSynchronize", Pointer(stream))

    def idle(self, stream: int) -> bool:
        try:
            self.call("cudaStreamQuery", Pointer(stream))
        except CudaError as error:
            if error.number != NOT_READY:
                raise
            return False
        return True

    def event(self) -> int:
        return self.made("cudaEventCreateWithFlags", NO_TIMING)

    def record(self, event: int, stream: int) -> None:
        self.call("cudaEventRecord", Pointer(event), Pointer(stream))

    def wait(self, stream: int, event: int) -> None:
        self.call("cudaStreamWaitEvent", Pointer(stream), Pointer(event), 0)

    # --- graphs ---
    def begin_capture(self, stream: int, mode: int = GLOBAL) -> None:
        self.call("cudaStreamBeginCapture", Pointer(stream), mode)

    def end_capture(self, stream: int) -> int:
        """The executable graph; 0 or more nodes."""
        graph = Pointer()
        self.call("cudaStreamEndCapture", Pointer(stream), ctypes.byref(graph))
        executable = self.made("cudaGraphInstantiate", graph, ctypes.c_ulonglong(0))
        self.call("cudaGraphDestroy", graph)
        return executable

    def launch_graph(self, executable: int, stream: int) -> None:
        self.call("cudaGraphLaunch", Pointer(executable), Pointer(stream))

    def destroy_graph(self, executable: int) -> None:
        self.call("cudaGraphExecDestroy", Pointer(executable))
