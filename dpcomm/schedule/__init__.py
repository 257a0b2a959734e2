"""Schedules: who sends what to whom, as data, proved and drawn.

Nothing here communicates. The same generators drive the executor; see docs/algorithms.

    >>> from dpcomm import schedule
    >>> [a.name for a in schedule.algorithms("all_reduce")]
    ['ring', 'double_tree', 'two_shot', 'one_shot']
    >>> schedule.prove("ring", 8, slots=2).holds
    True
    >>> schedule.draw("ring", 4, "ring.png")  # doctest: +SKIP
"""

from __future__ import annotations

from dpcomm.schedule.drawing import draw
from dpcomm.schedule.partition import Partition
from dpcomm.schedule.plans import (
    COLLECTIVES,
    Algorithm,
    PlanStep,
    Primitive,
    algorithms,
    find,
    plan,
)
from dpcomm.schedule.proofs import Operation, Proof, mutations, prove, prove_operations

__all__ = [
    "COLLECTIVES",
    "Algorithm",
    "Operation",
    "Partition",
    "PlanStep",
    "Primitive",
    "Proof",
    "algorithms",
    "draw",
    "find",
    "mutations",
    "plan",
    "prove",
    "prove_operations",
]
