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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptx.emitter import symbol_of
from ptx.syntax import Entry, parse
from ptx.translate import FLAGS as PTX_FLAGS
from ptx.translate import FOLDER as PTX
from ptx.translate import translate, write_if_new
from variants import (
    FLAGS,
    HERE,
    JOBS,
    OUTPUT,
    PLAN,
    ROOT,
    RUNTIME,
    SAMPLE,
    SOURCE_KERNELS,
    Unit,
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
NVCC_FLAGS = (
    "-std=c++20",
    "-O1",
    "-cudart=none",
    "--fmad=false",
    "-gencode=arch=compute_90,code=compute_90",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)
# Of the core, what is in the plugin: not the transports, executors and communicators.
PLUGIN_FOLDERS = ("base", "schedule")


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


def fake_cudart(thread_sanitizer: bool = False) -> Path:
    """libcudart_emulated.so: the fake runtime with the scheduler of emulated kernels."""
    plain = [*FLAGS, "-O2", "-fPIC", *include(FAKE, SCHEDULER)]
    api = [*plain, *sanitized(thread_sanitizer), "-fvisibility=hidden"]
    api += ["-isystem", str(home() / "include")]
    # The scheduler itself is not instrumented: it switches stacks.
    scheduler = [*plain, "-DDPCOMM_EMULATED_TSAN"] if thread_sanitizer else plain
    with locked("cuda"):
        objects = [compiled(path, api) for path in sorted(FAKE.glob("*.cc"))]
        objects += [compiled(path, scheduler) for path in RUNTIME]
        flags = ["-shared", "-Wl,-soname,libcudart_emulated.so", "-ldl", "-lpthread"]
        flags += sanitized(thread_sanitizer) or ["-Wl,-z,defs"]
        folder = "runtime-thread" if thread_sanitizer else "runtime"
        return link("libcudart_emulated.so", objects, flags, folder=folder)


def sanitized(thread_sanitizer: bool) -> list[str]:
    return ["-fsanitize=thread"] if thread_sanitizer else []


def on_runtime(runtime: Path) -> list[str]:
    return [str(runtime), f"-Wl,-rpath,{runtime.parent}"]


def kernel_library(
    name: str,
    sources: Sequence[Path | Unit],
    folders: Sequence[Path] = (),
    thread_sanitizer: bool = False,
) -> Path:
    """A library of kernels as g++ compiles them, to be named by FAKE_CUDA_KERNELS."""
    runtime = fake_cudart(thread_sanitizer)
    flags = [*FLAGS, "-fPIC", *sanitized(thread_sanitizer)]
    flags += include(*folders, FAKE, SCHEDULER, HERE, HERE / "driver", CSRC)
    units = [item if isinstance(item, Unit) else Unit(item) for item in sources]
    with locked("cuda"), ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda unit: compiled(unit.source, [*flags, *unit.flags]), units))
        # Bound to itself: nvcc's host stubs have the same symbols as the kernels.
        finish = ["-shared", "-Wl,-Bsymbolic", *sanitized(thread_sanitizer)]
        return link(name, objects, [*finish, *on_runtime(runtime)])


def cuda_object(source: Path, folders: Sequence[Path] = ()) -> Path:
    """An object file of nvcc's, as it would be made for a device; what is in it for the device is
    not run, therefore it is PTX alone, and nvcc takes no trouble over it."""
    flags = [*NVCC_FLAGS, "-Xcicc=-O0", "-ccbin", compiler(), *include(*folders, CSRC)]
    with locked("cuda"):
        return compiled(source, flags, str(home() / "bin" / "nvcc"))


def cuda_program(name: str, source: Path, folders: Sequence[Path] = ()) -> Path:
    """A program that nvcc compiled, on the fake runtime."""
    runtime = fake_cudart()
    made = cuda_object(source, folders)
    with locked("cuda"):
        return link(name, [made], on_runtime(runtime))


def translated_kernels(name: str, source: Path, folders: Sequence[Path] = ()) -> Path:
    """A library of the kernels of a .cu file by way of nvcc's PTX, for FAKE_CUDA_KERNELS."""
    flags = [*NVCC_FLAGS, "-ccbin", compiler(), *include(*folders, CSRC)]
    with locked("cuda"):
        state = compiled(source, flags, str(home() / "bin" / "nvcc")).stem
        folder = OUTPUT / "ptx" / state
        folder.mkdir(parents=True, exist_ok=True)
        text = folder / f"{source.stem}.ptx"
        if not text.exists():
            partial = text.with_suffix(f".{os.getpid()}.tmp")
            run_compiler(
                [str(home() / "bin" / "nvcc"), *flags, "-ptx", str(source), "-o", str(partial)]
            )
            partial.rename(text)
        module = parse(text.read_text(), text)
        units = []
        for entry in module.entries:
            path = folder / f"{symbol_of(entry)}.cc"
            write_if_new(path, translate(module, entry))
            units.append(Unit(path, (*PTX_FLAGS, "-w")))
        write_if_new(folder / "registration.cc", registration(module.entries))
    units.append(Unit(folder / "registration.cc", (*PTX_FLAGS, *include(PTX))))
    return kernel_library(name, units)


def registration(entries: Sequence[Entry]) -> str:
    """C++ that gives translated kernels to the fake runtime."""
    lines = ['#include "kernel_registry.h"', '#include "machine.h"']
    for entry in entries:
        symbol, end = symbol_of(entry), 0
        offsets = []
        for parameter in entry.parameters:
            offsets.append(-(-end // parameter.align) * parameter.align)
            end = offsets[-1] + parameter.size
        sizes = [parameter.size for parameter in entry.parameters]
        lines += [
            f"namespace ptx {{ extern const Kernel {symbol}; }}",
            "namespace {",
            f"const uint32_t offsets_{symbol}[] = {{{', '.join(map(str, offsets))}}};",
            f"const uint32_t sizes_{symbol}[] = {{{', '.join(map(str, sizes))}}};",
            f"void thread_{symbol}(const void*, const void* arguments) "
            f"{{ ptx::{symbol}.run(arguments); }}",
            f"const fake_cuda::EmulatedKernel kernel_{symbol} = {{",
            f'    "{entry.name}", thread_{symbol}, nullptr, {len(sizes)}, offsets_{symbol},',
            f"    sizes_{symbol}, {end}, 0, 0, 0}};",
            f"const bool registered_{symbol} = "
            f"(fake_cuda_register_kernel(&kernel_{symbol}), true);",
            "}  // namespace",
        ]
    return "\n".join([*lines, ""])


def plugin_objects(thread_sanitizer: bool = False) -> list[Path]:
    """What libdpcomm_cuda.so is linked from."""
    kernels = [cuda_object(path) for path in sorted((CSRC / "cuda").glob("*.cu"))]
    sources = [path for path in sorted((CSRC / "cuda").glob("*.cc")) if path.name != "loader.cc"]
    sources += [path for name in PLUGIN_FOLDERS for path in sorted((CSRC / name).glob("*.cc"))]
    flags = [*FLAGS, "-fPIC", "-fvisibility=hidden", *sanitized(thread_sanitizer)]
    flags += ["-isystem", str(home() / "include"), *include(CSRC)]
    with locked("cuda"), ThreadPoolExecutor(JOBS) as pool:
        return [*pool.map(lambda path: compiled(path, flags), sources), *kernels]


def plugin() -> Path:
    """libdpcomm_cuda.so as it is made for a device, but on the fake runtime."""
    runtime = fake_cudart()
    objects = plugin_objects()
    with locked("cuda"):
        exports = ROOT / "cmake" / "exports_cuda.map"
        finish = ["-shared", f"-Wl,--version-script={exports}", "-Wl,--gc-sections", "-Wl,-z,defs"]
        finish += [*on_runtime(runtime), "-ldl", "-lpthread", "-lrt"]
        return link("libdpcomm_cuda.so", objects, finish)


def engine_program(thread_sanitizer: bool = False) -> Path:
    """The plugin's object files with a main() that calls the engine (programs/engine_test.cc)."""
    runtime = fake_cudart(thread_sanitizer)
    objects = plugin_objects(thread_sanitizer)
    flags = [*FLAGS, "-fPIC", *sanitized(thread_sanitizer), *include(CSRC)]
    flags += ["-isystem", str(home() / "include")]
    with locked("cuda"):
        main = compiled(FAKE / "programs" / "engine_test.cc", flags)
        finish = [*sanitized(thread_sanitizer), *on_runtime(runtime), "-ldl", "-lpthread", "-lrt"]
        return link("engine_test", [main, *objects], finish)


def source_kernels() -> Path:
    """The kernels of csrc/cuda as g++ compiles them, for FAKE_CUDA_KERNELS."""
    return collective_kernels("libsource_kernels.so", SOURCE_KERNELS)


def sample_kernels(thread_sanitizer: bool = False) -> Path:
    """The emulator's own small kernel, which is compiled in a moment: for tests of the host."""
    return collective_kernels("libsample_kernels.so", [SAMPLE], thread_sanitizer)


def collective_kernels(name: str, units: Sequence[Unit], thread_sanitizer: bool = False) -> Path:
    """What defines find_kernel() of driver/kernels.h, as a library for FAKE_CUDA_KERNELS."""
    bridge = Unit(FAKE / "bridge" / "collective_kernels.cc")
    # The bridge last: it asks, when the library is loaded, for what the others have put on a list.
    return kernel_library(name, [*units, Unit(PLAN[1]), bridge], thread_sanitizer=thread_sanitizer)


def variables(kernels: Path | None = None) -> dict[str, str]:
    """What tells a process of the plugin on emulated devices."""
    return {
        "DPCOMM_CUDA_LIBRARY": str(plugin()),
        "FAKE_CUDA_LIBRARY": str(fake_cudart()),
        "FAKE_CUDA_KERNELS": str(kernels or source_kernels()),
        "FAKE_CUDA_DEADLINE": "60",
        # Blocks of full size take long, and are tested without a host (test_source.py).
        "FAKE_CUDA_BLOCK_THREADS": "64",
    }


def environment(kernels: Path | None = None) -> dict[str, str]:
    """A whole environment: what there is, without what others have set for dpcomm and devices."""
    prefixes = ("DPCOMM_", "FAKE_CUDA_", "CUDA_VISIBLE")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(prefixes)}
    return kept | variables(kernels)
