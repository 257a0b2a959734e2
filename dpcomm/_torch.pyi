"""The torch binding (csrc/bind/torch_module.cc). Use dpcomm.backend: it checks versions first."""

from collections.abc import Sequence
from typing import Any, TypedDict

from dpcomm._core import _Stats
from dpcomm.options import Options

class _Options(TypedDict):
    wire: str
    wire_links: str
    algorithm: str
    timeout_ms: int
    transport: str
    shared_buckets: bool
    name: str

class GroupOptions:
    """A dpcomm.Options where torch wants a Backend.Options, of which this is one."""

    def __copy__(self) -> GroupOptions: ...
    def __deepcopy__(self, memo: dict[int, Any], /) -> GroupOptions: ...

class ProcessGroupDpcomm:
    """A torch Backend: what create() and ``pg._get_backend(...)`` give, with a little more."""

    @property
    def options(self) -> Options: ...
    def get_error(self) -> Any:
        """What ended the group, as a c10d.ErrorType; SUCCESS as long as nothing has."""
    def perform_nocolor_split(self, device: Any) -> None:
        """Nothing: a split takes its members only."""

def create(group: Any, chosen: dict[str, str | int]) -> Any:
    """A group for torch's _DistributedBackendOptions. `chosen` overrides the environment."""

def shutdown_all() -> None:
    """Leaves every group of this process; waits for nobody."""

def stats(backend: Any) -> _Stats:
    """Counts since the group was made. `backend`: ``pg._get_backend(torch.device("cpu"))``."""

def options(backend: Any) -> _Options:
    """The options in use."""

def set_thread_wire(wire: str | None) -> str | None:
    """Sets the wire format of this thread's reductions (None: the group's); returns the last."""

def set_thread_shared_memory(on: bool) -> bool:
    """Whether large CPU blocks of this thread lie in shared memory; returns what was before."""

def shared_empty(size: Sequence[int], dtype: Any) -> Any:
    """A tensor of zeros in shared memory."""

def wires() -> list[str]:
    """Names of the wire formats."""

def algorithms() -> list[str]:
    """Names that the option `algorithm` takes."""
