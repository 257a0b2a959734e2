"""Turns the kernels of a PTX file into C++: one function, and one file, for each kernel.

`python -m ptx.translate kernels.ptx --to FOLDER [--kernel PART_OF_NAME ...]` writes the files. They
are compiled with FLAGS and machine.h, and run on the emulator.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from ptx import effects, values
from ptx.emitter import Emitter, Qualifiers, plain, symbol_of, variables_of
from ptx.syntax import (
    BranchTargets,
    Entry,
    Instruction,
    Label,
    Module,
    PtxError,
    Registers,
    ScopeBegin,
    ScopeEnd,
    Statement,
    Variable,
    parse,
)

FOLDER = Path(__file__).resolve().parent
# What the translated code needs beside the flags of the rest of the emulation (variants.FLAGS).
FLAGS = (
    "-Wno-unused-label",
    "-Wno-unused-but-set-variable",
    "-Wno-maybe-uninitialized",
    f"-I{FOLDER}",
    f"-I{FOLDER.parent / 'runtime'}",
)

HANDLERS = {**values.handles.by_opcode, **effects.handles.by_opcode}


def emit(e: Emitter, instruction: Instruction) -> str:
    """The C++ of one instruction. Raises PtxError for what is not known, qualifiers included."""
    e.instruction = instruction
    handler = HANDLERS.get(instruction.opcode)
    if not handler:
        e.fail(f"unknown instruction {instruction.opcode!r}")
    qualifiers = Qualifiers(instruction)
    text = handler(e, qualifiers)
    if qualifiers.left:
        e.fail(f"unknown qualifier {qualifiers.left[0]!r}")
    guard = f"if ({e.predicate(instruction.guard)}) " if instruction.guard else ""
    simple = guard == "" and text.count(";") == 1 and not text.startswith("const")
    return f"{guard}{text}" if simple else f"{guard}{{ {text} }}"


def lines_of(e: Emitter, statement: Statement) -> list[str]:
    """`@scope N` stands where the registers of scope N have to be declared."""
    match statement:
        case Instruction():
            return [f"{emit(e, statement)}  // {statement.line}: {statement.text}"]
        case Label():
            return [f"{e.label(statement.name)}:;"]
        case ScopeBegin():
            e.enter()
            return ["{", f"@scope {e.scope.number}"]
        case ScopeEnd():
            e.leave()
            return ["}"]
        case Registers() | Variable() | BranchTargets():
            return []
    raise AssertionError(statement)


def variable_lines(module: Module, entry: Entry) -> list[str]:
    """One struct with the module's variables; empty where it has none.

    Each kernel has its own, since its file has to stand alone: nothing is passed through them.
    """
    lines = []
    for variable in module.variables:
        content = ", ".join(str(byte) for byte in variable.values or b"\0")
        lines.append(
            f"  alignas({variable.align}) unsigned char variable_{plain(variable.name)}"
            f"[{variable.size}] = {{{content}}};"
        )
    return ["static struct {", *lines, f"}} {variables_of(entry)};"] if lines else []


def translate(module: Module, entry: Entry) -> str:
    """The C++ file of one kernel; it defines the Kernel `symbol(entry)`.

    Raises: PtxError for an instruction or qualifier that is not known.
    """
    e = Emitter(module, entry)
    body: list[str] = []
    for statement in entry.body:
        body += lines_of(e, statement)
    by_scope = {f"@scope {scope.number}": e.declarations(scope) for scope in e.scopes}
    lines = list(by_scope["@scope 0"])
    for line in body:
        lines += by_scope.get(line, [line])
    symbol = symbol_of(entry)
    variables = variable_lines(module, entry)
    span = f"span_of({variables_of(entry)})" if variables else "{}"
    return "\n".join(
        [
            f"// {entry.name} of {Path(module.path).name}, PTX {module.version} for "
            f"{module.target}.",
            '#include "machine.h"',
            "namespace ptx {",
            *variables,
            f"extern const Kernel {symbol};",
            f"static void run_{symbol}(const void* parameters) {{",
            f"  alignas(16) char local[{max(e.local_bytes, 1)}];",
            f"  Machine m(parameters, {e.parameter_bytes}, &{symbol}, {e.shared_bytes}, {span}, "
            f"span_of(local));",
            *(f"  {line}" for line in lines),
            "}",
            f'const Kernel {symbol} = {{"{entry.name}", run_{symbol}, {e.parameter_bytes}}};',
            "}  // namespace ptx",
            "",
        ]
    )


def table(entries: list[Entry]) -> str:
    """A C++ file with the array `kernels` and its length `kernel_count`."""
    symbols = [symbol_of(entry) for entry in entries]
    return "\n".join(
        [
            '#include "machine.h"',
            "namespace ptx {",
            *(f"extern const Kernel {symbol};" for symbol in symbols),
            "extern const Kernel* const kernels[];",
            "extern const int kernel_count;",
            f"const Kernel* const kernels[] = {{{', '.join('&' + s for s in symbols)}}};",
            f"const int kernel_count = {len(symbols)};",
            "}  // namespace ptx",
            "",
        ]
    )


def write_if_new(path: Path, text: str) -> None:
    """So that what did not change is not compiled again. Others may read and write it meanwhile."""
    if not path.exists() or path.read_text() != text:
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        partial.write_text(text)
        partial.rename(path)


def translate_file(source: Path, folder: Path, parts: list[str] | None = None) -> list[Path]:
    """Writes a file for each kernel whose name has one of `parts` (default: all), and a table.

    Returns: their paths. Raises PtxError.
    """
    module = parse(source.read_text(), source)
    chosen = [e for e in module.entries if not parts or any(part in e.name for part in parts)]
    if not chosen:
        raise PtxError(f"{source}: no kernel of that name")
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{symbol_of(entry)}.cc" for entry in chosen]
    for path, entry in zip(paths, chosen, strict=True):
        write_if_new(path, translate(module, entry))
    write_if_new(folder / "kernels.cc", table(chosen))
    return [*paths, folder / "kernels.cc"]


def main() -> int:
    parser = argparse.ArgumentParser(description="PTX to C++")
    parser.add_argument("source", type=Path)
    parser.add_argument("--to", type=Path, required=True, help="folder for the C++ files")
    parser.add_argument("--kernel", action="append", help="part of a kernel's name")
    arguments = parser.parse_args()
    try:
        for path in translate_file(arguments.source, arguments.to, arguments.kernel):
            print(path)
    except PtxError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
