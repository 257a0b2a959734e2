"""What `python -m dpcomm.info` and `python -m dpcomm.doctor` print: tables, plain text or JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

__all__ = ["print_json", "print_table"]

Row = Sequence[str]


def print_json(value: Any, file: TextIO | None = None) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=2), file=file or sys.stdout)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Row],
    *,
    styles: Mapping[str, str] | None = None,
    file: TextIO | None = None,
) -> None:
    """A table: drawn by rich where that is installed and `file` (stdout) is a terminal, else text.

    Args:
        title, columns, rows: What it says; all rows as long as `columns`.
        styles: Of rich, by what stands in the first column.
    """
    out = file or sys.stdout
    if out.isatty():
        with contextlib.suppress(ImportError):
            _print_rich(title, columns, rows, styles or {}, out)
            return
    _print_plain(title, rows, out)


def _print_rich(
    title: str, columns: Sequence[str], rows: Sequence[Row], styles: Mapping[str, str], out: TextIO
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", show_lines=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        style = styles.get(row[0], "")
        table.add_row(Text(row[0], style=style), *(Text(cell) for cell in row[1:]))
    Console(file=out).print(table)


def _print_plain(title: str, rows: Sequence[Row], out: TextIO) -> None:
    """Columns of equal width, but for the last two: what is found and, below it, what to do."""
    print(title, file=out)
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    for row in rows:
        head = "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        indent = " " * (len(head) + 2) if len(row) > 2 else " " * (widths[0] + 4)
        if len(row) == 2:
            head, texts = "  " + row[0].ljust(widths[0]), [row[1]]
        else:
            texts = [cell for cell in row[2:] if cell]
        for number, text in enumerate(texts or [""]):
            lines = textwrap.wrap(
                text,
                max(40, 118 - len(indent)),
                break_long_words=False,
                break_on_hyphens=False,
            ) or [""]
            for line_number, line in enumerate(lines):
                first = number == 0 and line_number == 0
                print((head + "  " + line if first else indent + line).rstrip(), file=out)
    print(file=out)
