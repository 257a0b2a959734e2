"""The library's kernels by way of nvcc's PTX: made for an architecture, translated, and built into
the driver, in place of the kernels that g++ compiles."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import fake_runtime
import variants
from emulate import REDUCING, Case, Operation
from variants import OUTPUT, ROOT, Unit, Variant, digest, locked, run_compiler

from ptx.emitter import symbol_of
from ptx.syntax import Entry, Module, parse
from ptx.translate import FLAGS, translate, write_if_new

CSRC = ROOT / "csrc"
SOURCE = CSRC / "cuda" / "kernels.cu"
LIST = CSRC / "cuda" / "kernels.def"
#: The architectures whose PTX is translated.
ARCHS = ("80", "90", "100", "120")
#: As cmake/cuda.cmake has them.
NVCC_FLAGS = ("-std=c++20", "-O3", "--fmad=false")
LINE = re.compile(r"DPCOMM_KERNEL\(\w+, (\w+), \w+, (\w+)\)")
COPIES = "collective_bytes_native"
#: Those that differ most, for what is done for many architectures.
FEW = (
    *("collective_f32_native", "collective_f32_fp16"),
    *("packets_f32_native", "packets_f32_fp16"),
    COPIES,
)
ELEMENTS = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
    "float64": "f64",
}


def missing() -> str:
    """Why there is no PTX path here; empty if there is."""
    why = fake_runtime.missing()
    return f"PTX cannot be made: {why}" if why else ""


# --- which kernels -------------------------------------------------------------------------------
def all_kernels() -> tuple[str, ...]:
    """The names of all kernels, as cuda/launch_plan.h makes them."""
    pairs = [
        match.groups() for line in LIST.read_text().splitlines() if (match := LINE.match(line))
    ]
    assert pairs
    reducing = (f"{kind}_{e}_{w}" for e, w in pairs for kind in ("collective", "packets"))
    return (*reducing, COPIES)


def kernels_of(operation: Operation, packets: int) -> set[str]:
    """The kernels that an operation may take where a source has room for so many packets."""
    if operation.collective not in REDUCING:
        return {COPIES}
    pair = f"{ELEMENTS[operation.dtype]}_{operation.wire}"
    if (operation.collective, operation.algorithm) != ("all_reduce", "one_shot") or not packets:
        return {f"collective_{pair}"}
    # At most a packet for each element, and 88 for the tile that a CTA does not fill.
    if packets >= operation.count + 88 * operation.ctas:
        return {f"packets_{pair}"}
    return {f"collective_{pair}", f"packets_{pair}"}


def served(case: Case, kernels: Iterable[str]) -> bool:
    """Whether a program with these kernels can run the case."""
    needed = {name for operation in case.operations for name in kernels_of(operation, case.packets)}
    return needed <= set(kernels)


def list_of(kernels: Sequence[str]) -> Path:
    """A folder with a cuda/kernels.def of fewer kernels, to come before csrc."""
    pairs = {name.split("_", 1)[1] for name in kernels}
    lines = [
        line
        for line in LIST.read_text().splitlines()
        if (match := LINE.match(line)) and f"{match[1]}_{match[2]}" in pairs
    ]
    text = "\n".join([*lines, ""])
    folder = OUTPUT / "ptx" / f"list-{digest(text)}"
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    write_if_new(folder / "cuda" / "kernels.def", text)
    return folder


# --- building ------------------------------------------------------------------------------------
def ptx_of(arch: str, kernels: Sequence[str], includes: Sequence[Path] = ()) -> Path:
    """nvcc's PTX with at least these kernels; arch as "90"; includes come before csrc (plants)."""
    nvcc = str(fake_runtime.home() / "bin" / "nvcc")
    folders = [list_of(kernels), *includes, CSRC]
    flags = [*NVCC_FLAGS, f"-arch=compute_{arch}", "-ccbin", variants.compiler()]
    flags += [f"-I{folder}" for folder in folders]
    with locked(f"nvcc-{arch}"):
        rule = run_compiler([nvcc, *flags, "-MM", str(SOURCE)])
        names = re.sub(r"\\\n", " ", rule).split(":", 1)[1].split()
        contents = [Path(name).read_bytes() for name in names]
        target = OUTPUT / "ptx" / f"sm_{arch}-{digest(nvcc, *NVCC_FLAGS, *contents)}.ptx"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.tmp")
            run_compiler([nvcc, *flags, "-ptx", str(SOURCE), "-o", str(partial)])
            partial.rename(target)
    return target


def module_of(arch: str, kernels: Sequence[str], includes: Sequence[Path] = ()) -> Module:
    path = ptx_of(arch, kernels, includes)
    return parse(path.read_text(), path)


def table_for_driver(entries: Sequence[Entry]) -> str:
    """find_kernel() of driver/kernels.h."""
    lines = ['#include "kernels.h"', '#include "machine.h"']
    lines += [f"namespace ptx {{ extern const Kernel {symbol_of(e)}; }}" for e in entries]
    lines += [
        "namespace dpcomm::emulated {",
        "KernelBody find_kernel(const std::string& name) {",
        *(
            f'  if (name == "{e.name}") {{ return [](const KernelArgs& args) '
            f"{{ ptx::{symbol_of(e)}.run(&args); }}; }}"
            for e in entries
        ),
        "  return nullptr;",
        "}",
        "}  // namespace dpcomm::emulated",
    ]
    sizes = {parameter.size for entry in entries for parameter in entry.parameters}
    lines += [f"static_assert(sizeof(dpcomm::KernelArgs) == {size});" for size in sizes]
    return "\n".join([*lines, ""])


def ptx_path(
    arch: str,
    kernels: Sequence[str],
    thread_sanitizer: bool = False,
    includes: Sequence[Path] = (),
) -> Path:
    """The driver with these kernels, made from PTX for an architecture."""
    module = module_of(arch, kernels, includes)
    entries = [entry for entry in module.entries if entry.name in kernels]
    assert {entry.name for entry in entries} == set(kernels), kernels
    units = []
    for entry in entries:
        text = translate(module, entry)
        folder = OUTPUT / "ptx" / digest(text)
        folder.mkdir(parents=True, exist_ok=True)
        write_if_new(folder / f"{entry.name}.cc", text)
        # Without most of the optimisation it is compiled in two thirds of the time.
        units.append(Unit(folder / f"{entry.name}.cc", (*FLAGS, "-Og", "-w")))
    text = table_for_driver(entries)
    table = OUTPUT / "ptx" / f"table-{digest(text)}.cc"
    write_if_new(table, text)
    units.append(Unit(table, FLAGS))
    return variants.build(Variant(tuple(units), thread_sanitizer, tuple(includes)))
