"""What has to come out, by the oracle; and the comparison with what did."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from cases import (
    Array,
    Case,
    block_sizes,
    canonical,
    digest,
    has_input,
    has_output,
    make_input,
    pair_sizes,
)
from pool import Group

from dpcomm import schedule
from dpcomm.oracle import wire as codecs
from dpcomm.oracle.execute import Geometry, execute

Lanes = tuple[tuple[int, int], ...]
#: Collectives in which each rank has a result of its own.
OWN_RESULTS = ("reduce_scatter", "scatter", "all_to_all")


def results(case: Case, algorithm: str, wire: str, world: int, lanes: Lanes) -> list[Array | None]:
    """The outputs of all ranks, by the algorithm and the wire format that the operation takes."""
    info = schedule.find(algorithm, case.collective)
    pairs = case.collective == "all_to_all"
    return execute(
        case.collective,
        algorithm,
        [make_input(case, r, world) if has_input(case, r) else None for r in range(world)],
        op=case.op,
        dtype=case.dtype,
        wire=wire,
        root=case.root,
        factor=case.factor,
        geometry=Geometry(*lanes[info.first_lane]),
        counts=None if pairs or not case.unequal else block_sizes(case, world),
        pairs=pair_sizes(case, world) if pairs and case.unequal else None,
    )


@functools.lru_cache(maxsize=20000)
def _digests(case: Case, algorithm: str, wire: str, world: int, lanes: Lanes) -> tuple[str, ...]:
    outputs = results(case, algorithm, wire, world, lanes)
    empty = np.empty(0, np.uint8)
    return tuple(digest(canonical(case, empty if out is None else out)) for out in outputs)


def run_and_compare(
    group: Group, cases: list[Case], mode: str = "sync", flush: bool = False
) -> None:
    """Runs the cases on all ranks of the group and holds the results against the oracle's."""
    answers = group.call("run", cases, mode, flush)
    compare(group, cases, answers)


def compare(group: Group, cases: list[Case], answers: list[list[dict[str, str]]]) -> None:
    """`answers` by rank, then case. Every problem is told, not only the first."""
    choices = group.call("choices", cases)
    problems = []
    lanes = tuple(group.lanes)
    for index, case in enumerate(cases):
        algorithm, wire = choices[0][index]
        expected = _digests(case, algorithm, wire, group.world, lanes)
        told = [each[index]["problem"] for each in answers]
        wrong = [
            rank
            for rank in range(group.world)
            if answers[rank][index]["canonical"] != expected[rank]
        ]
        bits = {
            answers[rank][index]["bits"] for rank in range(group.world) if has_output(case, rank)
        }
        if any(told):
            problems.append(f"{case}: {told}")
        if wrong:
            problems.append(_difference(group, case, index, wrong[0], algorithm, wire))
        elif len(bits) > 1 and case.collective not in OWN_RESULTS:
            problems.append(f"{case}: ranks have different bits")
    head = f"{group.pool.transport}, world {group.world}, {len(problems)} of {len(cases)}:\n"
    assert not problems, head + "\n".join(problems[:20])


def _difference(group: Group, case: Case, index: int, rank: int, algorithm: str, wire: str) -> str:
    got: Array = group.call("result", index)[rank]
    wanted = results(case, algorithm, wire, group.world, tuple(group.lanes))[rank]
    text = f"{case} ({algorithm}, wire {wire}): rank {rank}"
    if wanted is None or got.size != wanted.size:
        return f"{text} has {got.size} elements"
    differs = canonical(case, got) != canonical(case, wanted)
    first = int(np.argmax(differs))
    return (
        f"{text} differs in {int(differs.sum())} of {got.size} elements, first at {first}: "
        f"{got[first]!r} for {wanted[first]!r}"
    )


def bound(case: Case, algorithm: str, wire: str, inputs: list[Array]) -> Any:
    """The largest error that a lossy wire may make at each element (DESIGN §5), for SUM in fp32."""
    world = len(inputs)
    exact = np.stack([array.astype(np.float64) for array in inputs])
    magnitude = np.abs(exact).sum(0)
    info = schedule.find(algorithm, case.collective)
    rounding = np.abs(exact.sum(0)) * 2.0**-23  # of the result to fp32
    if wire == "int8":
        return _int8_bound(exact, magnitude) + rounding
    unit = {"fp16": 2.0**-11, "bf16": 2.0**-8}[wire]
    lost = (1 + unit) ** info.roundings(world) - 1
    smallest = 2.0**-134 if wire == "bf16" else 2.0 ** (_largest_exponent(magnitude) - 25)
    added = world * 2.0**-24
    return lost * magnitude * (1 + added) + world * smallest + added * magnitude + rounding


def _largest_exponent(magnitude: Array) -> int:
    """Of any encoder on the path, which may meet the magnitudes of all ranks together."""
    largest = float(magnitude.max(initial=0.0))
    return max(int(np.frexp(largest)[1]), -112)


def _int8_bound(exact: Array, magnitude: Array) -> Array:
    blocks = codecs.BLOCK_ELEMS["int8"]
    amax = np.zeros_like(magnitude)
    for contribution in [*np.abs(exact), magnitude]:
        for first in range(0, magnitude.size, blocks):
            amax[first : first + blocks] += contribution[first : first + blocks].max(initial=0.0)
    spread: Array = amax / 127 * (1 + 2 / 127)
    return spread
