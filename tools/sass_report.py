"""What nvcc made of the kernels: registers, spills, memory accesses of the main loops, fences.

    python tools/sass_report.py                          # of the built dpcomm/libdpcomm_cuda.so
    python tools/sass_report.py FILE ...                 # of cubins, or libraries with device code
    python tools/sass_report.py --compile 80 90          # compiles csrc/cuda/kernels.cu first
    python tools/sass_report.py --kernels 'f32_fp16$'    # only names that match

Prints a table, kernel by architecture, and what breaks the limits; exits with 1 if anything does.

cuobjdump and nvdisasm come from the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm of this
Python, from CUDA_HOME, or from PATH.

A main loop is a loop that, besides the loops within it, moves data with 16-byte accesses to global
memory, or with several smaller ones; loops over the elements at an edge have one. All data accesses
of a main loop have to be of 16 bytes, but for single bytes, which are the scales of a block-scaled
wire. Flags and packets are strong accesses and no data.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cuda" / "kernels.cu"
LIBRARY = ROOT / "dpcomm" / "libdpcomm_cuda.so"
TIMEOUT_S = 900

MAX_REGISTERS = 64  # two blocks of 512 threads have 65536 registers
COLLECTIVE_THREADS = 512
PACKET_THREADS = 256


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of an SM (CUDA C++ Programming Guide, technical specifications)."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int
    """Of shared memory, for each block."""
    registers: int = 65536


MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 << 10, 0),
    80: Multiprocessor(2048, 32, 164 << 10, 1 << 10),
    86: Multiprocessor(1536, 16, 100 << 10, 1 << 10),
    89: Multiprocessor(1536, 24, 100 << 10, 1 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 1 << 10),
    100: Multiprocessor(2048, 32, 228 << 10, 1 << 10),
    120: Multiprocessor(1536, 24, 100 << 10, 1 << 10),
}


@dataclass
class Instruction:
    address: int
    guarded: bool
    opcode: str
    operands: str


@dataclass
class Function:
    """The instructions of a kernel, in order, and what its labels stand for."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Label -> index of the instruction behind it."""


@dataclass
class Row:
    """One kernel on one architecture."""

    kernel: str
    architecture: int
    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    """Accesses to local memory."""
    main_loops: int
    loads: int
    """Of 16 bytes, in main loops."""
    stores: int
    scale_bytes: int
    """1-byte accesses in main loops."""
    narrow: list[str]
    """All other data accesses in main loops, and those to memory that the compiler does not know to
    be global: there may be none."""
    fences: int
    """Of system scope."""
    strong: int
    """Accesses of system scope: flags, words, packets."""
    weak_scope: int
    """Strong accesses and fences of a smaller scope."""
    code_bytes: int
    blocks: int
    """Resident blocks of an SM."""

    @property
    def is_packets(self) -> bool:
        return self.kernel.startswith("packets")


# --- reading SASS ---------------------------------------------------------------------------------
LINE = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:\{\s*)?(?P<guard>@!?U?P\w+\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
LABEL = re.compile(r"(\.L_x?_?\w+):$")
TARGET = re.compile(r"`\((\.L\w+)\)")


def parse(text: str) -> list[Function]:
    """The functions of `nvdisasm -c`."""
    functions: list[Function] = []
    current: Function | None = None
    for line in text.splitlines():
        if line.startswith(".text."):
            current = Function(line[len(".text.") :].rstrip(":"))
            functions.append(current)
        elif line.startswith("//---------------------") and ".text." not in line:
            current = None
        elif current is not None:
            label = LABEL.match(line)
            match = LINE.match(line)
            if label:
                current.labels[label.group(1)] = len(current.instructions)
            elif match:
                current.instructions.append(
                    Instruction(
                        int(match["address"], 16),
                        bool(match["guard"]),
                        match["opcode"],
                        match["operands"].strip(),
                    )
                )
    return functions


def successors(function: Function) -> list[list[int]]:
    """By instruction, the indexes of those that may come next. Calls are taken to return."""
    end = len(function.instructions)
    meeting: dict[str, int] = {}  # barrier register -> where the threads meet
    result = []
    for index, instruction in enumerate(function.instructions):
        kind = instruction.opcode.split(".")[0]
        target = TARGET.search(instruction.operands)
        place = function.labels.get(target.group(1)) if target else None
        after = [index + 1] if index + 1 < end else []
        if kind == "BSSY" and place is not None:
            meeting[instruction.operands.split(",")[0].strip()] = place
        jump: list[int] = []
        if kind == "BSYNC":
            met = meeting.get(instruction.operands.split(",")[-1].strip())
            jump = after if met is None else [met]
        elif kind in ("BRA", "JMP", "CALL") and place is not None:
            jump = [place]
        conditional = instruction.guarded or ("," in instruction.operands and kind == "BRA")
        if kind in ("EXIT", "RET", "BRA", "JMP", "BSYNC", "KILL", "BRX", "JMX"):
            after = [*jump, *(after if conditional else [])]
        elif kind == "CALL":  # may be a jump, too
            after = [*jump, *after]
        result.append(sorted({place for place in after if place < end}))
    return result


def components(nodes: Iterable[int], edges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Strongly connected components that have an edge within (Tarjan, without recursion)."""
    inside = set(nodes)
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found = []
    for root in sorted(inside):
        if root in number:
            continue
        work = [(root, 0)]
        while work:
            node, position = work.pop()
            if position == 0:
                number[node] = low[node] = len(number)
                stack.append(node)
                on_stack.add(node)
            following = [n for n in edges[node] if n in inside]
            if position > 0:
                low[node] = min(low[node], low[following[position - 1]])
            for next_position in range(position, len(following)):
                other = following[next_position]
                if other not in number:
                    work.append((node, next_position + 1))
                    work.append((other, 0))
                    break
                if other in on_stack:
                    low[node] = min(low[node], number[other])
            else:
                if low[node] == number[node]:
                    component = []
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        component.append(member)
                        if member == node:
                            break
                    if len(component) > 1 or node in edges[node]:
                        found.append(component)
    return found


def unreached(function: Function) -> set[int]:
    """Indexes of instructions that no edge leads to: subroutines of the compiler's."""
    edges = successors(function)
    left, pending = set(range(len(edges))), [0]
    while pending:
        index = pending.pop()
        if index in left:
            left.discard(index)
            pending += edges[index]
    return left


def loops(function: Function) -> list[list[int]]:
    """For each loop, the indexes of its instructions that are not in a loop within it.

    A loop is a strongly connected component; the loops within are what remains of it without the
    edges into its first instruction.
    """
    edges = successors(function)
    result = []
    pending = components(range(len(function.instructions)), edges)
    while pending:
        loop = pending.pop()
        inside = set(loop)
        entered = {n for i in range(len(edges)) if i not in inside for n in edges[i] if n in inside}
        head = min(entered or inside)
        for node in loop:
            if head in edges[node]:
                edges[node] = [n for n in edges[node] if n != head]
        within = components(loop, edges)
        result.append(sorted(inside.difference(*within)))
        pending += within
    return result


# --- what counts ----------------------------------------------------------------------------------
def is_strong(opcode: str) -> bool:
    return ".STRONG" in opcode or ".MMIO" in opcode


def is_data(opcode: str) -> bool:
    """A plain access to global memory, or to memory that the compiler does not know."""
    return opcode.split(".")[0] in ("LDG", "STG", "LD", "ST") and not is_strong(opcode)


def is_global(opcode: str) -> bool:
    return opcode.split(".")[0] in ("LDG", "STG")


def resident_blocks(architecture: int, threads: int, registers: int, shared: int) -> int:
    sm = MULTIPROCESSORS[architecture]
    warps = threads // 32
    registers_of_warp = (registers * 32 + 255) // 256 * 256
    by_registers = sm.registers // registers_of_warp // warps
    shared_of_block = (shared + 127) // 128 * 128 + sm.reserved_bytes
    by_shared = sm.shared_bytes // shared_of_block if shared_of_block else sm.blocks
    return min(sm.blocks, sm.threads // threads, by_registers, by_shared)


def row(function: Function, architecture: int, usage: dict[str, int]) -> Row:
    all_opcodes = [i.opcode for i in function.instructions]
    main_loops, loads, stores, scale_bytes = 0, 0, 0, 0
    narrow: list[str] = []
    for loop in loops(function):
        data = [function.instructions[i].opcode for i in loop]
        data = [opcode for opcode in data if is_data(opcode)]
        wide = [opcode for opcode in data if is_global(opcode) and ".128" in opcode]
        scales = [opcode for opcode in data if is_global(opcode) and ".U8" in opcode]
        others = [opcode for opcode in data if opcode not in wide + scales]
        if not wide and len(others) < 2:
            continue
        main_loops += 1
        loads += sum(1 for opcode in wide if opcode.startswith("LD"))
        stores += sum(1 for opcode in wide if opcode.startswith("ST"))
        scale_bytes += len(scales)
        narrow += others
    lost = [function.instructions[i].opcode for i in unreached(function)]
    narrow += [f"{opcode} (where from?)" for opcode in lost if is_data(opcode)]
    threads = PACKET_THREADS if function.name.startswith("packets") else COLLECTIVE_THREADS
    strong = [opcode for opcode in all_opcodes if is_strong(opcode)]
    fences = [opcode for opcode in all_opcodes if opcode.startswith("MEMBAR")]
    system = [opcode for opcode in strong + fences if ".SYS" in opcode]
    return Row(
        kernel=function.name,
        architecture=architecture,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=usage["SHARED"],
        spills=sum(1 for opcode in all_opcodes if opcode.split(".")[0] in ("LDL", "STL")),
        main_loops=main_loops,
        loads=loads,
        stores=stores,
        scale_bytes=scale_bytes,
        narrow=narrow,
        fences=sum(1 for opcode in fences if ".SYS" in opcode),
        strong=sum(1 for opcode in strong if ".SYS" in opcode),
        weak_scope=len(strong) + len(fences) - len(system),
        code_bytes=function.instructions[-1].address + 16 if function.instructions else 0,
        blocks=resident_blocks(architecture, threads, usage["REG"], usage["SHARED"]),
    )


def problems(row: Row) -> list[str]:
    """What breaks the limits, as text."""
    found = []
    if row.registers > MAX_REGISTERS:
        found.append(f"{row.registers} registers, {MAX_REGISTERS} allowed")
    if row.stack or row.local or row.spills:
        found.append(f"local memory: stack {row.stack}, local {row.local}, {row.spills} accesses")
    if row.narrow:
        found.append(f"accesses of main loops that are not 16 bytes: {', '.join(row.narrow)}")
    if not (row.loads and row.stores):
        found.append(f"{row.loads} loads and {row.stores} stores of 16 bytes in main loops")
    if row.is_packets and row.fences:
        found.append(f"{row.fences} fences, and packets need none")
    if not row.is_packets and row.fences != 1:
        found.append(f"{row.fences} fences, and one place publishes")
    if row.weak_scope:
        found.append(f"{row.weak_scope} strong accesses or fences of less than system scope")
    if row.blocks < 2:
        found.append(f"{row.blocks} resident blocks on an SM, two wanted")
    return [f"{row.kernel} sm_{row.architecture}: {text}" for text in found]


# --- getting SASS ---------------------------------------------------------------------------------
def find_tool(name: str) -> Path | None:
    """cuobjdump or nvdisasm, from this Python's packages, CUDA_HOME or PATH."""
    packages = Path(sysconfig.get_paths()["purelib"])
    found = sorted(packages.glob(f"nvidia/*/bin/{name}"))
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found += [Path(home) / "bin" / name]
    on_path = shutil.which(name)
    found += [Path(on_path)] if on_path else []
    return next((path for path in found if path.is_file()), None)


def missing_tools() -> str:
    """What is not there, as text; "" if both are."""
    return ", ".join(n for n in ("cuobjdump", "nvdisasm") if find_tool(n) is None)


def run(command: Sequence[str | Path], folder: Path | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    on_path = shutil.which("nvcc")
    for path in (Path(home) / "bin" / "nvcc", Path(on_path or "")):
        if path.is_file():
            return path
    return None


def compile_cubin(
    architecture: int, folder: Path, source: Path = KERNELS, include: Sequence[Path] = ()
) -> Path:
    """A cubin of `source`, with the flags of the build. About 30 s for all kernels."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc in CUDA_HOME, /usr/local/cuda or PATH")
    cubin = folder / f"kernels.sm_{architecture}.cubin"
    folders = [f"-I{path}" for path in (*include, ROOT / "csrc")]
    run([nvcc, "-std=c++20", "-O3", "--fmad=false", f"-arch=sm_{architecture}", "-cubin",
         *folders, "-o", cubin, source])  # fmt: skip
    return cubin


def extract(file: Path, folder: Path) -> list[Path]:
    """The cubins in a library, or the cubin itself."""
    if file.suffix == ".cubin":
        return [file]
    tool = find_tool("cuobjdump")
    assert tool is not None
    run([tool, "-xelf", "all", file.resolve()], folder)
    return sorted(folder.glob("*.cubin"))


def read_cubin(cubin: Path, pattern: str = "") -> list[Row]:
    """A row for each kernel whose name matches."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    assert cuobjdump is not None
    assert nvdisasm is not None
    usage: dict[str, dict[str, int]] = {}
    name = ""
    for line in run([cuobjdump, "-res-usage", cubin]).splitlines():
        if line.strip().startswith("Function "):
            name = line.split()[1].rstrip(":")
        elif "REG:" in line:
            usage[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    text = run([nvdisasm, "-c", cubin])
    architecture = re.search(r"\.target\s+sm_(\d+)", text) or re.search(r"sm_(\d+)", cubin.name)
    if architecture is None:
        raise RuntimeError(f"{cubin}: of which architecture?")
    return [
        row(function, int(architecture.group(1)), usage[function.name])
        for function in parse(text)
        if function.name in usage and re.search(pattern, function.name)
    ]


def read_files(files: Sequence[Path], pattern: str = "") -> list[Row]:
    """Rows of all kernels in cubins and libraries. About 5 s for each architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = []
        for number, file in enumerate(files):
            place = Path(folder) / str(number)
            place.mkdir()
            cubins += extract(file, place)
        rows = [one for cubin in cubins for one in read_cubin(cubin, pattern)]
    return sorted(rows, key=lambda r: (r.kernel, r.architecture))


def table(rows: Sequence[Row]) -> str:
    columns = {
        "sm": lambda r: r.architecture,
        "regs": lambda r: r.registers,
        "local": lambda r: r.stack + r.local + r.spills,
        "shared": lambda r: r.shared,
        "loops": lambda r: r.main_loops,
        "LDG.128": lambda r: r.loads,
        "STG.128": lambda r: r.stores,
        "1 B": lambda r: r.scale_bytes,
        "other": lambda r: len(r.narrow),
        "fences": lambda r: r.fences,
        "strong": lambda r: r.strong,
        "blocks": lambda r: r.blocks,
        "code": lambda r: r.code_bytes,
    }
    lines = [["kernel", *columns]]
    lines += [[r.kernel, *(str(value(r)) for value in columns.values())] for r in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--compile", nargs="+", type=int, default=[], metavar="ARCHITECTURE")
    parser.add_argument("--kernels", default="", help="regular expression")
    arguments = parser.parse_args()
    if missing_tools():
        print(f"no {missing_tools()}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return 77
    with tempfile.TemporaryDirectory() as folder:
        files = list(arguments.files)
        files += [compile_cubin(a, Path(folder)) for a in arguments.compile]
        if not files and not LIBRARY.exists():
            print(f"no {LIBRARY.name} was built; name a file, or --compile 80")
            return 77
        rows = read_files(files or [LIBRARY], arguments.kernels)
    print(table(rows))
    found = [text for one in rows for text in problems(one)]
    print("\n".join(["", *found, f"{len(rows)} kernels, {len(found)} problems"]))
    return 1 if found or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
