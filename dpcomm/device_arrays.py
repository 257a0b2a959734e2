"""Arrays on a CUDA device: on which stream their owner works, and what a result is made of.

Nothing here imports a library of arrays: the one that made an array is there already.
"""

from __future__ import annotations

import sys
from typing import Any

from dpcomm.errors import UsageError

__all__ = ["caller_stream", "empty_maker", "on_device", "stream_handle"]

_CUDA, _CUDA_MANAGED = 2, 13  # kDLCUDA, kDLCUDAManaged


def stream_handle(stream: Any) -> int:
    """The ``cudaStream_t`` of a stream, as a number.

    Args:
        stream: A handle (0 and 1: the legacy default stream, 2: the per-thread one); or an object
            with the protocol ``__cuda_stream__`` (cuda.core), with ``cuda_stream`` (torch) or with
            ``ptr`` (CuPy); or one that ``int()`` takes (Numba's ``handle``).

    Raises:
        UsageError: It is none of these.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return _checked(stream, stream)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        pair = protocol() if callable(protocol) else protocol
        if not isinstance(pair, tuple) or len(pair) < 2:
            raise UsageError(f"__cuda_stream__ of {stream!r} gives {pair!r}, not (version, handle)")
        return _checked(int(pair[1]), stream)
    for name in ("cuda_stream", "ptr", "handle"):
        value = getattr(stream, name, None)
        if value is not None:
            value = getattr(value, "value", value)  # a ctypes pointer; None is the default stream
            return _checked(int(value or 0), stream)
    raise UsageError(f"{type(stream).__name__!r} is not a CUDA stream")


def caller_stream(stream: Any, *arrays: Any) -> int:
    """The handle of the stream that a collective over these arrays is ordered on.

    An explicit stream wins; then comes the current stream of the library that made an array (CuPy,
    torch); then the stream that an array's ``__cuda_array_interface__`` names; then 0, the legacy
    default stream. Arrays on the CPU and None have no say.

    Raises:
        UsageError: No stream is given and the arrays name different ones.
    """
    if stream is not None:
        return stream_handle(stream)
    found: int | None = None
    for array in arrays:
        own = _stream_of(array)
        if own is None:
            continue
        if found is not None and _legacy(own) != _legacy(found):
            raise UsageError(
                f"the arrays belong to different streams ({found:#x} and {own:#x}); pass stream="
            )
        found = own
    return found or 0


def _checked(handle: int, stream: Any) -> int:
    if not 0 <= handle < 1 << 64:
        raise UsageError(f"{stream!r} is not a CUDA stream")
    return handle


def _legacy(handle: int) -> int:
    return 0 if handle == 1 else handle  # both are the legacy default stream


def on_device(array: Any) -> bool:
    """True for an array that says that it lies on a CUDA device."""
    if type(array).__module__ == "numpy":
        return False
    ask = getattr(array, "__dlpack_device__", None)
    if ask is not None:
        return int(ask()[0]) in (_CUDA, _CUDA_MANAGED)
    return hasattr(array, "__cuda_array_interface__")


def empty_maker(array: Any, operation: str, stream: Any) -> tuple[tuple[int, ...], Any]:
    """The shape of an array on a device, and a function that makes another one of a given shape.

    Args:
        stream: The caller's, or None for the library's current one: memory that work of one stream
            still uses must not be handed to another.

    Raises:
        UsageError: dpcomm cannot make arrays of this kind.
    """
    cupy = _library_of(array, "cupy", "ndarray")
    if cupy is None:
        raise UsageError(
            f"{operation}: dpcomm makes no {type(array).__name__!r} on a device for the result; "
            "pass out="
        )

    def empty(shape: tuple[int, ...]) -> Any:
        with array.device:
            if stream is None:
                return cupy.empty(shape, array.dtype)
            handle = _legacy(stream_handle(stream))
            with cupy.cuda.ExternalStream(handle) if handle else cupy.cuda.Stream.null:
                return cupy.empty(shape, array.dtype)

    return tuple(array.shape), empty


def _library_of(array: Any, library: str, kind: str) -> Any:
    """The library, if it is loaded and the array is of its kind; else None."""
    module = sys.modules.get(library)
    its_type = getattr(module, kind, None)
    return module if isinstance(its_type, type) and isinstance(array, its_type) else None


def _stream_of(array: Any) -> int | None:
    """The stream that an array on a device asks for, or None."""
    if type(array).__module__ in ("numpy", "builtins"):
        return None
    if (cupy := _library_of(array, "cupy", "ndarray")) is not None:
        with array.device:
            return int(cupy.cuda.get_current_stream().ptr)
    if (torch := _library_of(array, "torch", "Tensor")) is not None:
        return int(torch.cuda.current_stream(array.device).cuda_stream) if array.is_cuda else None
    interface = getattr(array, "__cuda_array_interface__", None)
    own = interface.get("stream") if isinstance(interface, dict) else None
    if own is None:
        return None
    if own == 0:
        raise UsageError("__cuda_array_interface__: stream 0 is ambiguous; it has to be 1 or 2")
    return _checked(int(own), own)
