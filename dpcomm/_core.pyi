"""The C++ core without torch: wire formats, schedules, communicators."""

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, TypeVar

from typing_extensions import Buffer

# --- wire ---------------------------------------------------------------------------------------
# Codecs of csrc/wire/codec.h on contiguous buffers, in place. `wire`: native, fp16, bf16, int8;
# `dtype`: as torch names it; `isa`: one of wire_isas(). Elements [first, first + n) of a slice of
# `total` at `base`; `acc` holds n accumulators. UsageError for a pair that is not supported, a
# range that is no tile, or a buffer that is too short.

def wire_isas() -> list[str]: ...
def wire_best_isa() -> str: ...
def wire_slice_bytes(wire: str, dtype: str, total: int) -> int: ...
def wire_load(
    wire: str, dtype: str, isa: str, acc: Buffer, base: Buffer, total: int, first: int, n: int
) -> None: ...
def wire_combine(
    wire: str,
    dtype: str,
    isa: str,
    op: str,
    acc: Buffer,
    base: Buffer,
    total: int,
    first: int,
    n: int,
) -> None: ...
def wire_store(
    wire: str,
    dtype: str,
    isa: str,
    base: Buffer,
    acc: Buffer,
    total: int,
    first: int,
    n: int,
    keep: bool,
) -> None: ...
def wire_premultiply(dtype: str, isa: str, acc: Buffer, factor: float) -> None: ...
def wire_divide(dtype: str, isa: str, acc: Buffer, divisor: int) -> None: ...
def wire_sum_f32(
    isa: str, destinations: Sequence[Buffer], sources: Sequence[Buffer], divisor: int, n: int
) -> None: ...

# --- schedule -----------------------------------------------------------------------------------
# dpcomm.schedule is the friendly form. An operation is (collective, algorithm, root, slices,
# rounds, rounds of each block or nothing).

_Operation = tuple[str, str, int, int, int, Sequence[int]]
_Step = tuple[int, int, int, int, int, int, int, tuple[int, ...], int, tuple[int, ...], bool]

def schedule_algorithms() -> list[tuple[str, str, int, int, int, bool]]: ...
def schedule_limits(
    collective: str, algorithm: str, world: int, slices: int
) -> tuple[int, int, int]: ...
def schedule_plan(world: int, operation: _Operation) -> list[_Step]: ...
def schedule_prove(
    world: int,
    operations: Sequence[_Operation],
    slots: int,
    keep_as_sent: bool,
    check_form: bool,
    mutation: str,
    seed: int,
) -> tuple[bool, str, int, int, int] | None: ...
def schedule_mutations() -> list[str]: ...

# A partition is (count, chunks, slices, slot_elems, grain, blocked); a slice is (first, count).
_Partition = tuple[int, int, int, int, int, bool]

def partition_rounds(partition: _Partition) -> int: ...
def partition_slice(
    partition: _Partition, round: int, chunk: int, slice: int
) -> tuple[int, int]: ...

# --- arrays -------------------------------------------------------------------------------------

def describe_array(
    array: Any, writable: bool = False, stream: int = 0
) -> tuple[int, int, str, str]:
    """(address, elements, dtype, place) of what collectives would take from an array."""

# --- what happened ------------------------------------------------------------------------------

class _CollectiveStats(TypedDict):
    operations: int
    bytes: int
    wire_bytes: int
    busy_ns: int

class _Stats(TypedDict):
    operations: int
    messages: int
    bytes: int
    wire_bytes: int
    wait_ns: int
    exposed_wait_ns: int
    collectives: dict[str, _CollectiveStats]

def flight_record() -> list[dict[str, Any]]:
    """The last operations of this process, oldest first (dpcomm.flight_record)."""

def dump_flight_record(prefix: str) -> list[str]:
    """Writes them for torchfrtrace; returns the names of the files."""

def _flight_registry() -> int: ...

# --- communicator --------------------------------------------------------------------------------

class Work:
    """The handle of an asynchronous collective. It keeps the arrays alive; so does the communicator
    where it is dropped before the end.
    """

    def done(self) -> bool:
        """True once the operation is complete, with a result or an error."""

    def wait(self, timeout: float | None = None, stream: Any = None) -> Any:
        """Returns the output array once it is complete.

        Where the array lies on a device, that is so for what a stream gets from now on, and the
        host waits for nothing; with a timeout the host waits as well.

        Args:
            timeout: Seconds; default: as long as the operation may take.
            stream: A CUDA stream, or its handle; default: the caller's stream of the collective.

        Raises:
            TimeoutError: It was not complete in time; it goes on.
            UsageError, PeerError, InternalError: What the operation ended with.
        """

    def synchronize(self, timeout: float | None = None) -> Any:
        """As wait(), but the host waits for the device, too."""

    def source(self) -> int | None:
        """Of a receive that is complete: the rank that sent; else None."""

_Method = TypeVar("_Method", bound=Callable[..., Any])

def _with_short_call(function: _Method) -> _Method:
    """A method of dpcomm.Communicator whose common calls need no Python code (core_short_call.h).

    Those that only give a contiguous array of NumPy's or a tensor of torch's on the CPU, an
    operator, a root and a result do not come to `function`; all others do.
    """

class Settings:
    def __init__(
        self,
        wire: str | None = None,
        algorithm: str | None = None,
        timeout: float | None = None,
        async_op: bool = False,
        stream: int = 0,
    ) -> None: ...

class Communicator:
    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Any,
        name: str,
        wire: str | None = None,
        algorithm: str | None = None,
        wire_links: str | None = None,
        transport: str | None = None,
        timeout: float | None = None,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self, timeout: float | None = None) -> None: ...
    def send(self, array: Any, peer: int, tag: int = 0, settings: Settings = ...) -> Any: ...
    def recv(
        self, array: Any, peer: int | None = None, tag: int = 0, settings: Settings = ...
    ) -> Any: ...
    def synchronize(self, timeout: float | None = None) -> None: ...
    def stats(self) -> _Stats: ...
    def geometry(self, lane: int) -> tuple[int, int]: ...
    def choice(
        self,
        collective: str,
        count: int,
        dtype: str,
        op: str = "sum",
        settings: Settings = ...,
    ) -> tuple[str, str]: ...
    def abort(self, text: str) -> None: ...
    def close(self) -> None: ...
    def all_reduce(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 1.0,
        root: int = 0,
        settings: Settings = ...,
        counts: Sequence[int] = ...,
        recv_counts: Sequence[int] = ...,
    ) -> Any: ...
    def broadcast(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 1.0,
        root: int = 0,
        settings: Settings = ...,
        counts: Sequence[int] = ...,
        recv_counts: Sequence[int] = ...,
    ) -> Any: ...
    def reduce(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 1.0,
        root: int = 0,
        settings: Settings = ...,
        counts: Sequence[int] = ...,
        recv_counts: Sequence[int] = ...,
    ) -> Any: ...
    def all_gather(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 1.0,
        root: int = 0,
        settings: Settings = ...,
        counts: Sequence[int] = ...,
        recv_counts: Sequence[int] = ...,
    ) -> Any: ...
    def reduce_scatter(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 1.0,
        root: int = 0,
        settings: Settings = ...,
        counts: Sequence[int] = ...,
        recv_counts: Sequence[int] = ...,
    ) -> Any: ...
    def gather(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 1.0,
        root: int = 0,
        settings: Settings = ...,
        counts: Sequence[int] = ...,
        recv_counts: Sequence[int] = ...,
    ) -> Any: ...
    def scatter(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 1.0,
        root: int = 0,
        settings: Settings = ...,
        counts: Sequence[int] = ...,
        recv_counts: Sequence[int] = ...,
    ) -> Any: ...
    def all_to_all(
        self,
        input: Any,
        output: Any,
        op: str = "sum",
        factor: float = 1.0,
        root: int = 0,
        settings: Settings = ...,
        counts: Sequence[int] = ...,
        recv_counts: Sequence[int] = ...,
    ) -> Any: ...

def environment() -> list[tuple[str, str, str]]: ...
def transports() -> list[str]: ...

# --- devices ------------------------------------------------------------------------------------

def device_count() -> tuple[int, str]: ...

class VirtualGroup:
    def __init__(self, world: int, device: int, max_ctas: int, staging_bytes: int) -> None: ...
    @property
    def geometry(self) -> tuple[int, int, int, int]: ...
    @property
    def staging_bytes(self) -> int: ...
    def ctas_of(self, bytes: int) -> int: ...
    def launch(
        self,
        collective: str,
        algorithm: str,
        dtype: str,
        op: str,
        wire: str,
        count: int,
        root: int,
        factor: float,
        inputs: Sequence[int],
        outputs: Sequence[int],
        stream: int,
    ) -> None: ...
    def abort(self) -> None: ...
    def waits(self) -> list[tuple[int, int, int, int, int, int, int, int]]: ...

# --- shared memory ------------------------------------------------------------------------------

def shared_block(bytes: int) -> memoryview: ...
def is_shared(address: int, bytes: int) -> bool: ...
def shared_bytes() -> int: ...
def _heap_registry() -> int: ...
