"""The laws of docs/invariants.md that a run alone can show, on every transport."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import flush_denormals
import numpy as np
import pytest
from cases import BLOCKED, REDUCING, Case, has_output, make_input
from expected import bound, compare, run_and_compare
from pool import Group, Pool

from dpcomm import schedule

SMALL_SLOTS = {"DPCOMM_SLOT_BYTES": "4096"}
LOSSY = ("fp16", "bf16", "int8")
MOVING = ("gather", "scatter", "all_to_all")


def bits(group: Group, cases: list[Case]) -> list[list[str]]:
    """Runs the cases; digests of the results by rank, then case."""
    return [
        [each["bits"] for each in answers] for answers in group.call("run", cases, "sync", False)
    ]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_all_ranks_have_the_same_bits_with_nan_and_inf(pool: Pool, world: int, seed: int) -> None:
    cases = [
        Case("all_reduce", algorithm.name, 9000, dtype, op, wire, data="special", seed=seed)
        for algorithm in schedule.algorithms("all_reduce")
        for dtype in ("float32", "float16", "bfloat16", "float64")
        for op in ("sum", "avg", "product", "min", "max")
        for wire in (("native", "fp16", "bf16") if op in ("sum", "avg") else ("native",))
        if wire == "native" or dtype != "float64"
    ]
    with pool.group(world, SMALL_SLOTS) as group:
        for case, *by_rank in zip(cases, *bits(group, cases), strict=True):
            assert len(set(by_rank)) == 1, case


@pytest.mark.parametrize("world", [2, 5])
def test_what_is_not_finite_stays_so(pool: Pool, world: int, seed: int) -> None:
    """Law 7, without the oracle."""
    with pool.group(world, SMALL_SLOTS) as group:
        for wire in ("native", *LOSSY):
            case = Case("all_reduce", "two_shot", 9000, wire=wire, data="special", seed=seed)
            group.call("run", [case], "sync", False)
            finite = np.ones(case.count, bool)
            for rank in range(world):
                finite &= np.isfinite(make_input(case, rank, world))
            for result in group.call("result", 0):
                assert not np.isfinite(result[~finite]).any(), wire


@pytest.mark.parametrize("wire", LOSSY)
def test_a_lossy_wire_leaves_what_is_no_sum_exact(pool: Pool, wire: str, seed: int) -> None:
    """Law 8: the communicator and the calls allow the wire format for everything."""
    cases = [
        Case("broadcast", "auto", 20000, root=1, data="special", seed=seed),
        Case("all_gather", "auto", 20000, data="special", seed=seed),
        *(Case(each, "auto", 20000, data="special", seed=seed) for each in MOVING),
        *(Case(each, "auto", 20000, "float16", unequal=True, seed=seed) for each in MOVING),
        Case("broadcast", "ring", 20000, "float16", data="random", seed=seed),
        Case("all_gather", "tree", 20000, "bfloat16", data="random", seed=seed),
        *(Case("all_reduce", "auto", 20000, op=op, seed=seed) for op in ("product", "min", "max")),
        Case("all_reduce", "auto", 20000, "float64", seed=seed),
        Case("all_reduce", "auto", 20000, "int32", "avg", seed=seed),
        Case("reduce_scatter", "auto", 20000, "int64", seed=seed),
        Case("reduce", "direct", 20000, op="max", root=2, seed=seed),
    ]
    asked = [dataclasses.replace(case, wire=wire) for case in cases]
    with pool.group(3, SMALL_SLOTS, wire=wire) as group:
        assert {used for _, used in group.call("choices", asked)[0]} == {"native"}
        run_and_compare(group, asked)
        lossy = Case("all_reduce", "auto", 20000, wire=wire)
        assert group.call("choices", [lossy])[0][0][1] == wire


def test_a_slow_peer_reads_what_the_tensor_held(pool: Pool, seed: int) -> None:
    """Law 9: every rank overwrites its memory right after the return; each is slow in turn."""
    chosen = random.Random(seed)
    for slow in range(3):
        faults = {"DPCOMM_FAULTS": f"delay_us=1500,stall=0.8,rank={slow}", **SMALL_SLOTS}
        cases = [Case("broadcast", "direct", 2500, seed=seed + i) for i in range(10)]
        for number in range(12):
            algorithm = chosen.choice(schedule.algorithms())
            count = chosen.choice([100, 3000])
            cases.append(
                Case(
                    algorithm.collective,
                    algorithm.name,
                    count,
                    root=number % 3,
                    in_place=number % 2 == 0,
                    seed=seed + 100 + number,
                )
            )
        with pool.group(3, faults) as group:
            run_and_compare(group, cases)


@pytest.mark.parametrize("collective", MOVING)
def test_ten_in_a_row_with_a_slow_rank(pool: Pool, collective: str, seed: int) -> None:
    """Law 9 where ranks do not hear from all others: the slots alone hold back who is faster."""
    for slow in range(3):
        faults = {"DPCOMM_FAULTS": f"delay_us=1500,stall=0.8,rank={slow}", **SMALL_SLOTS}
        cases = [Case(collective, "direct", 2500, unequal=i > 7, seed=seed + i) for i in range(10)]
        for number in range(8):
            cases.append(Case("all_reduce", "auto", 300, in_place=True, seed=seed + 20 + number))
            cases.append(
                Case(
                    collective,
                    "direct",
                    [40, 3000][number // 2 % 2],
                    root=number % 3,
                    in_place=number % 2 == 0,
                    unequal=number > 4,
                    seed=seed + 40 + number,
                )
            )
        with pool.group(3, faults) as group:
            run_and_compare(group, cases)


@pytest.mark.skipif(not flush_denormals.AVAILABLE, reason="MXCSR is of x86-64")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_denormals_are_kept_where_the_caller_flushes_them(pool: Pool, mode: str, seed: int) -> None:
    """Law 13; the worker also checks that the caller's state is back."""
    cases = [
        Case(collective, "auto", 5000, dtype, op, wire, data="denormal", seed=seed)
        for collective in REDUCING
        for dtype in ("float32", "bfloat16", "float16", "float64")
        for op in ("sum", "avg", "max")
        for wire in ("native", "fp16", "int8")
        if wire == "native" or (dtype != "float64" and op != "max")
    ]
    with pool.group(2, SMALL_SLOTS) as group:
        run_and_compare(group, cases, mode, flush=True)


def switches(group: Group, dtype: str) -> list[int]:
    """Counts at which `auto` changes the algorithm of an all-reduce."""

    def algorithm(count: int) -> str:
        case = Case("all_reduce", "auto", count, dtype)
        name: str = group.call("choices", [case])[0][0][0]
        return name

    found = []
    low, step = 1, 1
    while low + step < 1 << 22:
        if algorithm(low) == algorithm(low + step):
            low, step = low + step, 2 * step
            continue
        left, right = low, low + step
        while right - left > 1:
            middle = (left + right) // 2
            left, right = (
                (middle, right) if algorithm(middle) == algorithm(left) else (left, middle)
            )
        found.append(right)
        low, step = right, 1
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_bits_do_not_hang_on_the_path(pool: Pool, world: int, dtype: str, seed: int) -> None:
    """Native wire within a host: auto, one-shot and two-shot sum in the order of ranks."""
    with pool.group(world) as group:
        edges = switches(group, dtype)
        assert edges
        counts = [1, 7, 1000, *(count + by for count in edges for by in (-1, 0, 1))]
        cases = [
            Case("all_reduce", algorithm, count, dtype, op, data="special", seed=seed)
            for count in counts
            for op in ("sum", "avg")
            for algorithm in ("auto", "one_shot", "two_shot")
        ]
        for answers in bits(group, cases):
            for first in range(0, len(cases), 3):
                assert len(set(answers[first : first + 3])) == 1, cases[first]
        run_and_compare(group, cases)


def test_a_part_of_a_tensor_has_the_bits_of_the_whole(pool: Pool) -> None:
    """Native wire, auto: bits do not hang on how tensors lie in buckets."""
    with pool.group(3, SMALL_SLOTS) as group:
        whole = Case("all_reduce", "auto", 30000, seed=5)
        inputs = [make_input(whole, rank, 3) for rank in range(3)]
        group.call("run", [whole], "sync", False)
        result = group.call("result", 0)[0]
        total = (inputs[0] + inputs[1]) + inputs[2]  # the order of ranks, in fp32
        assert np.array_equal(result.view(np.uint32), total.view(np.uint32))


@pytest.mark.parametrize("data", ["random", "ill"])
@pytest.mark.parametrize("world", [2, 4, 7])
def test_the_error_of_a_lossy_wire_is_bounded(pool: Pool, world: int, data: str, seed: int) -> None:
    """DESIGN §5's bound, without the oracle."""
    cases = [
        Case("all_reduce", algorithm, 20000, wire=wire, data=data, seed=seed + number)
        for wire in LOSSY
        for algorithm in ("ring", "double_tree", "two_shot", "one_shot")
        for number in range(2)
        if wire != "int8" or algorithm in ("two_shot", "one_shot")
    ]
    with pool.group(world, SMALL_SLOTS) as group:
        group.call("run", cases, "sync", False)
        for index, case in enumerate(cases):
            inputs = [make_input(case, rank, world) for rank in range(world)]
            exact = np.sum([array.astype(np.float64) for array in inputs], axis=0)
            limit = bound(case, case.algorithm, case.wire, inputs)
            error = np.abs(group.call("result", index)[0].astype(np.float64) - exact)
            assert (error <= limit).all(), f"{case}: {float((error / limit).max())} times the bound"
            assert error.max() > 0, f"{case}: the wire format was not used"


def test_several_communicators_at_once(pool: Pool, seed: int) -> None:
    groups = [pool.group(3, SMALL_SLOTS) for _ in range(3)]
    chosen = random.Random(seed)
    cases = {}
    for number, group in enumerate(groups):
        drawn = [chosen.choice(schedule.algorithms()) for _ in range(25)]
        cases[group.name] = [
            Case(a.collective, a.name, 500 + 100 * i, seed=seed + 100 * number + i, root=i % 3)
            for i, a in enumerate(drawn)
        ]
    answers = pool.call(3, "run_at_once", cases)
    for group in groups:
        compare(group, cases[group.name], [each[group.name] for each in answers])
        group.close()


def test_operations_of_all_kinds_back_to_back(pool: Pool, seed: int) -> None:
    """Schedules share channels: nothing of one may be left for the next."""
    chosen = random.Random(seed)
    cases = []
    for number in range(80):
        algorithm = chosen.choice(schedule.algorithms())
        count = chosen.choice([0, 1, 5, 1025, 2049, 5000])
        unequal = algorithm.collective in BLOCKED and number % 2 == 0
        cases.append(
            Case(
                algorithm.collective,
                algorithm.name,
                count,
                root=number % 4,
                unequal=unequal,
                seed=seed + number,
            )
        )
    with pool.group(4, SMALL_SLOTS) as group:
        run_and_compare(group, cases)
        group.call("barrier")


@pytest.mark.parametrize("collective", ["reduce", "gather"])
def test_only_the_root_has_a_result(collective: str) -> None:
    case = Case(collective, "direct", 5, root=1)
    assert [has_output(case, rank) for rank in range(3)] == [False, True, False]


def free_bytes() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_more_than_2_to_the_31_elements(pool: Pool) -> None:
    if free_bytes() < 6 << 30:
        pytest.skip("needs 6 GiB of memory")
    if pool.transport != "shm" and not os.environ.get("DPCOMM_TEST_ALL"):
        pytest.skip("one transport shows it; DPCOMM_TEST_ALL=1 runs all")
    with pool.group(2, timeout=200.0) as group:
        wrong: list[Any] = group.call("big", (1 << 31) + 3, deadline_s=250)
        assert wrong == ["", ""]
