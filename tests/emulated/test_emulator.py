"""The emulator itself, on a small kernel of its own: right kernels pass, and each kind of fault is
found."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import variants
from emulate import Case, Emulation, Operation, Result, check, problems
from pairs import covering_rows

pytestmark = pytest.mark.timeout(600)

ALL_REDUCE = ("ring", "two_shot", "double_tree", "one_shot")


def cases(seeds: range, **changes: object) -> list[Case]:
    """Several operations one after the other, of different sizes, on few small slots."""
    made = []
    for seed in seeds:
        for number, algorithm in enumerate(ALL_REDUCE):
            operations = (
                Operation(algorithm=algorithm, count=613, ctas=2),
                Operation(algorithm=algorithm, count=31),
                Operation("reduce_scatter", "ring", count=101),
                Operation(algorithm=algorithm, count=300, ctas=2, in_place=True),
            )
            case = Case(
                world=2 + (seed + number) % 3,
                operations=operations,
                ctas=2,
                slots=2 + seed % 2,
                slot_bytes=256,
                virtual_ranks=bool(seed // 2 % 2),
                seed=seed,
            )
            made.append(dataclasses.replace(case, **changes))  # type: ignore[arg-type]
    return made


def test_a_right_kernel_gives_the_bits_of_the_oracle(sample: Emulation) -> None:
    check(sample, cases(range(12)))


def test_counts_may_wrap_around(sample: Emulation) -> None:
    check(sample, cases(range(4), extra=(("first_message", 2**32 - 3),), slots=2))


def test_a_schedule_follows_from_its_seed(sample: Emulation) -> None:
    one, again, other = sample.run([Case(seed=5), Case(seed=5), Case(seed=6)])
    assert one.turns == again.turns
    assert one.turns != other.turns


def test_too_few_slots_are_a_deadlock_that_names_every_thread(sample: Emulation) -> None:
    case = Case(world=3, slots=1, slot_bytes=256, extra=(("plan_slots", 4),))
    (result,) = sample.run([case])
    assert result.status == "stuck"
    assert "deadlock" in result.text
    for rank in range(3):
        assert re.search(
            rf"collective_f32_native \(launch 1\), rank {rank}, block 0: thread 0 polling "
            rf"credit of {rank}->{(rank + 1) % 3}, lane 0, cta 0: 0 released; threads 1-63 "
            rf"at the block's barrier \(63 of 64 have come\)",
            result.text,
        ), result.text


def test_blocks_that_wait_for_one_without_a_place_are_a_deadlock(sample: Emulation) -> None:
    case = Case(world=3, ctas=2, operations=(Operation(ctas=2),))
    (too_few,) = sample.run([dataclasses.replace(case, resident=2)])
    assert too_few.status == "stuck"
    assert "4 blocks have not started: 2 are resident, and no more may be" in too_few.text
    assert re.search(
        r"polling arrival of \d->\d, lane 0, cta \d, slot \d: message \d", too_few.text
    )
    check(sample, [dataclasses.replace(case, resident=6)])


def test_an_abort_ends_all_waits(sample: Emulation) -> None:
    aborted = [
        dataclasses.replace(case, extra=(("abort_at", sweep), ("abort_all_at", sweep + 40)))
        for case in cases(range(4))
        for sweep in (0, 7, 30)
    ]
    assert {result.status for result in sample.run(aborted)} == {"ok"}


def test_a_right_kernel_has_no_race(tmp_path: Path) -> None:
    threads = Emulation(sample_variant(tmp_path, thread_sanitizer=True), thread_sanitizer=True)
    check(threads, cases(range(2), threads=32))


# --- faults ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    name: str
    old: str
    new: str
    finding: str
    """Pattern of "status: text"."""
    race: bool = False
    """Found by ThreadSanitizer, which needs an executable of its own."""
    extra: tuple[tuple[str, int], ...] = ()


RACE = "race: (.|\n)*data race"
FAULTS = [
    Fault("no_fence", "    gpu::fence_system();\n", "", RACE, race=True),
    Fault("no_acquire", "    gpu::load_flag_acquire(flag);\n", "", RACE, race=True),
    Fault(
        "no_barrier_before_publishing",
        "    gpu::block_sync();\n    if (gpu::thread() == 0) publish(step);",
        "    if (gpu::thread() == 0) publish(step);",
        "elements differ|stuck",
    ),
    Fault(
        "no_barrier_in_the_eyes_of_the_sanitizer",
        "    gpu::block_sync();\n    if (gpu::thread() == 0) publish(step);",
        "    if (gpu::thread() == 0) publish(step);",
        RACE,
        race=True,
    ),
    Fault(
        "beyond_the_tensor",
        "i < range.count; i +=",
        "i < range.count + 1; i +=",
        "fault: .* outside of all memory that it may touch, behind|elements differ",
    ),
    Fault("misaligned", "slot + i * sizeof(float), value", "slot + i * 4 + 2, value", "misaligned"),
    Fault(
        "lost_credit", "++counts(step.recv_lane, peer).received", "uint64_t{0}", "stuck: deadlock"
    ),
    Fault(
        "credit_off_by_one", "sent - released < slots", "sent - released <= slots", "differ|stuck"
    ),
    Fault(
        "published_after_an_abort",
        "!= 0) return false;",
        "!= 0) return true;",
        "fault: .*published after it saw the abort word",
        extra=(("abort_at", 7), ("abort_all_at", 40)),
    ),
    Fault(
        "a_thread_left_out_of_a_barrier",
        "    if (command.over) return false;",
        "    if (command.over || gpu::thread() == 5) return false;",
        "stuck: deadlock(.|\n)*5 over(.|\n)*at the block's barrier",
    ),
    Fault(
        "unwritten_shared_memory",
        "if (gpu::thread() == 0) command.over = !ready(step);",
        "if (gpu::thread() == 0 && !ready(step)) return false;",
        "stuck|differ",
    ),
]


def sample_variant(
    folder: Path, fault: Fault | None = None, thread_sanitizer: bool = False
) -> Path:
    text = variants.SAMPLE.source.read_text()
    if fault is not None:
        assert text.count(fault.old) == 1, f"{fault.old!r} is not (once) in the kernel"
        text = text.replace(fault.old, fault.new)
    kernel = folder / "sample_kernels.cc"
    kernel.write_text(text)
    return variants.build(variants.Variant((variants.Unit(kernel),), thread_sanitizer))


def verdict(case: Case, result: Result) -> str:
    if result.status == "ok" and not case.extra:
        return "; ".join(problems(case, result))
    return f"{result.status}: {result.text}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_a_kernel_is_found(fault: Fault, tmp_path: Path) -> None:
    emulation = Emulation(sample_variant(tmp_path, fault, fault.race), fault.race)
    ran = cases(range(2) if fault.race else range(6), threads=32, extra=fault.extra)
    results = emulation.run(ran)
    assert any(
        re.search(fault.finding, verdict(case, result))
        for case, result in zip(ran, results, strict=False)
    ), [verdict(case, result)[:300] for case, result in zip(ran, results, strict=False)]


# --- the covering array ---------------------------------------------------------------------------
def test_a_covering_array_has_all_pairs_that_are_allowed() -> None:
    parameters = {"a": range(4), "b": range(3), "c": range(5), "d": range(2)}

    def allowed(row: dict[str, int]) -> bool:
        return not (row.get("a") == 1 and row.get("c", 0) > 1) and not (
            row.get("b") == 2 and row.get("d") == 1
        )

    rows = covering_rows(parameters, allowed)
    assert all(allowed(row) for row in rows)
    for first in parameters:
        for second in parameters:
            for x in parameters[first]:
                for y in parameters[second]:
                    pair = {first: x, second: y}
                    if first < second and allowed(pair):
                        assert any(row[first] == x and row[second] == y for row in rows), pair
    assert len(rows) < 40
