"""The demo and the examples: they run, and the demo fails where it must."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dpcomm

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    home = str(Path(dpcomm.__file__).parents[1])
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": home},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def load(script: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(**changes: Any) -> dict[str, Any]:
    good = {"accuracy": 0.99, "loss": 0.02, "parameters": 10, "checksum": 5, "losses": [2.0, 0.1]}
    good |= {"step_ms": 10.0, "cpu_ms": 2.0, "cpu_error_ms": 0.1}
    good |= {"same_on_all_ranks": True}
    return {**good, **changes}


def test_the_numpy_example(tmp_path: Path) -> None:
    done = run("examples/communicator_numpy.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("same on all ranks: True") == 2
    assert "y = 3.0" in done.stdout or "y = 2.9" in done.stdout


def test_the_cupy_example(tmp_path: Path) -> None:
    done = run("examples/communicator_cupy.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing to show: " in done.stdout or "same on all ranks: True" in done.stdout


def test_the_demo_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    done = run(
        "examples/demo.py",
        "--variants",
        "gloo;dpcomm",
        "--epochs",
        "10",
        "--pairs",
        "5",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = [
        line.split() for line in done.stdout.splitlines() if line.startswith(("gloo", "dpcomm"))
    ]
    assert [row[0] for row in rows] == ["gloo", "dpcomm"]
    assert [row[1:3] for row in rows] == [rows[0][1:3]] * 2  # same accuracy, same loss
    assert 10_000 < (tmp_path / "demo_output" / "demo.png").stat().st_size < 1_000_000


def test_the_demo_says_that_a_rank_failed(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    done = run("examples/demo.py", "--variants", "nonsense", cwd=tmp_path)
    assert done.returncode == 1
    assert "demo failed: a rank failed" in done.stderr


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"losses": [1.0, float("nan")]}, "not finite"),
        ({"same_on_all_ranks": False}, "different parameters"),
        ({"accuracy": 0.8}, "80.0% of held-out"),
        ({"checksum": 6}, "differ from gloo's"),
    ],
)
def test_the_demo_refuses_wrong_results(changes: dict[str, Any], complaint: str) -> None:
    demo = load("examples/demo.py")
    demo.verify({"gloo": result(), "dpcomm": result()})
    with pytest.raises(demo.DemoError, match=complaint):
        demo.verify({"gloo": result(), "dpcomm": result(**changes)})


def all_reduce_result(**changes: Any) -> dict[str, Any]:
    rows = []
    for size, slow_us in ((8, 300.0), (2**20, 2000.0), (25 * 2**20, 20000.0)):
        fast = {"backend": "dpcomm", "size_bytes": size, "time_us": slow_us / 25, "ratio": 25.0}
        rows.append({**fast, "wrong": 0, **(changes if size == 8 else {})})
        rows.append({**fast, "backend": "gloo", "time_us": slow_us, "ratio": 1.0, "wrong": 0})
    return {"rows": rows}


def test_the_table_of_the_readme() -> None:
    script = load("bench/all_reduce.py")
    lines = script.table({2: all_reduce_result(), 4: all_reduce_result()}, "dpcomm", "gloo")
    assert {line.count("|") for line in lines} == {8}
    assert lines[2].startswith("| 8 B | 300 µs | 12 µs | **25.0x** |")
    assert lines[4].startswith("| 25 MiB | 20 ms | 800 µs | **25.0x** |")


def test_missed_figures_and_wrong_elements_are_found() -> None:
    script = load("bench/all_reduce.py")
    assert script.misses({2: all_reduce_result(), 4: all_reduce_result(ratio=1.1)}, "dpcomm") == []
    assert len(script.misses({2: all_reduce_result(ratio=19.0)}, "dpcomm")) == 1
    assert len(script.misses({4: all_reduce_result(ratio=0.9)}, "dpcomm")) == 1
    assert len(script.misses({2: all_reduce_result(wrong=3)}, "dpcomm")) == 1


def test_the_demo_shows_no_cost_below_the_noise(capsys: pytest.CaptureFixture[str]) -> None:
    demo = load("examples/demo.py")
    rows = {"gloo": result(), "dpcomm": result(cpu_ms=-0.05), "few": result(cpu_error_ms=math.inf)}
    demo.print_table(rows)
    shown = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert shown["gloo"][-2:] == ["2.00", "1.00x"]
    assert shown["dpcomm"][-2:] == ["<0.20", "<0.10x"]
    assert shown["few"][-2:] == ["-", "-"]
    assert shown["<:"][1] == "less"
