"""The CUDA part of the package, as it is loaded, on emulated devices and without any."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = "from dpcomm import _core; print(_core.device_count())"
LIMIT_S = 60.0


def answer(environment: dict[str, str], program: str = PROGRAM) -> str:
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_devices_are_counted(emulated_cuda: dict[str, str]) -> None:
    assert answer(emulated_cuda) == "(4, '')"
    assert answer(emulated_cuda | {"CUDA_VISIBLE_DEVICES": "3,1"}) == "(2, '')"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"FAKE_CUDA_DEVICES": "0"}, "none is visible"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "none is visible"),
        ({"FAKE_CUDA_DRIVER_VERSION": "12080"}, "the driver is too old"),
        ({"FAKE_CUDA_DRIVER_VERSION": "0"}, "the driver is missing"),
        ({"FAKE_CUDA_FAIL": "cudaGetDeviceCount:1:999"}, "CUDA error 999"),
        ({"DPCOMM_CUDA_LIBRARY": "/nowhere/lib.so"}, "cannot be loaded"),
    ],
)
def test_why_there_is_no_device(
    emulated_cuda: dict[str, str], variables: dict[str, str], text: str
) -> None:
    said = answer(emulated_cuda | variables)
    assert said.startswith("(0, 'no CUDA device: ")
    assert text in said
