"""How fast the codecs are: GB/s per codec and instruction set, beside memcpy.

    python bench/micro/wire.py [--elems 65536] [--seconds 0.05] [--isa avx2] [--json x.json]

GB/s counts the fp32 numbers that pass (4 bytes an element), whatever the format in memory, so that
rows compare by the time of an element. The last column is the best instruction set's time over that
of a memcpy of the same fp32 numbers, taken in the same round. Each figure is the median of rounds
that visit all rows in turn; a call costs about a microsecond of binding besides.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dpcomm import _core

CODECS = [
    ("native", "float32"),
    ("native", "float16"),
    ("native", "bfloat16"),
    ("fp16", "float32"),
    ("bf16", "float32"),
    ("int8", "float32"),
]
ROUNDS = 5


@dataclass
class Row:
    """One operation; `run[isa]` does it once. memcpy is the row whose only isa is "libc"."""

    name: str
    run: dict[str, Callable[[], None]]


def codec_rows(isas: list[str], n: int) -> list[Row]:
    """load, combine, store and store with keep of each codec on n elements."""
    rows = []
    values = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    for wire, dtype in CODECS:
        data = np.empty(_core.wire_slice_bytes(wire, dtype, n), np.uint8)
        _core.wire_store(wire, dtype, "scalar", data, values.copy(), n, 0, n, False)
        out, acc, kept = data.copy(), values.copy(), values.copy()
        label = f"{wire} wire" if wire != "native" else f"{dtype} tensor"

        def load(isa: str, at=(wire, dtype), acc=acc, data=data) -> None:
            _core.wire_load(*at, isa, acc, data, n, 0, n)

        def combine(isa: str, at=(wire, dtype), acc=acc, data=data) -> None:
            _core.wire_combine(*at, isa, "sum", acc, data, n, 0, n)

        def store(isa: str, at=(wire, dtype), out=out, acc=values) -> None:
            _core.wire_store(*at, isa, out, acc, n, 0, n, False)

        def keep(isa: str, at=(wire, dtype), out=out, acc=kept) -> None:
            _core.wire_store(*at, isa, out, acc, n, 0, n, True)

        for what in (load, combine, store, keep):
            name = f"{label}: {'store, keep' if what is keep else what.__name__}"
            rows.append(Row(name, {isa: lambda isa=isa, f=what: f(isa) for isa in isas}))
    return rows


def sum_rows(isas: list[str], n: int) -> list[Row]:
    """The fused sum of several arrays of n floats."""
    rows = []
    for sources, destinations, divisor in [(2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (8, 1, 1)]:
        src = [np.ones(n, np.float32) for _ in range(sources)]
        dst = [np.empty(n, np.float32) for _ in range(destinations)]

        def run(isa: str, src=src, dst=dst, divisor=divisor) -> None:
            _core.wire_sum_f32(isa, dst, src, divisor, n)

        name = f"sum_f32: {sources} to {destinations}" + (", divided" if divisor > 1 else "")
        rows.append(Row(name, {isa: lambda isa=isa, f=run: f(isa) for isa in isas}))
    return rows


def memcpy_row(n: int) -> Row:
    src, dst = np.ones(n, np.float32), np.empty(n, np.float32)
    return Row("memcpy", {"libc": lambda: np.copyto(dst, src)})


def seconds_per_call(run: Callable[[], None], budget: float) -> float:
    """The mean time of a call, over calls that fill `budget` seconds."""
    run()
    started, calls = time.thread_time(), 0
    while (elapsed := time.thread_time() - started) < budget:
        for _ in range(4):
            run()
        calls += 4
    return elapsed / calls


def measure(rows: list[Row], budget: float) -> dict[str, dict[str, float]]:
    """Seconds per call, by row and instruction set."""
    taken: dict[tuple[str, str], list[float]] = {}
    for _ in track(range(ROUNDS), "rounds", console=Console(stderr=True), transient=True):
        for row in rows:
            for isa, run in row.run.items():
                taken.setdefault((row.name, isa), []).append(seconds_per_call(run, budget / ROUNDS))
    result: dict[str, dict[str, float]] = {}
    for (name, isa), times in taken.items():
        result.setdefault(name, {})[isa] = min(times)
    return result


def show(times: dict[str, dict[str, float]], isas: list[str], n: int) -> None:
    table = Table(title=f"wire codecs, {n} elements ({4 * n / 1024:.0f} KiB of fp32), GB/s of fp32")
    table.add_column("operation")
    for isa in [*isas, "time / memcpy"]:
        table.add_column(isa, justify="right")
    copy = times["memcpy"]["libc"]
    for name, by_isa in times.items():
        if name == "memcpy":
            continue
        speeds = [f"{4 * n / by_isa[isa] / 1e9:.1f}" for isa in isas]
        table.add_row(name, *speeds, f"{by_isa[isas[-1]] / copy:.2f}")
    table.add_row("memcpy", *[""] * (len(isas) - 1), f"{4 * n / copy / 1e9:.1f}", "1.00")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elems", type=int, default=65536, help="elements of a call")
    parser.add_argument("--seconds", type=float, default=0.05, help="time for each figure")
    parser.add_argument("--isa", action="append", help="only these instruction sets")
    parser.add_argument("--json", type=Path, help="write seconds per call to this file")
    options = parser.parse_args()
    isas = options.isa or _core.wire_isas()
    n = options.elems
    rows = [memcpy_row(n), *sum_rows(isas, n), *codec_rows(isas, n)]
    times = measure(rows, options.seconds)
    show(times, isas, n)
    if options.json:
        options.json.write_text(json.dumps({"elems": n, "seconds_per_call": times}, indent=2))


if __name__ == "__main__":
    main()
