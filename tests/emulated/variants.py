"""Compiles the executables of the emulation with g++, into build/emulated/ and only where needed.

An object is known by a hash of all that goes into it, so that nothing stale is ever used and that a
planted fault costs only the objects that it changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
OUTPUT = ROOT / "build" / "emulated"
INCLUDES = (ROOT / "csrc", HERE / "runtime", HERE / "driver")
RUNTIME = tuple(
    HERE / "runtime" / f"{name}.cc"
    for name in ("emulator", "scheduler", "report", "device", "memory", "context")
)
DRIVER = tuple(
    HERE / "driver" / f"{name}.cc" for name in ("main", "case", "ranks", "staging_names")
)
PLAN = (ROOT / "csrc" / "cuda" / "layout.cc", ROOT / "csrc" / "cuda" / "launch_plan.cc")
FLAGS = (
    "-std=c++20",
    "-O1",
    "-g1",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
)
COMPILE_TIMEOUT_S = 600
JOBS = 2
_running = threading.BoundedSemaphore(JOBS)


@dataclass(frozen=True)
class Unit:
    """A source, and flags of its own."""

    source: Path
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One executable."""

    kernels: tuple[Unit, ...]
    """What defines the kernels and find_kernel()."""
    thread_sanitizer: bool = False
    includes: tuple[Path, ...] = ()
    """Looked at before the real ones, for the kernels: planted faults."""


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


@functools.cache
def compiler_version() -> str:
    return subprocess.run(
        [compiler(), "--version"], capture_output=True, text=True, timeout=60, check=True
    ).stdout


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time."""
    folder = OUTPUT / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_compiler(command: Sequence[str]) -> str:
    """At most JOBS at a time."""
    with _running:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def digest(*parts: str | bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:24]


def compiled(source: Path, flags: Sequence[str], tool: str | None = None) -> Path:
    """The object of one source, by the C++ compiler or by `tool`, which is nvcc. Sources do not
    change while a process runs."""
    return _compiled(source, tuple(flags), tool or compiler())


@functools.cache
def _compiled(source: Path, flags: tuple[str, ...], tool: str) -> Path:
    rule = run_compiler([tool, *flags, "-MM", str(source)])
    names = re.sub(r"\\\n", " ", rule).split(":", 1)[1].split()
    contents = [Path(name).read_bytes() for name in names]
    # Where a file lies does not matter, only what is in it; the includes are therefore left out.
    kept = [flag for flag in flags if not flag.startswith("-I")]
    key = digest(tool, compiler_version(), " ".join(kept), *contents)
    target = OUTPUT / "objects" / f"{source.stem}-{key}.o"
    with locked(target.stem):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(".tmp.o")
            run_compiler([tool, *flags, "-c", str(source), "-o", str(partial)])
            partial.rename(target)
    return target


def build(variant: Variant) -> Path:
    """The executable of a variant."""
    plain = [*FLAGS, *(f"-I{path}" for path in INCLUDES)]
    checked = [*FLAGS, *(f"-I{path}" for path in (*variant.includes, *INCLUDES))]
    if variant.thread_sanitizer:
        checked.append("-fsanitize=thread")
    # The scheduler is not what is under test, and switches stacks.
    scheduler = [*plain, "-O2"]
    if variant.thread_sanitizer:
        scheduler.append("-DDPCOMM_EMULATED_TSAN")
    work = [(source, scheduler) for source in RUNTIME]
    work += [(source, plain) for source in (*DRIVER, *PLAN)]
    work += [(unit.source, [*checked, *unit.flags]) for unit in variant.kernels]
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda item: compiled(*item), work))
    key = digest(compiler_version(), *(path.name for path in objects))
    executable = OUTPUT / f"emulate-{key}"
    with locked(executable.name):
        if not executable.exists():
            partial = executable.with_suffix(".tmp")
            link = ["-fsanitize=thread"] if variant.thread_sanitizer else []
            run_compiler([compiler(), *link, *map(str, objects), "-o", str(partial)])
            partial.rename(executable)
    return executable


SAMPLE = Unit(HERE / "driver" / "sample_kernels.cc")
SOURCE_PARTS = 4
SOURCE_KERNELS = tuple(
    Unit(HERE / "driver" / "source_kernels.cc", (f"-DDPCOMM_PART={part}",))
    for part in range(SOURCE_PARTS)
)


#: Those of fp32 alone, the copies, and the list.
F32_KERNELS = SOURCE_KERNELS[:2]


def source_path(thread_sanitizer: bool = False) -> Path:
    """The kernels as g++ compiles them from csrc/cuda."""
    return build(Variant(SOURCE_KERNELS, thread_sanitizer))
