"""The native tests (*_test.cc here), plain and under sanitizers, with no suppressions.

The builds are kept in build/, so that only what changed is compiled again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = sorted(path.stem for path in Path(__file__).parent.glob("*_test.cc"))
SANITIZERS = ["address,undefined", "thread"]
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


def program(name: str) -> str:
    """cmake or ninja of this environment, else the one on PATH."""
    here = Path(sysconfig.get_path("scripts")) / name
    found = str(here) if here.exists() else shutil.which(name)
    assert found, f"{name} is missing: pip install -r requirements/build.txt"
    return found


def build(sanitizer: str) -> Path:
    """Builds the native tests, one process at a time; returns the folder of the executables."""
    folder = ROOT / "build" / f"native-{sanitizer.replace(',', '-')}"
    configure = [program("cmake"), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={program('ninja')}", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    configure += [f"-DDPCOMM_SANITIZE={sanitizer}"]
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in [configure, [program("cmake"), "--build", str(folder), "-j", jobs]]:
            done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "native"


def run(executable: Path, arguments: list[str], timeout: float) -> None:
    # gcc 12's thread sanitizer does not know the address layouts that newer kernels choose.
    prefix = ["setarch", os.uname().machine, "-R"] if shutil.which("setarch") else []
    environment = {key: text for key, text in os.environ.items() if not key.startswith("DPCOMM_")}
    done = subprocess.run(
        [*prefix, str(executable), *arguments],
        env=environment | OPTIONS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    print(done.stdout, file=sys.stderr)
    assert done.returncode == 0, f"{executable.name} ended with {done.returncode}\n{done.stdout}"


@pytest.fixture(scope="module", params=SANITIZERS)
def executables(request: pytest.FixtureRequest) -> Path:
    return build(request.param)


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("test", TESTS)
def test_native(executables: Path, test: str) -> None:
    run(executables / test, [], timeout=300)


@pytest.mark.campaign
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("test", TESTS)
def test_native_long(executables: Path, test: str) -> None:
    run(executables / test, ["--long"], timeout=3600)


def test_there_are_native_tests() -> None:
    assert TESTS
