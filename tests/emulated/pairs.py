"""A small covering array: few rows in which every two values of different parameters meet.

Source: own; the greedy construction of Cohen, Dalal, Fredman and Patton (AETG, 1997), without its
random numbers: a function of its arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

Row = dict[str, Any]


def covering_rows(
    parameters: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool]
) -> list[Row]:
    """Rows that together contain every pair of values that some allowed row has.

    Args:
        parameters: name -> values.
        allowed: whether a row may be; it is asked about partial rows too, and has to say yes to
            those that it does not refuse yet.
    """
    names = list(parameters)
    open_pairs = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i in range(len(parameters[a]))
        for j in range(len(parameters[b]))
    }
    rows: list[Row] = []
    for pair in sorted(open_pairs):
        if pair not in open_pairs:
            continue
        row = _completed(dict(pair), parameters, allowed, open_pairs, len(rows))
        open_pairs.discard(pair)  # no allowed row has it, or this one
        if row is None:
            continue
        chosen = [(name, row[name]) for name in names]
        open_pairs -= set(combinations(chosen, 2))
        rows.append({name: parameters[name][row[name]] for name in names})
    return rows


def _completed(
    row: dict[str, int],
    parameters: Mapping[str, Sequence[Any]],
    allowed: Callable[[Row], bool],
    open_pairs: set[Any],
    turn: int,
) -> dict[str, int] | None:
    """The row with a value for every parameter, chosen so that many open pairs are in it."""
    if not allowed({name: parameters[name][i] for name, i in row.items()}):
        return None
    missing = [name for name in parameters if name not in row]
    if not missing:
        return row
    order = {name: place for place, name in enumerate(parameters)}
    name = missing[0]

    def gain(value: int) -> int:
        items = sorted([*row.items(), (name, value)], key=lambda item: order[item[0]])
        return sum(pair in open_pairs for pair in combinations(items, 2) if (name, value) in pair)

    count = len(parameters[name])
    # Among equals another one each time, so that what is chosen freely is spread.
    values = sorted(range(count), key=lambda value: (-gain(value), (value - turn) % count))
    for value in values:
        found = _completed({**row, name: value}, parameters, allowed, open_pairs, turn)
        if found is not None:
            return found
    return None
