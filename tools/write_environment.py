"""Writes docs/environment.md from the table in csrc/base/env.def (through dpcomm._core)."""

from __future__ import annotations

import pathlib

from dpcomm import _core

TARGET = pathlib.Path(__file__).resolve().parent.parent / "docs" / "environment.md"

HEAD = """# Environment variables

Read when a communicator or process group is made (`DPCOMM_DEBUG` once a process). An empty value
counts as not set. Made by `tools/write_environment.py` from `csrc/base/env.def`.

| variable | default | meaning |
|---|---|---|
"""


def text() -> str:
    """The page."""
    rows = (
        f"| `{name}` | {f'`{default}`' if default else ''} | {meaning} |\n"
        for name, default, meaning in _core.environment()
    )
    return HEAD + "".join(rows)


if __name__ == "__main__":
    TARGET.write_text(text())
