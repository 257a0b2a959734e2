"""What a user can choose for a process group, and for the calls of one thread."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from dpcomm.errors import UsageError

__all__ = ["Options", "wire"]

_WIRES = ("native", "fp16", "bf16", "int8")
_WIRE_LINKS = ("network", "all")
_TRANSPORTS = ("auto", "shm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a process group: ``init_process_group("dpcomm", pg_options=Options(...))``.

    All ranks of a group must choose alike. What is None comes from the environment. Values are
    checked here, names of algorithms when the group is made. Immutable; may be shared by groups.

    Attributes:
        wire: lossiest wire format allowed for reductions: "native" (exact), "fp16", "bf16", "int8"
            (default DPCOMM_WIRE, else "native"). Everything else moves exact bytes.
        wire_links: where `wire` is used: "network" (links between hosts) or "all" (also within a
            host; default DPCOMM_WIRE_LINKS, else "network").
        algorithm: of all-reduce: "auto" or a name of ``dpcomm.schedule.algorithms()`` (default
            DPCOMM_ALGO, else "auto").
        timeout: of each operation and of the start, in seconds or as a timedelta (default
            DPCOMM_TIMEOUT, else torch's `timeout` argument).
        transport: "auto" or "shm" (default DPCOMM_TRANSPORT, else "auto").
        shared_buckets: whether the gradient buckets of DistributedDataParallel, those of 1 MiB and
            more, lie in memory that the ranks of a host share (default DPCOMM_SHARED_BUCKETS, else
            True); in forked processes it is the same memory (dpcomm.memory).

    Raises:
        UsageError: a value that is none of those allowed; the text lists them.
    """

    wire: str | None = None
    wire_links: str | None = None
    algorithm: str | None = None
    timeout: float | timedelta | None = None
    transport: str | None = None
    shared_buckets: bool | None = None

    def __post_init__(self) -> None:
        _check("wire", self.wire, _WIRES)
        _check("wire_links", self.wire_links, _WIRE_LINKS)
        _check("transport", self.transport, _TRANSPORTS)
        if self.shared_buckets is not None and not isinstance(self.shared_buckets, bool):
            raise UsageError(f"shared_buckets={self.shared_buckets!r} is neither True nor False")
        if self.algorithm is not None and not isinstance(self.algorithm, str):
            raise UsageError(f"algorithm={self.algorithm!r} is not a name")
        if self.timeout is not None:
            milliseconds(self.timeout)

    def chosen(self) -> dict[str, str | int]:
        """What was chosen, in the form that ``dpcomm._torch.create`` takes."""
        names = ("wire", "wire_links", "algorithm", "transport", "shared_buckets")
        chosen: dict[str, str | int] = {
            name: getattr(self, name) for name in names if getattr(self, name) is not None
        }
        if self.timeout is not None:
            chosen["timeout_ms"] = milliseconds(self.timeout)
        return chosen


@contextlib.contextmanager
def wire(name: str) -> Iterator[None]:
    """Uses wire format `name` for the reductions that this thread starts inside.

    ``with dpcomm.wire("fp16"): loss.backward()``: takes the place of the group's `wire` for calls
    of torch.distributed on groups of dpcomm, DDP's included; `wire_links` still says where. All
    ranks must do the same. May be nested. Needs torch; loads dpcomm's library.

    Args:
        name: "native", "fp16", "bf16" or "int8".

    Raises:
        UsageError: for another name.
        ImportError: torch is missing or another than the one built for.
    """
    from dpcomm import backend

    _check("wire", name, _WIRES)
    set_thread_wire = backend.binding().set_thread_wire
    previous = set_thread_wire(name)
    try:
        yield
    finally:
        set_thread_wire(previous)


def _check(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value is not None and value not in allowed:
        raise UsageError(f"{name}={value!r} is none of {', '.join(allowed)}")


def milliseconds(timeout: Any) -> int:
    """The timeout in whole milliseconds, at least one."""
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise UsageError(f"timeout={timeout!r} is neither seconds nor a timedelta")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise UsageError(f"timeout={timeout!r} is not a positive time")
    return max(1, math.ceil(seconds * 1000))
