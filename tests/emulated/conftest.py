"""Executables of the emulation, built once a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import fake_runtime
import variants
from emulate import Emulation


@pytest.fixture(scope="session")
def sample() -> Emulation:
    """The emulator's own small kernel."""
    return Emulation(variants.build(variants.Variant((variants.SAMPLE,))))


@pytest.fixture(scope="session")
def source() -> Emulation:
    """The kernels as g++ compiles them."""
    return Emulation(variants.source_path())


@pytest.fixture(scope="session")
def source_threads() -> Emulation:
    """The same under ThreadSanitizer."""
    return Emulation(variants.source_path(thread_sanitizer=True), thread_sanitizer=True)


@pytest.fixture(scope="session")
def emulated_cuda() -> dict[str, str]:
    """The environment of processes in which dpcomm finds devices: virtual ones."""
    why = fake_runtime.missing()
    if why:
        pytest.skip(why)
    return fake_runtime.environment()
