"""dpcomm: fused collective communication for data-parallel training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dpcomm.errors import DpcommError, InternalError, PeerError, TimeoutError, UsageError

if TYPE_CHECKING:
    from dpcomm.communicator import Communicator

__version__ = "0.1.0"

__all__ = [
    "Communicator",
    "DpcommError",
    "InternalError",
    "PeerError",
    "TimeoutError",
    "UsageError",
]


def __getattr__(name: str) -> Any:
    if name == "Communicator":
        from dpcomm.communicator import Communicator

        return Communicator
    raise AttributeError(f"module 'dpcomm' has no attribute {name!r}")
