"""torchrun: the plain example, and the one in which a rank dies and all starts again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dpcomm

pytest.importorskip("torch")
pytest.importorskip("sklearn")

HOME = Path(dpcomm.__file__).parents[1]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done


def elastic(folder: Path, crash_epoch: int) -> tuple[subprocess.CompletedProcess[str], str]:
    """A run of two epochs, and the hash of its parameters."""
    script, checkpoint = str(EXAMPLES / "elastic_restart.py"), folder / "digits.pt"
    options = ("--epochs", "2", "--crash-epoch", str(crash_epoch), "--checkpoint", str(checkpoint))
    done = torchrun(folder, "--max-restarts", "1", script, *options)
    found = re.search(r"accuracy [0-9.]+%; parameters ([0-9a-f]{16})", done.stdout)
    assert found is not None, done.stdout
    return done, found[1]


def test_a_plain_script(tmp_path: Path) -> None:
    done = torchrun(tmp_path, str(EXAMPLES / "train_digits.py"), "--epochs", "1")
    assert "held out: accuracy" in done.stdout


def test_an_elastic_restart(tmp_path: Path) -> None:
    """The death of a rank costs time and nothing else: the parameters are those of a calm run."""
    calm, expected = elastic(tmp_path, crash_epoch=-1)
    assert "start 1" not in calm.stdout
    done, parameters = elastic(tmp_path, crash_epoch=1)
    assert "start 0: 0 epochs are done" in done.stdout
    assert "start 1: 1 epochs are done" in done.stdout
    # torchrun ends rank 0 soon after the death, often before it can tell of it.
    for text in re.findall(r"rank 0 goes down: (.*)", done.stderr):
        assert re.match(r"rank 1 \(pid \d+.*died", text), text
    assert parameters == expected


def test_the_example_of_launch() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "launch_digits.py")],
        env={**os.environ, "PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    rates = re.findall(r"^rank \d: ([0-9.]+)%", done.stdout, re.MULTILINE)
    assert len(rates) == 2
    assert min(map(float, rates)) > 80
