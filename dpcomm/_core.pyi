"""The C++ core without torch: wire formats, schedules, communicators."""

from collections.abc import Sequence

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
# dpcomm.schedule is the friendly form. An operation is (collective, algorithm, root, slices, rounds).

_Operation = tuple[str, str, int, int, int]
_Step = tuple[int, int, int, int, int, int, int, tuple[int, ...], int, tuple[int, ...], bool]

def schedule_algorithms() -> list[tuple[str, str, int, int, int]]: ...
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
