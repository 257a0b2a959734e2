"""Builds the fake CUDA runtime and what runs on it, into build/emulated/cuda, once per change.

The runtime (fake_cudart/) is compiled against the headers of CUDA itself, so that the compiler
checks every signature. Programs and the plugin are compiled as they are for a device, but linked
against libcudart_emulated.so; what their kernels do is a library of its own (Kernels).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "emulated" / "cuda"
FAKE = HERE / "fake_cudart"
RUNTIME = HERE / "runtime"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-ffp-contract=off"]
COMPILE_LIMIT_S = 600


def cuda_home() -> Path | None:
    """The folder of CUDA: CUDA_HOME, that of nvcc on PATH, or the usual place."""
    named = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc")
    for home in [
        *([Path(named)] if named else []),
        *([Path(found).resolve().parents[1]] if found else []),
        Path("/usr/local/cuda"),
    ]:
        if (home / "include" / "cuda_runtime_api.h").is_file():
            return home
    return None


def missing(*, nvcc: bool = True) -> str:
    """Why nothing of this can be built here; empty if it can."""
    home = cuda_home()
    if home is None:
        return "no CUDA headers here (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    text = (home / "include" / "cuda_runtime_api.h").read_text(errors="replace")
    version = next(
        (int(line.split()[2]) for line in text.splitlines() if "define CUDART_VERSION" in line), 0
    )
    if version < 13000:
        return f"the fake runtime has the interface of CUDA 13; {home} has {version}"
    if nvcc and not (home / "bin" / "nvcc").is_file():
        return f"no nvcc in {home}/bin"
    return ""


def home() -> Path:
    found = cuda_home()
    assert found is not None, missing()
    return found


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One build at a time."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up_to_date(target: Path, command: Sequence[str]) -> bool:
    """True if this command made the target after the last change of what it is made from."""
    record, dependencies = target.with_suffix(".command"), target.with_suffix(".d")
    if not (target.is_file() and record.is_file() and dependencies.is_file()):
        return False
    if record.read_text() != "\n".join(command):
        return False
    sources = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split()
    made = target.stat().st_mtime_ns
    return all(Path(path).is_file() and Path(path).stat().st_mtime_ns <= made for path in sources)


def run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False
    )
    assert done.returncode == 0, " ".join(command) + "\n" + done.stdout + done.stderr


def compile_object(source: Path, command: Sequence[str]) -> Path:
    """Compiles one file, with what it needs before `-c`, unless that was done before."""
    key = hashlib.sha1("\n".join([*command, str(source)]).encode()).hexdigest()[:10]
    target = BUILD / "objects" / f"{source.stem}-{key}.o"
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = [*command, "-MD", "-MF", str(target.with_suffix(".d")), "-c", str(source)]
    if not up_to_date(target, whole):
        target.unlink(missing_ok=True)
        run([*whole, "-o", str(target)])
        target.with_suffix(".command").write_text("\n".join(whole))
    return target


def link(name: str, inputs: Iterable[Path], flags: Sequence[str]) -> Path:
    """Links a library or program, unless that was done before."""
    target = BUILD / name
    paths = [str(path) for path in inputs]
    command = [CXX, *paths, *flags]
    target.with_suffix(".d").write_text(f"{target.name}: " + " ".join(paths) + "\n")
    if not up_to_date(target, command):
        fresh = target.with_suffix(".new")  # a process may still run the old one
        run([*command, "-o", str(fresh)])
        fresh.replace(target)
        target.with_suffix(".command").write_text("\n".join(command))
    return target


def include(*folders: Path) -> list[str]:
    return [f"-I{folder}" for folder in folders]


def fake_cudart() -> Path:
    """libcudart_emulated.so: the fake runtime with the scheduler of emulated kernels."""
    common = [CXX, *FLAGS]
    api = ["-fvisibility=hidden", "-isystem", str(home() / "include"), *include(FAKE, RUNTIME)]
    with locked():
        objects = [compile_object(path, [*common, *api]) for path in sorted(FAKE.glob("*.cc"))]
        objects += [
            compile_object(path, [*common, *include(RUNTIME)])
            for path in sorted(RUNTIME.glob("*.cc"))
        ]
        flags = ["-shared", "-Wl,-soname,libcudart_emulated.so", "-Wl,-z,defs", "-ldl", "-lpthread"]
        return link("libcudart_emulated.so", objects, flags)


def kernel_library(name: str, sources: Sequence[Path], folders: Sequence[Path] = ()) -> Path:
    """A library of kernels as g++ compiles them, to be named by FAKE_CUDA_KERNELS."""
    runtime = fake_cudart()
    command = [CXX, *FLAGS, *include(FAKE, RUNTIME, ROOT / "csrc", *folders)]
    with locked():
        objects = [compile_object(path, command) for path in sources]
        # Bound to itself: nvcc's host stubs have the same symbols as the kernels.
        flags = ["-shared", "-Wl,-Bsymbolic", str(runtime), f"-Wl,-rpath,{BUILD}"]
        return link(name, objects, flags)


def cuda_object(source: Path, folders: Sequence[Path] = (), arch: str = "sm_90") -> Path:
    """An object file of nvcc's, as it would be made for a device."""
    command = [str(home() / "bin" / "nvcc"), "-std=c++20", "-O2", f"-arch={arch}"]
    command += ["-cudart", "none", "--fmad=false", "-Xcompiler", "-fPIC"]
    command += ["-ccbin", CXX, *include(ROOT / "csrc", *folders)]
    with locked():
        return compile_object(source, command)


def cuda_program(name: str, source: Path, folders: Sequence[Path] = ()) -> Path:
    """A program that nvcc compiled, on the fake runtime."""
    runtime = fake_cudart()
    compiled = cuda_object(source, folders)
    with locked():
        return link(name, [compiled], [str(runtime), f"-Wl,-rpath,{BUILD}"])
