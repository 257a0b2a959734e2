"""The examples of frameworks, each run as its docstring says. `make frameworks` installs them.

That dpcomm is what ran is read from the backend's name that torch gives; that it worked, from the
accuracy on held-out digits.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(400)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DEADLINE_S = 300


def run(
    package: str, script: str, folder: Path, *before: str, env: dict[str, str] | None = None
) -> str:
    """Output of an example; skips where the framework is missing."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: make frameworks")
    print(package, version)
    done = subprocess.run(
        [sys.executable, *before, str(EXAMPLES / script)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-8000:]}"
    return done.stdout


def check(output: str, least: float = 95.0) -> None:
    match = re.search(r"^dpcomm, 2 ranks: .*accuracy ([0-9.]+)%", output, re.MULTILINE)
    assert match is not None, output
    assert float(match[1]) >= least


def test_lightning(tmp_path: Path) -> None:
    check(run("lightning", "lightning_digits.py", tmp_path))


def test_accelerate(tmp_path: Path) -> None:
    output = run("accelerate", "accelerate_digits.py", tmp_path, *TORCHRUN)
    check(output)
    assert "of 360 held-out digits" in output  # gathered from both ranks, none twice


def test_transformers(tmp_path: Path) -> None:
    output = run("transformers", "trainer_digits.py", tmp_path, *TORCHRUN)
    check(output)
    assert "360 held-out digits" in output


def test_ray(tmp_path: Path) -> None:
    assert "import dpcomm" not in (EXAMPLES / "ray_digits.py").read_text()
    check(run("ray", "ray_digits.py", tmp_path))


def test_deepspeed(tmp_path: Path) -> None:
    env = {"DS_ACCELERATOR": "cpu"}
    output = run("deepspeed", "deepspeed_digits.py", tmp_path, *TORCHRUN, env=env)
    check(output)
    match = re.search(r"state of (\d+) of (\d+) parameters", output)
    assert match is not None
    kept, everything = map(int, match.groups())
    assert everything / 2 <= kept <= everything / 2 + 64  # a half, padded


def test_torchft(tmp_path: Path) -> None:
    output = run("torchft", "torchft_digits.py", tmp_path)
    for replica in (0, 1):
        lines = [line for line in output.splitlines() if line.startswith(f"replica {replica}, ")]
        at_death = [line for line in lines if "step 20:" in line]
        assert any(re.search(r"rank \d \(pid \d+.*\) died", line) for line in at_death), output
        assert at_death[-1].endswith(": 2 ranks"), output
        sizes = [int(line.split()[-2]) for line in lines if line.endswith(" ranks")]
        assert sizes[-2:] == [3, 2], output
        assert float(re.findall(r"step 60: accuracy ([0-9.]+)%", "\n".join(lines))[0]) >= 90
    assert "replica 2, step 60" not in output


@pytest.mark.parametrize("mpirun", ["mpirun.openmpi", "mpirun.mpich"])
def test_mpi(mpirun: str, tmp_path: Path) -> None:
    """dpcomm.init() under a real mpirun, where there is one."""
    if shutil.which(mpirun) is None:
        pytest.skip(f"{mpirun} is not installed")
    script = tmp_path / "script.py"
    script.write_text(
        "import dpcomm, torch, torch.distributed as dist\n"
        "place = dpcomm.init(timeout=60)\n"
        "x = torch.ones(5) * (place.rank + 1)\n"
        "dist.all_reduce(x)\n"
        "print(f'{place.launcher} {place.world_size} {x[4].item()};', end='', flush=True)\n"
    )
    more = ("--allow-run-as-root", "--oversubscribe") if mpirun.endswith("openmpi") else ()
    done = subprocess.run(
        [mpirun, *more, "-n", "2", sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    launcher = "Open MPI" if mpirun.endswith("openmpi") else "MPI (PMI)"
    assert done.stdout.count(f"{launcher} 2 3.0;") == 2, done
