"""dpcomm: fused collective communication for data-parallel training."""

from __future__ import annotations

from dpcomm.errors import DpcommError, InternalError, PeerError, TimeoutError, UsageError

__version__ = "0.1.0"

__all__ = ["DpcommError", "InternalError", "PeerError", "TimeoutError", "UsageError"]
