"""The fake CUDA runtime from Python, for ranks of a test: memory, streams, events and graphs."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import gpu_runtime
from gpu_runtime import Array, CudaError, Pointer

GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
NO_TIMING = 2
NOT_READY = 600
VARIABLE = "FAKE_CUDA_LIBRARY"  # names the library to the ranks


class Runtime(gpu_runtime.Runtime):
    """Besides what the GPU check needs: pinned memory, work that takes its time, order."""

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

    def fill(self, address: int, value: int, size_bytes: int, stream: int) -> None:
        """In stream order."""
        size = ctypes.c_size_t(size_bytes)
        self.call("cudaMemsetAsync", Pointer(address), value, size, Pointer(stream))

    def sleep(self, stream: int, seconds: float) -> None:
        """In stream order."""
        function = ctypes.cast(ctypes.CDLL(None).usleep, Pointer)
        self.call("cudaLaunchHostFunc", Pointer(stream), function, Pointer(int(seconds * 1e6)))

    def destroy_stream(self, stream: int) -> None:
        self.call("cudaStreamDestroy", Pointer(stream))

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

    def wait(self, stream: int, event: int) -> None:
        self.call("cudaStreamWaitEvent", Pointer(stream), Pointer(event), 0)

    def begin_capture(self, stream: int, mode: int = GLOBAL) -> None:
        super().begin_capture(stream, mode)

    def destroy_graph(self, executable: int) -> None:
        self.call("cudaGraphExecDestroy", Pointer(executable))
