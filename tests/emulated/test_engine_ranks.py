"""The engine without a communicator: all ranks in one process, and virtual ranks in one launch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_runtime
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LIMIT_S = 120.0
PARTS = ["results", "many", "abort", "waits"]


def run(program: Path, kernels: Path, part: str, world: int, **variables: str) -> str:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FAKE_CUDA_", "CUDA_VISIBLE", "DPCOMM_"))
    }
    # gcc 12's thread sanitizer does not know the address layouts that newer kernels choose.
    prefix = ["setarch", os.uname().machine, "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*prefix, program, part, str(world)],
        env={**kept, "FAKE_CUDA_KERNELS": str(kernels), "FAKE_CUDA_DEADLINE": "60", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    print(done.stdout, file=sys.stderr)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def engine() -> tuple[Path, Path]:
    """Program and kernels."""
    if why := fake_runtime.missing():
        pytest.skip(why)
    return fake_runtime.engine_program(), fake_runtime.source_kernels()


@pytest.fixture(scope="module")
def engine_threads() -> tuple[Path, Path]:
    """The host's side under ThreadSanitizer, with a small kernel."""
    if why := fake_runtime.missing():
        pytest.skip(why)
    return fake_runtime.engine_program(True), fake_runtime.sample_kernels(True)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_of_one_process(engine: tuple[Path, Path], part: str, world: int) -> None:
    run(*engine, part, world, FAKE_CUDA_JITTER_US="1000")


@pytest.mark.parametrize("part", ["results", "many", "abort"])
def test_there_is_no_race(engine_threads: tuple[Path, Path], part: str) -> None:
    """ThreadSanitizer ends the program at the first."""
    variables = {"FAKE_CUDA_JITTER_US": "1000", "TSAN_OPTIONS": "halt_on_error=1"}
    run(*engine_threads, part, 3, FAKE_CUDA_BLOCK_THREADS="32", **variables)


@pytest.mark.parametrize("world", [2, 8, 16])
def test_virtual_ranks(engine: tuple[Path, Path], world: int) -> None:
    run(*engine, "group", world, FAKE_CUDA_SMS="64")


def test_virtual_ranks_that_do_not_fit(engine: tuple[Path, Path]) -> None:
    text = run(*engine, "crowd", 16, FAKE_CUDA_SMS="8")
    assert "cannot hold one CTA of each of 16 ranks" in text
