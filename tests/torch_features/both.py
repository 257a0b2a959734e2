"""Runs checks on gloo and then on dpcomm, in the same processes, and compares what they give.

A check is a function without arguments that uses torch.distributed with the default group and
returns what is to be compared: tensors, numbers, strings, and lists, tuples and dicts of them. It
is called once for each backend, in the same order, so that groups get the same names. After a check
that failed the ranks make a new default group, which leaves the others alone. A launch of ranks is
shared by many checks.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree

import dpcomm  # noqa: F401  makes the backend known where the package is not installed

Check = Callable[[], Any]
PATIENCE = timedelta(seconds=40)


class Refused:
    """In place of a result: this backend does not do that; nothing is compared with it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def tolerance(value: float) -> Callable[[Check], Check]:
    """Largest difference of floating-point results, relative to the largest value of a tensor.

    Without it results have to be the same to the bit.
    """

    def mark(check: Check) -> Check:
        check.tolerance = value  # type: ignore[attr-defined]
        return check

    return mark


@cache
def launch_store() -> dist.Store:
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


@contextmanager
def default_group(backend: str, name: str) -> Iterator[None]:
    """The default group of all ranks in a part of the launch's store that nobody else uses."""
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"{backend}/{name}", launch_store()),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=PATIENCE,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_gloo() -> bool:
    return bool(dist.get_backend() == "gloo")


def assert_all_on(backend: str) -> None:
    """No group of another backend came into being: then nothing would be shown."""
    for group in dist.distributed_c10d._world.pg_map:
        assert dist.get_backend(group) == backend, (group.group_name, dist.get_backend(group))


def difference(wanted: Any, got: Any, allowed: float) -> str:
    """What differs between two results; empty if they agree."""
    if isinstance(wanted, Refused):
        return ""
    if isinstance(got, Refused):
        return f"refused: {got.reason}"
    theirs, spec = _pytree.tree_flatten(wanted)
    mine, my_spec = _pytree.tree_flatten(got)
    if spec != my_spec:
        return f"structure {my_spec}, wanted {spec}"
    for place, (a, b) in enumerate(zip(theirs, mine, strict=True)):
        if isinstance(a, torch.Tensor):
            if a.dtype != b.dtype or a.shape != b.shape:
                return f"result {place}: {b.dtype} {b.shape}, wanted {a.dtype} {a.shape}"
            if allowed and a.is_floating_point() and a.numel():
                # Written so that NaN is a difference.
                scale = max(float(a.abs().max()), 1e-30)
                if not float((a.double() - b.double()).abs().max()) <= allowed * scale:
                    return f"result {place}: {b}, wanted {a} within {allowed}"
            elif not torch.equal(a, b):
                return f"result {place}: {b}, wanted {a}"
        elif a != b:
            return f"result {place}: {b!r}, wanted {a!r}"
    return ""


def all_well(place: str, well: bool) -> bool:
    """True if all ranks say so. Goes through the store: the group may be broken."""
    store, world = dist.PrefixStore(place, launch_store()), int(os.environ["WORLD_SIZE"])
    store.set(os.environ["RANK"], "well" if well else "not")
    ranks = [str(rank) for rank in range(world)]
    store.wait(ranks, PATIENCE + PATIENCE)
    return all(store.get(rank) == b"well" for rank in ranks)


def results_of(backend: str, checks: list[Check], problems: dict[str, str]) -> dict[str, Any]:
    """What each check gives. A new default group only after one that failed on some rank: making
    groups of gloo again and again is where gloo itself fails at times."""
    results: dict[str, Any] = {}
    pending = list(checks)
    while pending:
        with default_group(backend, pending[0].__name__):
            while pending:
                check = pending.pop(0)
                name = check.__name__
                started = time.monotonic()
                print(f"{name} on {backend} ...", end=" ", flush=True)
                well = False
                try:
                    results[name] = check()
                    assert_all_on(backend)
                    well = True
                except Exception:
                    problems[name] += f"{name} on {backend}: {traceback.format_exc()}"
                print(f"{time.monotonic() - started:.2f} s", flush=True)
                if not all_well(f"well/{backend}/{name}", well):
                    problems[name] = problems[name] or f"{name} on {backend}: another rank failed"
                    break
    return results


def run(checks: list[Check]) -> dict[str, str]:
    """What went wrong in each check on this rank: an empty text where nothing did."""
    only = os.environ.get("CHECKS")  # for a look at one of them, by hand
    checks = [check for check in checks if not only or check.__name__ in only.split(",")]
    problems = {check.__name__: "" for check in checks}
    theirs = results_of("gloo", checks, problems)
    mine = results_of("dpcomm", checks, problems)
    for check in checks:
        name = check.__name__
        if not problems[name]:
            allowed = getattr(check, "tolerance", 0.0)
            problems[name] = difference(theirs[name], mine[name], allowed)
        if problems[name]:
            print(problems[name], file=sys.stderr, flush=True)
    return problems


def report(outcomes: list[dict[str, str]], name: str) -> None:
    """Fails with what all ranks said about this check."""
    said = [f"--- rank {r}\n{each[name]}" for r, each in enumerate(outcomes) if each[name]]
    assert not said, "\n".join(said)
