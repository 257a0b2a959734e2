"""bench/gpu_check.py, which is for machines with devices, on emulated ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.py"
LIMIT_S = 240.0


def run(
    environment: dict[str, str], *arguments: str, program: str = ""
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(SCRIPT.parent), *(path for path in sys.path if path)])
    start = ["-c", program] if program else [str(SCRIPT)]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        env=environment | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_without_a_device_it_says_why() -> None:
    done = run({**os.environ, "DPCOMM_CUDA_LIBRARY": "/nowhere/lib.so"})
    assert done.returncode == 77, done.stderr
    assert done.stdout.startswith("no CUDA device: ")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_holds_on_emulated_devices(
    emulated_cuda: dict[str, str], tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    done = run(
        emulated_cuda, "--quick", "--worlds", "2", "3", "--ranks", "2", "--json", str(result)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(result.read_text())["checks"]
    assert all(check["ok"] for check in checks)
    names = {(check["part"], check["name"]) for check in checks}
    assert {part for part, _ in names} == {"devices", "virtual", "ranks"}
    assert ("virtual", "graph") in names
    assert ("ranks", "a rank that does not come") in names


WRONG = """
import sys
import gpu_check, gpu_virtual

right = gpu_virtual.expected

def wrong(*arguments):
    outputs = right(*arguments)
    outputs[1].view("u1")[-1] ^= 1
    return outputs

gpu_virtual.expected = wrong
sys.exit(gpu_check.main())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_wrong_bit_is_seen(emulated_cuda: dict[str, str]) -> None:
    done = run(emulated_cuda, "--quick", "--worlds", "2", "--parts", "virtual", program=WRONG)
    assert done.returncode == 1
    assert "differs at element" in done.stdout
