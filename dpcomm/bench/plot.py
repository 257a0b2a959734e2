"""A picture of a result: time, bus bandwidth and the ratio against the size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpcomm.bench.report import IN_PLACE, Row, load
from dpcomm.bench.units import BenchError, format_size

__all__ = ["plot"]

_COLORS = ("#1b6ca8", "#d9822b", "#3a8f5c", "#a63d57", "#6b5b95", "#7f7f7f")
_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
}


def plot(source: Path, target: Path) -> None:
    """Draws a JSON of `dpcomm.bench --output` into a picture (PNG, SVG, PDF by its suffix).

    Only the first dtype and operation of the file are drawn.

    Raises:
        BenchError: if matplotlib is missing, the file is no result, or the suffix is unknown.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise BenchError("plot needs matplotlib: pip install matplotlib") from error
    record = load(source)
    rows = _first_kind(record["rows"])
    several = len({row["backend"] for row in rows}) > 1
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(1, 3 if several else 2, figsize=(12 if several else 8.4, 4))
        _panel(axes[0], rows, "time_us", "time (µs)")
        _panel(axes[1], rows, "busbw_gbps", "bus bandwidth (GB/s)")
        if several:
            _ratio_panel(axes[2], rows)
        axes[0].legend(frameon=False, loc="upper left")
        for axis in axes:
            _size_axis(axis, sorted({row["size_bytes"] for row in rows}))
        figure.suptitle(_title(record, rows[0]), x=0.01, ha="left", fontsize=10)
        figure.tight_layout(rect=(0, 0, 1, 0.97))
        try:
            figure.savefig(target, dpi=150)
        except (OSError, ValueError) as error:
            raise BenchError(f"cannot write {target}: {error}") from error
        finally:
            pyplot.close(figure)


def _first_kind(rows: list[Row]) -> list[Row]:
    first = rows[0]
    return [r for r in rows if (r["dtype"], r["op"]) == (first["dtype"], first["op"])]


def _series(rows: list[Row]) -> list[tuple[str, str, str, list[Row]]]:
    """(label, color, line style, rows by size) of each backend and placement."""
    placements = {row["placement"] for row in rows}
    result = []
    for i, backend in enumerate(dict.fromkeys(row["backend"] for row in rows)):
        mine = [row for row in rows if row["backend"] == backend]
        for placement in dict.fromkeys(row["placement"] for row in mine):
            part = sorted(
                (r for r in mine if r["placement"] == placement), key=lambda r: int(r["size_bytes"])
            )
            label = backend if len(placements) == 1 else f"{backend}, {placement}"
            style = "-" if placement == IN_PLACE or len(placements) == 1 else "--"
            result.append((label, _COLORS[i % len(_COLORS)], style, part))
    return result


def _panel(axis: Any, rows: list[Row], key: str, title: str) -> None:
    for label, color, style, part in _series(rows):
        sizes, values = [r["size_bytes"] for r in part], [r[key] for r in part]
        axis.plot(sizes, values, style, color=color, label=label, marker="o", markersize=3)
        if key == "time_us":  # the spread over the rounds
            low = [min(r["rounds_us"]) for r in part]
            high = [max(r["rounds_us"]) for r in part]
            axis.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    axis.set_yscale("log")
    axis.set_title(title, loc="left", fontsize=9, color="#333333")


def _ratio_panel(axis: Any, rows: list[Row]) -> None:
    reference = rows[0]["reference"]
    axis.axhline(1, color="#555555", linewidth=0.8)
    compared = [series for series in _series(rows) if series[3][0]["backend"] != reference]
    for label, color, style, part in compared:
        points = [(r["size_bytes"], r["ratio"]) for r in part if r["ratio"] is not None]
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), style, color=color, label=label, marker="o", ms=3)
        for size, value in points if len(compared) == 1 else ():  # more would cover each other
            axis.annotate(
                f"{value:.0f}" if value >= 10 else f"{value:.1f}",
                (size, value),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=color,
            )
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.7), high * 1.3)
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(f"times faster than {reference}", loc="left", fontsize=9, color="#333333")


def _size_axis(axis: Any, sizes: list[int]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    shown = sizes if len(sizes) <= 8 else sizes[:: -(-len(sizes) // 8)]
    axis.set_xticks(shown, [format_size(size) for size in shown], rotation=45, ha="right")
    axis.xaxis.set_minor_locator(NullLocator())


def _title(record: dict[str, Any], row: Row) -> str:
    op = "" if row["op"] == "none" else f" {row['op']}"
    return (
        f"{row['collective']}{op}, {row['dtype']}, {record['world_size']} ranks on "
        f"{record['hosts']} host(s), {record['cores']} cores ({record['cpu']})"
    )
