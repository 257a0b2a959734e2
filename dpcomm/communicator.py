"""Collectives over arrays, without torch."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from dpcomm import _core
from dpcomm.device_arrays import caller_stream, empty_maker, on_device
from dpcomm.errors import UsageError
from dpcomm.stores import open_store

__all__ = ["Communicator", "Work"]

Work = _core.Work

# Closed before the interpreter goes, so that nothing waits for an operation then. A forked process
# inherits the list, but closes nothing: a communicator belongs to the process that made it.
_open: weakref.WeakSet[Communicator] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for communicator in list(_open):
        communicator.close()


_DEFAULT_TIMEOUT = 600.0


def _from_environment(name: str, given: int | None) -> int:
    if given is not None:
        return given
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise UsageError(f"{name.lower()} is not given and the environment has no {name}")
    return int(value)


def _default_init() -> str:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise UsageError(
            "init is not given and the environment has no MASTER_ADDR and MASTER_PORT; "
            "pass init='tcp://<host>:<port>', 'file://<folder>' or a store"
        )
    return f"tcp://{address}:{port}"


def _maker(
    array: Any, operation: str, stream: Any
) -> tuple[tuple[int, ...], Callable[[tuple[int, ...]], Any]]:
    """The shape of an array, and what makes a result of its kind: NumPy, or CuPy on a device."""
    if on_device(array):
        return empty_maker(array, operation, stream)
    import numpy

    try:
        seen = numpy.asarray(array)
    except Exception as error:
        raise UsageError(
            f"{operation}: NumPy cannot hold the result ({error}); pass out="
        ) from error
    if seen.dtype.hasobject:
        raise UsageError(f"{operation}: {type(array).__name__!r} is not an array")
    return seen.shape, lambda shape: numpy.empty(shape, seen.dtype)


def _checked(operation: str, counts: Sequence[int] | None, world: int) -> list[int]:
    """What the core takes for counts: a number for each rank, or nothing where all are equal.

    Raises:
        UsageError: It is no list of `world` sizes.
    """
    if counts is None:
        return []
    sizes = [int(count) for count in counts]
    if len(sizes) != world:
        raise UsageError(f"{operation}: {len(sizes)} counts for {world} ranks")
    if any(size < 0 or size >= 1 << 63 for size in sizes):
        raise UsageError(f"{operation}: counts {sizes} are no numbers of elements")
    return sizes


class Communicator:
    """The ranks of a group and the collectives that they run, all in the same order.

    Arrays are NumPy arrays, anything else with the buffer protocol, or anything with DLPack (torch,
    JAX): C-contiguous, of float32, float64, float16, bfloat16, int8, uint8, int16, int32, int64 or
    bool. Every collective blocks until the result is there, with the GIL released, unless
    ``async_op=True``, which returns a :class:`Work`. Any thread may call; the order of the calls
    must be the same on every rank.

    Arrays on a CUDA device (CuPy, torch, JAX, Numba, anything with DLPack or
    ``__cuda_array_interface__``) are worked on in the order of a stream, the caller's: the
    collective begins after all that this stream has been given before, the host waits for nothing,
    and what the stream gets afterwards sees the result. That holds for the call itself, or for
    ``Work.wait()`` where ``async_op=True``; :meth:`synchronize` and ``Work.synchronize()`` wait on
    the host, and raise what went wrong on the device. The caller's stream is the argument
    ``stream`` (a handle, or a stream of CuPy, torch, cuda.core or Numba); without it the current
    stream of CuPy or torch where the array is theirs, else the stream that the array's
    ``__cuda_array_interface__`` names, else the legacy default stream. Where ``stream`` is given,
    an array without DLPack is taken to be ready on it. Arrays are kept alive until the device is
    through with them. All arrays of a communicator lie on one device, the first one's.

    Args:
        rank, world_size: Of this process; default: ``RANK`` and ``WORLD_SIZE``.
        init: How ranks meet: ``"tcp://<host>:<port>"`` (rank 0 listens), ``"file://<folder>"`` (a
            fresh folder that all ranks see), or a store (torch's, or an object with set and get).
            Default: TCP at ``MASTER_ADDR:MASTER_PORT``.
        name: Tells communicators apart that use one store; unique per group and generation.
        wire: Lossiest wire format allowed: "native", "fp16", "bf16", "int8"; default
            ``DPCOMM_WIRE``.
        wire_links: "network" (default: a lossy wire only between hosts) or "all".
        algorithm: "auto" or a name of ``dpcomm.schedule.algorithms()``; default ``DPCOMM_ALGO``.
        transport: "auto", "shm" or "inproc" (ranks are threads of this process).
        timeout: Seconds that the start and each operation may take (600).

    Raises:
        UsageError: An argument makes no sense.
        TimeoutError: A rank did not come; the text names it.
    """

    def __init__(
        self,
        rank: int | None = None,
        world_size: int | None = None,
        init: Any = None,
        *,
        name: str = "default",
        wire: str | None = None,
        wire_links: str | None = None,
        algorithm: str | None = None,
        transport: str | None = None,
        timeout: float | None = None,
    ) -> None:
        rank = _from_environment("RANK", rank)
        world_size = _from_environment("WORLD_SIZE", world_size)
        owned = False
        if init is None and (world_size == 1 or transport == "inproc"):
            store: Any = _NoStore()
        else:
            store, owned = open_store(
                _default_init() if init is None else init, rank, timeout or _DEFAULT_TIMEOUT
            )
        try:
            self._core = _core.Communicator(
                rank,
                world_size,
                store,
                name,
                wire=wire,
                algorithm=algorithm,
                wire_links=wire_links,
                transport=transport,
                timeout=timeout,
            )
        finally:  # all ranks have met, or never will: nobody needs the store any more
            if owned and hasattr(store, "close"):
                store.close()
        self._name = name
        _open.add(self)

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self._core.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._core.world_size

    @_core._with_short_call
    def all_reduce(
        self,
        array: Any,
        op: str = "sum",
        *,
        out: Any = None,
        factor: float = 1.0,
        wire: str | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
        stream: Any = None,
    ) -> Any:
        """Reduces the arrays of all ranks; every rank gets the same bits.

        Args:
            array: The contribution, the same number of elements on every rank.
            op: "sum", "avg", "premul_sum", "product", "min", "max", "band", "bor", "bxor".
            out: Where the result goes, the same size and dtype; default: into ``array``.
            factor: Of "premul_sum": what every contribution is multiplied by first; the same on all
                ranks.
            wire, algorithm, timeout: For this call, in place of the communicator's.
            async_op: Return a :class:`Work` at once; the arrays must not be touched before its end.
            stream: The caller's CUDA stream, of arrays on a device (see above).

        Returns:
            ``out``, or ``array``; or a Work whose ``wait()`` returns it.

        Raises:
            UsageError: Before any byte is sent, or when ranks disagree (all ranks raise it). For
                one, arrays on a device where there is none ("no CUDA device: ...").
            PeerError, TimeoutError: A rank died or did not come; make a new communicator.
        """
        settings = _core.Settings(
            wire, algorithm, timeout, async_op, caller_stream(stream, array, out)
        )
        target = array if out is None else out
        return self._core.all_reduce(array, target, op=op, factor=factor, settings=settings)

    @_core._with_short_call
    def reduce(
        self,
        array: Any,
        root: int = 0,
        op: str = "sum",
        *,
        out: Any = None,
        factor: float = 1.0,
        wire: str | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
        stream: Any = None,
    ) -> Any:
        """Reduces the arrays of all ranks into ``root``'s ``out`` (default: its ``array``).

        The arrays of the other ranks are unchanged. Arguments and errors as in :meth:`all_reduce`.
        """
        settings = _core.Settings(
            wire, algorithm, timeout, async_op, caller_stream(stream, array, out)
        )
        target = (array if out is None else out) if self.rank == root else None
        return self._core.reduce(array, target, op=op, factor=factor, root=root, settings=settings)

    @_core._with_short_call
    def broadcast(
        self,
        array: Any,
        root: int = 0,
        *,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
        stream: Any = None,
    ) -> Any:
        """Copies ``root``'s array into everybody's, exactly. Errors as in :meth:`all_reduce`."""
        settings = _core.Settings(None, algorithm, timeout, async_op, caller_stream(stream, array))
        return self._core.broadcast(array, array, root=root, settings=settings)

    @_core._with_short_call
    def all_gather(
        self,
        array: Any,
        *,
        out: Any = None,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
        stream: Any = None,
    ) -> Any:
        """Concatenates the arrays of all ranks, in the order of ranks, exactly.

        Args:
            array: The contribution: the same number of elements on every rank, or ``counts[rank]``.
            out: ``world_size`` times as many elements, or ``sum(counts)``; ``array`` may be its own
                block of it. Default: a new NumPy array (CuPy's where ``array`` is one) of shape
                ``(world_size, *array.shape)``, or ``(sum(counts),)``.
            counts: Elements of each rank's array where they differ, alike on all ranks; zeros are
                allowed. On the CPU only.

        Returns:
            ``out``; or a Work whose ``wait()`` returns it. Other arguments and errors as in
            :meth:`all_reduce`; ranks that give different counts are a UsageError on all of them.
        """
        sizes = _checked("all_gather", counts, self.world_size)
        if out is None:
            shape, empty = _maker(array, "all_gather", stream)
            out = empty((self.world_size, *shape) if counts is None else (sum(sizes),))
        settings = _core.Settings(
            None, algorithm, timeout, async_op, caller_stream(stream, array, out)
        )
        return self._core.all_gather(array, out, settings=settings, counts=sizes)

    def gather(
        self,
        array: Any,
        root: int = 0,
        *,
        out: Any = None,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Concatenates the arrays of all ranks at ``root``, in the order of ranks, exactly.

        Arrays lie on the CPU. Cost: one message in flight from each rank; the root receives all.

        Args:
            array: The contribution: the same number of elements on every rank, or ``counts[rank]``.
            root: The rank that gets the result.
            out: At the root: ``world_size`` times as many elements, or ``sum(counts)``; ``array``
                may be its own block of it. Default: a new NumPy array of shape
                ``(world_size, *array.shape)``, or ``(sum(counts),)``. Elsewhere not looked at.
            counts: As in :meth:`all_gather`.

        Returns:
            ``out`` at the root, elsewhere ``array``; or a Work whose ``wait()`` returns that. Other
            arguments and errors as in :meth:`all_reduce`. Ranks other than the root may return
            before the root has called.
        """
        sizes = _checked("gather", counts, self.world_size)
        if self.rank != root:
            out = None
        elif out is None:
            shape, empty = _maker(array, "gather", None)
            out = empty((self.world_size, *shape) if counts is None else (sum(sizes),))
        settings = _core.Settings(None, algorithm, timeout, async_op)
        return self._core.gather(array, out, root=root, settings=settings, counts=sizes)

    def scatter(
        self,
        array: Any = None,
        root: int = 0,
        *,
        out: Any = None,
        counts: Sequence[int] | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Gives every rank its block of ``root``'s array, exactly.

        Arrays lie on the CPU. Cost: one message in flight to each rank; the root sends all.

        Args:
            array: At the root: ``world_size`` blocks one after another, or one of ``counts[r]``
                elements for each rank r. Elsewhere not looked at.
            root: The rank that has the blocks.
            out: One block, ``counts[rank]`` elements. At the root it may be the own block of
                ``array``; default there: a new NumPy array of shape
                ``(shape[0] // world_size, *shape[1:])``, or ``(counts[rank],)``. The other ranks
                have to give it.
            counts: As in :meth:`all_gather`.

        Returns:
            ``out``; or a Work whose ``wait()`` returns it. Other arguments and errors as in
            :meth:`all_reduce`. The root may return before the others have called.
        """
        sizes = _checked("scatter", counts, self.world_size)
        if self.rank != root:
            array = None
            if out is None:
                raise UsageError(f"scatter: rank {self.rank} is not the root and has to pass out=")
        elif out is None:
            out = self._own_block(array, "scatter", sizes, None)
        settings = _core.Settings(None, algorithm, timeout, async_op)
        return self._core.scatter(array, out, root=root, settings=settings, counts=sizes)

    def all_to_all(
        self,
        array: Any,
        *,
        out: Any = None,
        counts: Sequence[int] | None = None,
        recv_counts: Sequence[int] | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Sends block t of the array to rank t; block s of the result is what rank s sent, exactly.

        Arrays lie on the CPU. Cost: ``world_size - 1`` messages sent per rank and slot's worth of
        bytes, each to another rank.

        Args:
            array: ``world_size`` blocks one after another: of the same size on all ranks, or of
                ``counts[t]`` elements for rank t.
            out: As many elements, or ``sum(recv_counts)``; never a part of ``array``. Default: a
                new NumPy array of the shape of ``array``, or ``(sum(recv_counts),)``.
            counts: Elements that this rank sends to each rank, where they differ; zeros are
                allowed. Given together with ``recv_counts``.
            recv_counts: Elements that this rank receives from each rank.

        Returns:
            ``out``; or a Work whose ``wait()`` returns it. Other arguments and errors as in
            :meth:`all_reduce`. Where a rank sends another number than its peer expects, both raise
            a UsageError that names them.
        """
        sent = _checked("all_to_all", counts, self.world_size)
        received = _checked("all_to_all", recv_counts, self.world_size)
        if out is None:
            shape, empty = _maker(array, "all_to_all", None)
            out = empty(shape if recv_counts is None else (sum(received),))
        settings = _core.Settings(None, algorithm, timeout, async_op)
        return self._core.all_to_all(
            array, out, settings=settings, counts=sent, recv_counts=received
        )

    @_core._with_short_call
    def reduce_scatter(
        self,
        array: Any,
        op: str = "sum",
        *,
        out: Any = None,
        counts: Sequence[int] | None = None,
        factor: float = 1.0,
        wire: str | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
        stream: Any = None,
    ) -> Any:
        """Reduces the arrays of all ranks and leaves block ``rank`` of the result on each rank.

        Args:
            array: ``world_size`` blocks one after another.
            out: One block; it may be the own block of ``array``. Default: a new NumPy array (CuPy's
                where ``array`` is one) of shape ``(shape[0] // world_size, *shape[1:])``, or
                ``(counts[rank],)``.
            counts: Elements of each block where they differ; as in :meth:`all_gather`.

        Returns:
            ``out``; or a Work whose ``wait()`` returns it. Other arguments and errors as in
            :meth:`all_reduce`.
        """
        sizes = _checked("reduce_scatter", counts, self.world_size)
        if out is None:
            out = self._own_block(array, "reduce_scatter", sizes, stream)
        settings = _core.Settings(
            wire, algorithm, timeout, async_op, caller_stream(stream, array, out)
        )
        return self._core.reduce_scatter(
            array, out, op=op, factor=factor, settings=settings, counts=sizes
        )

    def _own_block(self, array: Any, operation: str, sizes: Sequence[int], stream: Any) -> Any:
        """A new array for this rank's block of `array`."""
        shape, empty = _maker(array, operation, stream)
        if sizes:
            return empty((sizes[self.rank],))
        if not shape or shape[0] % self.world_size:
            raise UsageError(
                f"{operation}: the first dimension of shape {shape} is not a multiple "
                f"of {self.world_size} ranks; pass out="
            )
        return empty((shape[0] // self.world_size, *shape[1:]))

    def send(
        self,
        array: Any,
        peer: int,
        tag: int = 0,
        *,
        timeout: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Sends an array to another rank, exactly.

        Messages have no part in the order of collectives: they go on beside them and beside each
        other. The n-th send to a rank with a tag meets that rank's n-th receive from here with the
        tag; different tags come in any order.

        Args:
            array: On the CPU; read-only is enough.
            peer: The rank that receives; not this one.
            tag: 0 to 2^32 - 1.
            timeout: For this call, in seconds, in place of the communicator's.
            async_op: Return a :class:`Work` at once; the array must not be changed before its end.

        Returns:
            None once the array is the caller's again, which says that the peer has asked for it; or
            a Work.

        Raises:
            UsageError: An argument makes no sense, or the receive is of another size in bytes (both
                ranks raise it).
            PeerError, TimeoutError: A rank died, or nobody received; make a new communicator.
        """
        settings = _core.Settings(None, None, timeout, async_op)
        return self._core.send(array, peer, tag, settings)

    def recv(
        self,
        array: Any,
        peer: int | None = None,
        tag: int = 0,
        *,
        timeout: float | None = None,
        async_op: bool = False,
    ) -> Any:
        """Receives into an array what another rank sends with the tag: as many bytes, exactly.

        Args:
            array: On the CPU, writable.
            peer: The rank that sends; None: any, whoever is first.

        Returns:
            The rank that sent; or a Work whose ``wait()`` returns it. Other arguments and errors as
            in :meth:`send`.
        """
        settings = _core.Settings(None, None, timeout, async_op)
        return self._core.recv(array, peer, tag, settings)

    @_core._with_short_call
    def barrier(self, timeout: float | None = None) -> None:
        """Returns once every rank has called it."""
        self._core.barrier(timeout)

    def synchronize(self, timeout: float | None = None) -> None:
        """Waits until the device is through with all that it was given; raises what went wrong.

        Args:
            timeout: Seconds; default: as long as the operations may take.

        Raises:
            TimeoutError: It was not complete in time and goes on; or a rank did not come.
            UsageError, PeerError, InternalError: What the operations ended with.
        """
        self._core.synchronize(timeout)

    @property
    def name(self) -> str:
        """What tells it apart from others that use the same store."""
        return self._name

    def stats(self) -> dict[str, Any]:
        """Counts since the start: operations, messages, bytes, wire_bytes sent, wait_ns, ...

        :func:`dpcomm.stats` is the same with a docstring for each.
        """
        return dict(self._core.stats())

    def abort(self, reason: str = "aborted by the user") -> None:
        """Ends all waits on every rank with a PeerError. From any thread; never blocks."""
        self._core.abort(f"rank {self.rank}: {reason}")

    def close(self) -> None:
        """Leaves the group and waits for nobody; operations in flight end with an error.

        May be called more than once.
        """
        self._core.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _NoStore:
    """For groups that need no store: one rank, or threads of one process."""

    def set(self, key: str, value: bytes) -> None:
        pass

    def get(self, key: str, timeout: float) -> bytes | None:
        return b"ok"
