"""The environment table and its page."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys

import pytest

from dpcomm import _core

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_page_is_made_from_the_table() -> None:
    spec = importlib.util.spec_from_file_location("page", ROOT / "tools" / "write_environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "environment.md").read_text() == module.text(), (
        "run python tools/write_environment.py"
    )


def test_every_variable_has_a_help_text() -> None:
    table = _core.environment()
    assert len({name for name, _, _ in table}) == len(table) > 5
    assert all(name.startswith("DPCOMM_") and len(text) > 10 for name, _, text in table)


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("DPCOMM_WIRE", "fp8", "DPCOMM_WIRE 'fp8' is not known; there are native, fp16"),
        ("DPCOMM_WIRE_LINKS", "some", "DPCOMM_WIRE_LINKS=some is neither network nor all"),
        ("DPCOMM_ALGO", "star", "algorithm 'star' is not known; there are auto, ring"),
        ("DPCOMM_TIMEOUT", "soon", "DPCOMM_TIMEOUT=soon is not a non-negative number"),
        ("DPCOMM_TRANSPORT", "pigeon", "transport 'pigeon' is not known; there are auto, shm"),
        ("DPCOMM_SHARED_BUCKETS", "yes", "DPCOMM_SHARED_BUCKETS=yes is neither 0 nor 1"),
        ("DPCOMM_SLOT_BYTES", "-1", "DPCOMM_SLOT_BYTES=-1 is not a non-negative number"),
        ("DPCOMM_FAULTS", "melt=1", "DPCOMM_FAULTS: 'melt' is not a fault"),
        ("DPCOMM_ISA", "sse9", "DPCOMM_ISA"),
    ],
)
def test_a_wrong_value_names_the_variable(variable: str, value: str, says: str) -> None:
    code = "import dpcomm; dpcomm.Communicator(0, 1)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={variable: value, "PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 1
    assert "UsageError" in result.stderr
    assert says in result.stderr
