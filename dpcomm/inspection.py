"""What happened so far: counts of a group, and the last operations of this process."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dpcomm.errors import UsageError

if TYPE_CHECKING:
    from dpcomm.communicator import Communicator

__all__ = ["CollectiveStats", "Stats", "dump_flight_record", "flight_record", "stats"]


@dataclasses.dataclass(frozen=True)
class CollectiveStats:
    """Operations of one collective that are complete.

    Of operations on a device: that were given to it, without `wire_bytes` and `busy_ns`.

    Attributes:
        operations: their number.
        bytes: of this rank's tensors; of what has blocks, of one block.
        wire_bytes: sent by this rank.
        busy_ns: nanoseconds from where each began on this rank to where it ended.
    """

    operations: int
    bytes: int
    wire_bytes: int
    busy_ns: int


@dataclasses.dataclass(frozen=True)
class Stats:
    """Counts of a group on this rank since it was made.

    Attributes:
        operations: collectives that are complete.
        messages: sends and receives that are complete.
        bytes: of their tensors.
        wire_bytes: sent by this rank to others.
        wait_ns: nanoseconds in operations in which this rank had nothing to do but wait for others.
        exposed_wait_ns: nanoseconds that the program stood still: in synchronous calls, and in
            waits for asynchronous ones. What overlap has hidden is not in it.
        collectives: by name, of those that were called.
    """

    operations: int
    messages: int
    bytes: int
    wire_bytes: int
    wait_ns: int
    exposed_wait_ns: int
    collectives: dict[str, CollectiveStats]


def stats(group: Any = None) -> Stats:
    """Counts of a group.

    Args:
        group: a :class:`Communicator`, or a process group of torch with backend dpcomm; default:
            torch's default group.

    Raises:
        UsageError: there is no such group, or it has another backend.
    """
    from dpcomm.communicator import Communicator

    counts = dict(group.stats() if isinstance(group, Communicator) else _torch_stats(group))
    collectives = {
        name: CollectiveStats(**each) for name, each in counts.pop("collectives").items()
    }
    return Stats(messages=counts.pop("messages", 0), collectives=collectives, **counts)


def flight_record(group: Communicator | str | None = None) -> list[dict[str, Any]]:
    """The last operations of this process, of all its groups, oldest first.

    As many as DPCOMM_FLIGHT_RECORDER_SIZE said when the first group was made. Groups that are
    closed or failed are there too. May be called at any time, from any thread.

    Args:
        group: only those of this group: a name, or a :class:`Communicator`.

    Returns:
        A dict for each, of values that JSON knows: ``rank`` (global), ``id`` (number on this rank),
        ``group`` (name), ``group_ranks`` (global), ``name`` ("all_reduce", "send"), ``sequence``
        (number in its group), ``state`` ("scheduled": it waits for those before it; "started";
        "completed"; on a device when the host noticed it, in a graph always "scheduled"),
        ``error`` (text or None), ``dtype``, ``input_elems``, ``output_elems``, ``op``,
        ``algorithm``, ``wire``, ``peer`` (root, or the other rank of a message, in the group),
        ``tag``, ``async_op``, ``on_device``, ``timeout_ms``, and ``created_ns``, ``started_ns``,
        ``completed_ns`` (since 1970, or None).
    """
    from dpcomm import _core

    name = group if group is None or isinstance(group, str) else group.name
    return [entry for entry in _core.flight_record() if name is None or entry["group"] == name]


def dump_flight_record(prefix: str) -> list[str]:
    """Writes the last operations of this process where torch's ``torchfrtrace`` can read them.

    Args:
        prefix: Start of the name of the file, which the global rank completes: "traces/rank_".

    Returns:
        The names of the files: one, unless several ranks are threads of this process.

    Raises:
        UsageError: a file cannot be written.
    """
    from dpcomm import _core

    return _core.dump_flight_record(prefix)


def _torch_stats(group: Any) -> Any:
    from dpcomm import backend

    return backend.binding().stats(_torch_backend(group))


def _torch_backend(group: Any) -> Any:
    """The backend object of dpcomm in a process group of torch."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("there is no group: torch.distributed is not initialized here")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise UsageError(f"{group!r} is neither a Communicator nor a process group of torch")
    for device in ("cpu", "cuda"):
        try:
            backend = group._get_backend(torch.device(device))
        except RuntimeError:  # none for this device
            continue
        backend = getattr(backend, "wrapped_pg", backend)  # in debug mode DETAIL
        if backend.name() == "dpcomm":
            return backend
    raise UsageError("the group has another backend than dpcomm")
