"""Builds the fake CUDA runtime and what runs on it, into build/emulated.

The runtime (fake_cudart/) is compiled against the headers of CUDA itself, so that the compiler
checks every signature. Programs and the plugin are compiled as they are for a device, but linked
against libcudart_emulated.so; what their kernels do is a library of its own (kernel_library()).
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from variants import (
    FLAGS,
    HERE,
    OUTPUT,
    ROOT,
    RUNTIME,
    compiled,
    compiler,
    compiler_version,
    digest,
    locked,
    run_compiler,
)

FAKE = HERE / "fake_cudart"
SCHEDULER = HERE / "runtime"
CSRC = ROOT / "csrc"
LEAST_VERSION = 13000
NVCC_FLAGS = ("-std=c++20", "-O1", "-cudart", "none", "--fmad=false", "-Xcompiler", "-fPIC")


def cuda_home() -> Path | None:
    """The folder of CUDA: CUDA_HOME, that of nvcc on PATH, or the usual place."""
    named = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc")
    for folder in [
        *([Path(named)] if named else []),
        *([Path(found).resolve().parents[1]] if found else []),
        Path("/usr/local/cuda"),
    ]:
        if (folder / "include" / "cuda_runtime_api.h").is_file():
            return folder
    return None


@functools.cache
def missing(*, nvcc: bool = True) -> str:
    """Why nothing of this can be built here; empty if it can."""
    folder = cuda_home()
    if folder is None:
        return "no CUDA headers here (CUDA_HOME, nvcc on PATH, /usr/local/cuda)"
    text = (folder / "include" / "cuda_runtime_api.h").read_text(errors="replace")
    lines = [line.split() for line in text.splitlines() if "define CUDART_VERSION" in line]
    version = int(lines[0][-1]) if lines else 0
    if version < LEAST_VERSION:
        return f"the fake runtime has the interface of CUDA 13; {folder} has {version}"
    if nvcc and not (folder / "bin" / "nvcc").is_file():
        return f"no nvcc in {folder}/bin"
    return ""


def home() -> Path:
    found = cuda_home()
    assert found is not None, missing()
    return found


def include(*folders: Path) -> list[str]:
    return [f"-I{folder}" for folder in folders]


def link(name: str, objects: Sequence[Path], flags: Sequence[str], folder: str = "") -> Path:
    """A library or program; in a folder of its own where the name alone does not tell it apart."""
    key = digest(compiler_version(), *flags, *(path.name for path in objects))
    target = OUTPUT / "cuda" / (folder or key) / name
    record = target.with_name(f".{name}.{key}")
    if not (target.exists() and record.exists()):
        target.parent.mkdir(parents=True, exist_ok=True)
        for old in target.parent.glob(f".{name}.*"):
            old.unlink()
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        run_compiler([compiler(), *map(str, objects), *flags, "-o", str(partial)])
        partial.rename(target)  # a process may still run the old one
        record.touch()
    return target


def fake_cudart() -> Path:
    """libcudart_emulated.so: the fake runtime with the scheduler of emulated kernels."""
    plain = [*FLAGS, "-O2", "-fPIC", *include(FAKE, SCHEDULER)]
    api = [*plain, "-fvisibility=hidden", "-isystem", str(home() / "include")]
    with locked("cuda"):
        objects = [compiled(path, api) for path in sorted(FAKE.glob("*.cc"))]
        objects += [compiled(path, plain) for path in RUNTIME]
        flags = ["-shared", "-Wl,-soname,libcudart_emulated.so", "-Wl,-z,defs", "-ldl", "-lpthread"]
        return link("libcudart_emulated.so", objects, flags, folder="runtime")


def on_runtime(runtime: Path) -> list[str]:
    return [str(runtime), f"-Wl,-rpath,{runtime.parent}"]


def kernel_library(name: str, sources: Sequence[Path], folders: Sequence[Path] = ()) -> Path:
    """A library of kernels as g++ compiles them, to be named by FAKE_CUDA_KERNELS."""
    runtime = fake_cudart()
    flags = [*FLAGS, "-fPIC", *include(*folders, FAKE, SCHEDULER, HERE, HERE / "driver", CSRC)]
    with locked("cuda"):
        objects = [compiled(path, flags) for path in sources]
        # Bound to itself: nvcc's host stubs have the same symbols as the kernels.
        return link(name, objects, ["-shared", "-Wl,-Bsymbolic", *on_runtime(runtime)])


def cuda_object(source: Path, folders: Sequence[Path] = (), arch: str = "sm_90") -> Path:
    """An object file of nvcc's, as it would be made for a device."""
    flags = [*NVCC_FLAGS, f"-arch={arch}", "-ccbin", compiler(), *include(CSRC, *folders)]
    with locked("cuda"):
        return compiled(source, flags, str(home() / "bin" / "nvcc"))


def cuda_program(name: str, source: Path, folders: Sequence[Path] = ()) -> Path:
    """A program that nvcc compiled, on the fake runtime."""
    runtime = fake_cudart()
    made = cuda_object(source, folders)
    with locked("cuda"):
        return link(name, [made], on_runtime(runtime))
