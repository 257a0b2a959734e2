"""The exceptions that dpcomm raises. All derive from RuntimeError, as torch's own do."""

from __future__ import annotations

import builtins

__all__ = ["DpcommError", "InternalError", "PeerError", "TimeoutError", "UsageError"]


class DpcommError(RuntimeError):
    """Base of every error of dpcomm."""


class UsageError(DpcommError):
    """The caller's fault: an argument that makes no sense, or ranks that call different operations.

    Raised before any byte is sent where one rank alone can see it.
    """


class PeerError(DpcommError):
    """A peer died or left. The communicator is unusable; make one with the ranks that live."""


class TimeoutError(DpcommError, builtins.TimeoutError):
    """A peer did not come in time. The communicator is unusable; make a new one."""


class InternalError(DpcommError):
    """A bug in dpcomm, or a fault of the system such as memory that cannot be mapped."""
