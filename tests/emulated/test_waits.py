"""Waits of the device kernels that do not end: who waits for what is told, an abort ends them, and
nothing is published afterwards."""

from __future__ import annotations

import dataclasses
import re

import pytest
from emulate import Case, Emulation, Operation, check, differences, expected

pytestmark = pytest.mark.timeout(600)

WORLD = 3
RING = Operation("all_reduce", "ring", wire="fp16", count=20_000, ctas=2)
SLOTS = {"world": WORLD, "ctas": 2, "slots": 3, "slot_bytes": 1040}
PACKETS = Case(
    world=WORLD,
    operations=(Operation("all_reduce", "one_shot", count=5000, ctas=2),) * 3,
    ctas=2,
    packets=3000,
    virtual_ranks=False,
)


def test_too_few_slots_are_a_deadlock_that_names_every_thread(source: Emulation) -> None:
    operation = Operation("all_reduce", "ring", wire="fp16", count=20_000)
    case = Case(WORLD, (operation,), slots=1, slot_bytes=1040, extra=(("plan_slots", 3),))
    (result,) = source.run([case])
    assert result.status == "stuck"
    for rank in range(WORLD):
        after = (rank + 1) % WORLD
        assert re.search(
            rf"collective_f32_fp16 \(launch 1\), rank {rank}, block 0: .*thread \d polling credit "
            rf"of {rank}->{after}, lane 0, cta 0: \d released; .*threads 32-63 at the block's "
            r"barrier \(32 of 64 have come\)",
            result.text,
        ), result.text
    records = {int(record["rank"]): record for record in result.lines("wait")}
    assert set(records) == set(range(WORLD))
    for rank, record in records.items():
        assert record["kind"] == "credit"
        assert int(record["peer"]) == (rank + 1) % WORLD
        assert int(record["seen"]) < int(record["wanted"])
        assert (record["cta"], record["lane"], record["sequence"]) == ("0", "0", "1")


def test_blocks_that_wait_for_one_without_a_place_are_a_deadlock(source: Emulation) -> None:
    operation = Operation("all_reduce", "two_shot", count=9000, ctas=2)
    case = Case(4, (operation,), ctas=2, slots=2, slot_bytes=1024)
    (result,) = source.run([dataclasses.replace(case, resident=3)])
    assert result.status == "stuck"
    assert re.search(r"\d blocks have not started: 3 are resident, and no more may be", result.text)
    check(source, [dataclasses.replace(case, resident=8)])


def aborted(case: Case, first: int, then: int, seed: int) -> Case:
    """One rank sees the abort early, all see it later."""
    extra = (("abort_at", first), ("abort_rank", seed % WORLD), ("abort_all_at", then))
    return dataclasses.replace(case, seed=seed, extra=(*extra, ("look_every", 1 + seed % 4)))


@pytest.mark.parametrize("packets", [False, True], ids=["slots", "packets"])
def test_an_abort_ends_all_waits_and_nothing_is_published(source: Emulation, packets: bool) -> None:
    """The emulator fails a block that stores a flag after it saw the abort word."""
    ring = Case(operations=(RING,) * 3, virtual_ranks=False, **SLOTS)  # type: ignore[arg-type]
    cases = [
        aborted(PACKETS if packets else ring, first, first + 30, seed)
        for seed in range(1, 9)
        for first in (0, 6, 40)
    ]
    for case, result in zip(cases, source.run(cases), strict=True):
        assert result.status == "ok", f"{case}\n{result.text}"


def test_a_wait_is_recorded_while_it_lasts(source: Emulation) -> None:
    """Rank 2 is aborted before it does anything: the others wait for it."""
    extra = (("abort_at", 0), ("abort_rank", 2), ("look_every", 1))
    late = dataclasses.replace(PACKETS, extra=extra)
    ring = Case(operations=(RING,), virtual_ranks=False, extra=extra, **SLOTS)  # type: ignore[arg-type]
    for case, kind in ((late, "packet"), (ring, "arrival")):
        (result,) = source.run([case])
        assert result.status == "stuck"
        waiting = [record for record in result.lines("wait") if record["rank"] != "2"]
        assert any(record["kind"] == kind and record["peer"] == "2" for record in waiting)


def test_no_record_remains_of_waits_that_ended(source: Emulation) -> None:
    case = Case(operations=(RING,) * 2, extra=(("record_after", 1),), seed=3, **SLOTS)  # type: ignore[arg-type]
    (result,) = source.run([case])
    assert result.status == "ok"
    assert result.lines("wait") == []


@pytest.mark.parametrize("packets", [False, True], ids=["slots", "packets"])
def test_ranks_that_run_different_operations_say_so(source: Emulation, packets: bool) -> None:
    """By the tag of an arrival, or of the greeting, which is packet 0."""
    extra = (("other_tag_rank", 1), ("abort_all_at", 4000))
    ring = Case(operations=(RING,), virtual_ranks=False, extra=extra, **SLOTS)  # type: ignore[arg-type]
    kind = dataclasses.replace(PACKETS, extra=extra) if packets else ring
    for seed in range(1, 6):
        case = dataclasses.replace(kind, seed=seed)
        (result,) = source.run([case])
        assert result.status == "ok", result.text
        found = [record for record in result.lines("wait") if record["kind"] == "disagree"]
        assert found
        for record in found:
            assert 1 in (int(record["rank"]), int(record["peer"]))
            assert int(record["seen"]) ^ int(record["wanted"]) == 0x100


@pytest.mark.parametrize("packets", [False, True], ids=["slots", "packets"])
def test_an_operation_queued_behind_an_aborted_one_does_not_run(
    source: Emulation, packets: bool
) -> None:
    """A block looks at the abort word at its start, not only in a wait that lasts: the counts of
    the operation before are not those that the peers have seen."""
    extra = (("abort_all_at", 0), ("look_every", 1 << 30))
    ring = Case(operations=(RING,), virtual_ranks=False, extra=extra, **SLOTS)  # type: ignore[arg-type]
    case = dataclasses.replace(PACKETS, extra=extra) if packets else ring
    (result,) = source.run([case])
    assert result.status == "ok", result.text
    for operation, inputs, outputs in zip(
        case.operations, case.inputs(), result.outputs, strict=True
    ):
        for got, want in zip(outputs, expected(case, operation, inputs), strict=True):
            assert got is not None
            assert want is not None
            assert differences(operation, got, want).size > want.size // 2


def test_operations_queued_behind_one_that_the_ranks_disagree_on_do_not_run(
    source: Emulation,
) -> None:
    """The block that finds it makes all others of its rank leave, those of later kernels too."""
    for seed in range(1, 6):
        case = Case(
            operations=(RING,) * 3,
            virtual_ranks=False,
            seed=seed,
            extra=(("other_tag_rank", 1), ("abort_all_at", 4000)),
            **SLOTS,  # type: ignore[arg-type]
        )
        (result,) = source.run([case])
        assert result.status == "ok", result.text
        found = [record for record in result.lines("wait") if record["kind"] == "disagree"]
        assert found
        assert {record["sequence"] for record in found} == {"1"}
