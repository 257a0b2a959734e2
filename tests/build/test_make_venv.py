"""The choice of a Python by tools/make_venv.sh."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def probe(python: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "tools/make_venv.sh"), "--probe", python]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_this_python_will_do() -> None:
    done = probe(sys.executable)
    assert done.returncode == 0, done.stderr


def test_what_a_python_lacks_is_said(tmp_path: Path) -> None:
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\necho 'without venv (ensurepip)' >&2\nexit 1\n")
    fake.chmod(0o755)
    done = probe(str(fake))
    assert done.returncode == 1
    assert f"{fake}: without venv (ensurepip)" in done.stderr
    assert "apt-get install python3 python3-venv python3-dev" in done.stderr


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    done = probe(str(tmp_path / "python9"))
    assert done.returncode == 1
    assert "python9: not found" in done.stderr
