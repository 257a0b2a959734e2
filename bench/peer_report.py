"""What the benchmark against peers found: rows, tables, picture."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from dpcomm.bench.units import algbw, busbw, format_size

__all__ = ["REFERENCE", "add_comparisons", "make_row", "plot", "tables"]

REFERENCE = "dpcomm"
COPY = "copy"
MEASURES = (COPY, "no-op, dist")  # rows that are no all-reduce
Run = dict[str, Any]  # one number of ranks
Row = dict[str, Any]

# Bytes that an all-reduce of S bytes on N ranks has to move through memory, divided by N * S:
# the input of each rank is read once and the output of each rank is written once.
MOVED_PER_BYTE = 2


def make_row(peer: str, size_bytes: int, ranks: int, calls: int, rounds: list[Row]) -> Row:
    """One peer at one size. `rounds`: seconds and CPU seconds of one call, in every round."""
    seconds = median(one["seconds"] for one in rounds)
    return {
        "peer": peer,
        "size_bytes": size_bytes,
        "time_us": round(seconds * 1e6, 4),
        "min_us": round(min(one["seconds"] for one in rounds) * 1e6, 4),
        "cpu_us": round(median(one["cpu"] for one in rounds) * 1e6, 4),
        "algbw_gbps": round(algbw(size_bytes, seconds), 6),
        "busbw_gbps": round(busbw("all_reduce", size_bytes, seconds, ranks), 6),
        "calls": calls,
        "wrong": 0,
        "rounds_us": [round(one["seconds"] * 1e6, 4) for one in rounds],
    }


def add_comparisons(run: Run) -> None:
    """Adds what follows from the rows of a run.

    To each row `ratio` (its time over dpcomm's) and `roofline` (the fraction of it reached); to the
    run `copy_gbps` (bytes read and written by all ranks together, the best round and size) and
    `roofline_us`.
    """
    ranks, rows = run["ranks"], run["rows"]
    # One byte copied is one read and one written. The fastest round: a bound must not be a median.
    rates = [
        2 * ranks * row["size_bytes"] / row["min_us"] / 1e3
        for row in rows
        if row["peer"] == COPY and row["min_us"]
    ]
    run["copy_gbps"] = round(max(rates), 3) if rates else None
    run["roofline_us"] = {}
    reference = {row["size_bytes"]: row["time_us"] for row in rows if row["peer"] == REFERENCE}
    for row in rows:
        size, time = row["size_bytes"], row["time_us"]
        base = reference.get(size)
        row["ratio"] = round(time / base, 4) if time and base else None
        row["roofline"] = None
        if run["copy_gbps"] and _copied(run, size):
            least = MOVED_PER_BYTE * ranks * size / run["copy_gbps"] / 1e3
            run["roofline_us"][str(size)] = round(least, 4)
            if time and row["peer"] not in MEASURES:
                row["roofline"] = round(least / time, 4)


def _copied(run: Run, size: int) -> bool:
    return any(row["peer"] == COPY and row["size_bytes"] == size for row in run["rows"])


def tables(run: Run) -> list[str]:
    """Plain text: times, fastest rounds, bandwidths, ratios and the roofline of one run."""
    sizes = list(dict.fromkeys(row["size_bytes"] for row in run["rows"]))
    titled = (
        ("time of a call in µs, median over the rounds", "time_us", _number),
        ("the fastest round, µs", "min_us", _number),
        ("bus bandwidth, GB/s", "busbw_gbps", _number),
        (f"time over that of {REFERENCE} (above 1: {REFERENCE} is faster)", "ratio", _ratio),
    )
    lines = [f"# {run['ranks']} ranks, {run['cores']} cores"]
    for title, key, form in titled:
        lines += ["", f"# {title}", _line("", [format_size(size) for size in sizes])]
        for peer in dict.fromkeys(row["peer"] for row in run["rows"]):
            if key == "busbw_gbps" and peer in MEASURES:
                continue
            cells = {r["size_bytes"]: r for r in run["rows"] if r["peer"] == peer}
            lines.append(_line(peer, [_cell(cells.get(size), key, form) for size in sizes]))
    lines += _roofline(run, sizes)
    others = [row["others_load"] for row in run["rows"] if row["others_load"] is not None]
    if others:
        lines += ["", f"# other processes took up to {max(others):.0%} of the cores meanwhile"]
    return lines


def _roofline(run: Run, sizes: list[int]) -> list[str]:
    if not run["roofline_us"]:
        return []
    head = (
        f"# roofline: {MOVED_PER_BYTE} x {run['ranks']} x size at {run['copy_gbps']:.3g} GB/s, the "
        "copies' bandwidth (read + written, all ranks); below it: the fraction reached"
    )
    lines = ["", head, _line("", [format_size(size) for size in sizes])]
    least = [run["roofline_us"].get(str(size)) for size in sizes]
    lines.append(_line("roofline, µs", ["-" if v is None else _number(v) for v in least]))
    for peer in dict.fromkeys(row["peer"] for row in run["rows"] if row["roofline"]):
        cells = {r["size_bytes"]: r for r in run["rows"] if r["peer"] == peer}
        lines.append(_line(peer, [_cell(cells.get(s), "roofline", _percent) for s in sizes]))
    return lines


def _line(head: str, cells: list[str]) -> str:
    return f"{head:<16}" + "".join(f"{cell:>10}" for cell in cells)


def _cell(row: Row | None, key: str, form: Any) -> str:
    if row is None or row.get(key) is None:
        return "wrong" if row is not None and row["wrong"] else "-"
    return str(form(row[key]))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float) -> str:
    return f"{value:.3g}x" if value < 100 else f"{value:.0f}x"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def plot(record: dict[str, Any], target: Path) -> None:
    """Time and ratio against size, a row of panels for each number of ranks (PNG, SVG, PDF)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [run for run in record["runs"] if run["rows"]]
    figure, panels = pyplot.subplots(len(runs), 2, figsize=(12, 4.6 * len(runs)), squeeze=False)
    peers = list(dict.fromkeys(row["peer"] for run in runs for row in run["rows"]))
    colors = dict(zip(peers, pyplot.get_cmap("tab20").colors, strict=False))
    for run, (left, right) in zip(runs, panels, strict=True):
        for peer in peers:
            rows = [r for r in run["rows"] if r["peer"] == peer and r["time_us"]]
            ours = peer.startswith(REFERENCE)
            style: dict[str, Any] = {"color": colors[peer], "label": peer, "marker": "o", "ms": 3}
            style |= {"lw": 2.2 if ours else 1.1, "ls": ":" if peer in MEASURES else "-"}
            left.plot([r["size_bytes"] for r in rows], [r["time_us"] for r in rows], **style)
            compared = [r for r in rows if r["ratio"] and peer not in MEASURES]
            right.plot([r["size_bytes"] for r in compared], [r["ratio"] for r in compared], **style)
        least = [(int(size), time) for size, time in run["roofline_us"].items()]
        if least:
            left.plot(*zip(*least, strict=True), color="#222222", lw=1, ls="--", label="roofline")
        left.set_title(f"{run['ranks']} ranks: time (µs)", loc="left", fontsize=9)
        right.set_title(f"time over {REFERENCE}'s (above 1: slower)", loc="left", fontsize=9)
        left.legend(frameon=False, fontsize=7)
        sizes = sorted({row["size_bytes"] for row in run["rows"]})
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sizes, [format_size(s) for s in sizes], rotation=45, ha="right")
            axis.grid(color="#e3e3e3", lw=0.6)
    figure.suptitle(f"all_reduce sum, float32, in place; {record['cpu']}", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
