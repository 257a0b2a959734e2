"""dpcomm: fused collective communication for data-parallel training."""

from __future__ import annotations

import sys as _sys
from typing import TYPE_CHECKING, Any

from dpcomm.errors import DpcommError, InternalError, PeerError, TimeoutError, UsageError
from dpcomm.launching import launch
from dpcomm.memory import empty, empty_array, is_shared, shared_memory
from dpcomm.options import Options, wire
from dpcomm.starting import Place, init

if TYPE_CHECKING:
    from dpcomm.communicator import Communicator
    from dpcomm.inspection import Stats, dump_flight_record, flight_record, stats

__version__ = "0.1.0"

__all__ = [
    "Communicator",
    "DpcommError",
    "InternalError",
    "Options",
    "PeerError",
    "Place",
    "Stats",
    "TimeoutError",
    "UsageError",
    "dump_flight_record",
    "empty",
    "empty_array",
    "flight_record",
    "init",
    "is_shared",
    "launch",
    "shared_memory",
    "stats",
    "wire",
]


def __getattr__(name: str) -> Any:
    if name == "Communicator":
        from dpcomm.communicator import Communicator

        return Communicator
    if name in ("Stats", "dump_flight_record", "flight_record", "stats"):
        from dpcomm import inspection

        return getattr(inspection, name)
    raise AttributeError(f"module 'dpcomm' has no attribute {name!r}")


# The backend's name is made known to a torch that is there already; one that is imported later does
# it itself, through the entry point. Without torch all else works.
if "torch" in _sys.modules:
    from dpcomm import _autoload as _autoload

    _autoload.register()
