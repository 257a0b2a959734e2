"""The results: rows, the table in nccl-tests' columns, JSON and CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpcomm.bench.units import BenchError, algbw, busbw

__all__ = ["Row", "Table", "load", "make_rows", "run_record", "save"]

FORMAT = 1  # of the JSON; raised when a reader would have to change
Row = dict[str, Any]
OUT_OF_PLACE, IN_PLACE = "out-of-place", "in-place"


def make_rows(case: Any, measurements: Iterable[Any], reference: str) -> list[Row]:
    """One row per backend and placement of one size (`cases.Case`, `runner.Measurement`s).

    `ratio` is the time of the backend labelled `reference` over the time of this one: above 1 is
    faster. It compares the same placement, or the only one that the reference has; it is None
    where the reference did not run.
    """
    cells = list(measurements)
    baselines = {c.placement: c.time_us for c in cells if c.backend.spec.label == reference}
    only = next(iter(baselines.values())) if len(baselines) == 1 else None
    rows = []
    for cell in cells:
        baseline = baselines.get(cell.placement, only)
        seconds = cell.time_us * 1e-6
        rows.append(
            {
                "collective": case.collective,
                "size_bytes": case.size_bytes,
                "count": case.count,
                "dtype": case.dtype_name,
                "op": case.op if case.reduces else "none",
                "root": case.root if case.collective == "broadcast" else -1,
                "backend": cell.backend.spec.label,
                "wire": cell.backend.spec.wire,
                "algo": cell.backend.spec.algo,
                "placement": cell.placement,
                "time_us": round(cell.time_us, 4),
                "min_us": round(cell.min_us, 4),
                "algbw_gbps": round(algbw(case.size_bytes, seconds), 6),
                "busbw_gbps": round(
                    busbw(case.collective, case.size_bytes, seconds, case.world_size), 6
                ),
                "cpu_us": round(cell.cpu_us, 4),
                "wrong": cell.wrong,
                "ratio": None if baseline is None else round(baseline / cell.time_us, 4),
                "reference": reference,
                "iterations": cell.iterations,
                "rounds_us": [round(value, 4) for value in cell.round_us],
            }
        )
    return rows


def run_record(world_size: int, hosts: int, options: dict[str, Any]) -> dict[str, Any]:
    """What a reader needs to know about a run: machine, versions, options."""
    import torch

    import dpcomm

    return {
        "host": socket.gethostname(),
        "hosts": hosts,
        "world_size": world_size,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dpcomm": dpcomm.__version__,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("DPCOMM_")},
        "options": options,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def save(path: Path, record: dict[str, Any], rows: list[Row]) -> None:
    """Writes x.json (everything) or x.csv (a row each; the record's short fields repeated)."""
    if path.suffix == ".json":
        text = json.dumps({"format": FORMAT, **record, "rows": rows}, indent=1)
        path.write_text(text + "\n")
        return
    run = {k: record[k] for k in ("host", "hosts", "world_size", "cpu", "cores", "torch", "dpcomm")}
    run["options"] = json.dumps(record["options"], sort_keys=True)
    with path.open("w", newline="") as file:
        fields = [k for k in rows[0] if k != "rounds_us"] if rows else []
        writer = csv.DictWriter(file, [*fields, *run], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, **run} for row in rows)


def load(path: Path) -> dict[str, Any]:
    """Reads a JSON written by `save`.

    Raises:
        BenchError: if it is something else.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or not record.get("rows"):
        raise BenchError(f"{path} is not a result of dpcomm.bench --output x.json with any row")
    return record


class Table:
    """nccl-tests' table, and to its right: CPU time, the ratio to the last backend, the backend."""

    def __init__(self, labels: list[str], show_cpu: bool, show_min: bool) -> None:
        self._labels = labels
        self._cpu, self._min = show_cpu, show_min
        self._ratio = len(labels) > 1

    def header(self) -> list[str]:
        half = 31 + 9 * self._min + 9 * self._cpu
        names = f"{'size':>12} {'count':>13} {'type':>9} {'redop':>7} {'root':>5}"
        units = f"{'(B)':>12} {'(elements)':>13} {'':>9} {'':>7} {'':>5}"
        block = f"{'time':>9} {'algbw':>7} {'busbw':>7} {'#wrong':>6}"
        block_units = f"{'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7} {'':>6}"
        if self._min:
            block, block_units = f"{block} {'min':>8}", f"{block_units} {'(us)':>8}"
        if self._cpu:
            block, block_units = f"{block} {'cpu':>8}", f"{block_units} {'(us)':>8}"
        ratio = f"{'ratio':>8}" if self._ratio else ""
        return [
            f"# {'':>50} {OUT_OF_PLACE:^{half + 2}} {IN_PLACE:^{half + 2}}".rstrip(),
            f"#{names}  {block}  {block}{ratio}  backend",
            f"#{units}  {block_units}  {block_units}".rstrip(),
        ]

    def line(self, rows: list[Row]) -> str:
        """One line: the rows of one backend on one size, one per placement."""
        row = rows[0]
        text = (
            f" {row['size_bytes']:>12} {row['count']:>13} {row['dtype']:>9} "
            f"{row['op']:>7} {row['root']:>5}"
        )
        by_placement = {r["placement"]: r for r in rows}
        for placement in (OUT_OF_PLACE, IN_PLACE):
            text += "  " + self._block(by_placement.get(placement))
        if self._ratio:
            ratio = by_placement.get(IN_PLACE, row)["ratio"]
            text += f"{'n/a' if ratio is None else f'{ratio:.2f}x':>8}"
        return f"{text}  {row['backend']}"

    def _block(self, row: Row | None) -> str:
        if row is None:
            row = {}
        cells = [
            (9, _number(row.get("time_us"))),
            (7, _number(row.get("algbw_gbps"), 2)),
            (7, _number(row.get("busbw_gbps"), 2)),
            (6, "n/a" if row.get("wrong") is None else str(row["wrong"])),
        ]
        if self._min:
            cells.append((8, _number(row.get("min_us"))))
        if self._cpu:
            cells.append((8, _number(row.get("cpu_us"))))
        return " ".join(f"{text:>{width}}" for width, text in cells)

    def footer(self, rows: list[Row]) -> list[str]:
        """nccl-tests' last lines: wrong elements, and the mean bus bandwidth of each backend."""
        checked = [row["wrong"] for row in rows if row["wrong"] is not None]
        verdict = "OK" if not sum(checked) else "FAILED"
        lines = [
            f"# Out of bounds values : {sum(checked)} {verdict if checked else '(not checked)'}"
        ]
        for label in self._labels:
            speeds = [row["busbw_gbps"] for row in rows if row["backend"] == label]
            if speeds:
                mean = sum(speeds) / len(speeds)
                lines.append(f"# Avg bus bandwidth    : {mean:.5g} ({label})")
        return lines


def _number(value: float | None, decimals: int | None = None) -> str:
    if value is None:
        return "n/a"
    if decimals is None:
        decimals = 2 if value < 100 else 1 if value < 10000 else 0
    return f"{value:.{decimals}f}"


def print_out(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)
    sys.stdout.flush()
