"""Tensors and arrays in memory that the processes of a host share.

A collective can read a peer's tensor where it lies, with no copy in between, if every rank has its
tensor in this memory. It belongs to the process that asked for it; the ranks of a group map each
other's. Every block takes whole pages (4 KiB, aligned to 2 MiB from 2 MiB on) and goes back to the
system as soon as it is freed. Importing this module imports neither torch nor NumPy.

In a forked process the memory is the same memory, as after ``tensor.share_memory_()``: what either
process writes both read. It stays the parent's: once the parent has freed a tensor, the child must
not use it any more, and collectives of the child take it for ordinary memory. Pickling,
``torch.save`` and ``copy.deepcopy`` copy the values into ordinary memory. Sending a tensor by
torch.multiprocessing moves it to torch's own shared memory, as it does with every tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dpcomm.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["empty", "empty_array", "is_shared", "shared_memory"]


def empty(*size: int | Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """A new CPU tensor in shared memory, as ``torch.empty`` makes it.

    ``dpcomm.empty(1024, 1024)`` or ``dpcomm.empty((1024, 1024), dtype=torch.float16)``. Costs some
    system calls, and the zeroing of its pages. Any thread may call.

    Args:
        size: of each dimension; ints, or one sequence of them.
        dtype: default: torch's default dtype.

    Returns:
        A contiguous tensor of zeros, freed with its last view. If it is resized, it stays in shared
        memory.

    Raises:
        UsageError: the memory is not there, or a limit of the process forbids it; says what to do.
        ImportError: torch is missing or another than the one built for.
    """
    from dpcomm import backend

    shape: Any = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
    binding = backend.binding()
    import torch

    made: torch.Tensor = binding.shared_empty(
        shape, torch.get_default_dtype() if dtype is None else dtype
    )
    return made


def empty_array(shape: int | Sequence[int], dtype: Any = None) -> np.ndarray[Any, Any]:
    """A new NumPy array in shared memory, as ``numpy.empty`` makes it. Needs no torch.

    Args:
        shape: of the array.
        dtype: anything that NumPy takes for one (ml_dtypes' too), but no Python objects; default:
            float32.

    Returns:
        A C-contiguous array of zeros; the memory is freed with the last view of it.

    Raises:
        UsageError: the memory is not there, or a limit of the process forbids it; says what to do.
            Or a dtype with Python objects.
    """
    import numpy as np

    from dpcomm import _core

    chosen = np.dtype(np.float32 if dtype is None else dtype)
    if chosen.hasobject:
        raise UsageError(f"dtype={chosen} has Python objects, which cannot be shared")
    dimensions = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    count = math.prod(dimensions)
    if min(dimensions, default=0) < 0:
        raise UsageError(f"shape={shape} has a negative dimension")
    if count * chosen.itemsize == 0:
        return np.empty(dimensions, chosen)
    return np.ndarray(dimensions, chosen, buffer=_core.shared_block(count * chosen.itemsize))


def is_shared(array: Any) -> bool:
    """Whether a tensor or array lies in shared memory of dpcomm and of this process.

    Args:
        array: a torch tensor or a NumPy array. Views count as what they are views of.

    Returns:
        False also for empty ones, for tensors on other devices, and for those that a forked process
        has from its parent. Costs a microsecond.

    Raises:
        UsageError: for anything else than a tensor or array.
    """
    from dpcomm import _core

    if hasattr(array, "__array_interface__"):
        return array.size > 0 and _core.is_shared(array.__array_interface__["data"][0], 1)
    if not hasattr(array, "data_ptr"):
        raise UsageError(f"{type(array).__name__} is neither a tensor nor a NumPy array")
    if array.device.type != "cpu" or array.numel() == 0:
        return False
    return _core.is_shared(array.data_ptr(), 1)


@contextlib.contextmanager
def shared_memory() -> Iterator[None]:
    """Puts the CPU tensors that this thread makes inside into shared memory, from 1 MiB on.

    ``with dpcomm.shared_memory(): model = fully_shard(model)``: for code that makes its tensors
    itself. Whatever torch allocates for the CPU in this thread counts, temporaries too, so it
    belongs around what is communicated, not around a whole program: such a block costs more to make
    (its pages are reserved and zeroed at once) and to free. Smaller blocks, other threads and other
    devices are as ever. May be nested. DDP's buckets need none of it (``Options.shared_buckets``).

    Where the memory is not there, tensors are made in ordinary memory; the first time, a line on
    stderr says so.

    Raises:
        ImportError: torch is missing or another than the one built for.
    """
    from dpcomm import backend

    switch = backend.binding().set_thread_shared_memory
    previous = switch(True)
    try:
        yield
    finally:
        switch(previous)
