"""Holds PTX against the rules of the memory model and of arithmetic that nobody sees by running it.

  order       what peers see (flags, words, packets) is accessed with scope .sys; every flag is
              stored behind a fence.acq_rel.sys, with no barrier and no store of data in between;
              no fence but these; what is polled is acquired by the same address, too. (Relaxed
              stores behind the last barrier, and relaxed loads that nobody waits for, are the
              rank's own counts.)
  access      no .volatile, no atomics, no loads by way of the read-only or constant cache; a packet
              is one access of 128 bits
  arithmetic  no fma (--fmad=false), no approximations, no flushing of subnormals, to nearest even
  meetings    barrier 0 of the whole block, warp functions of sync form

`python tests/emulated/ptx/lint.py [FILE ...]` prints what it finds; with no file it makes
the PTX of all kernels for all architectures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # the tests' helpers, and the package where it is not installed
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    sys.path.append(str(Path(__file__).resolve().parents[3]))

from ptx.syntax import (
    BranchTargets,
    Entry,
    Instruction,
    Label,
    Module,
    Name,
    PtxError,
    parse,
)

ARCHITECTURES = ("75", "80", "90", "100", "120")
ORDERS = ("relaxed", "acquire", "release")
FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")
ROUNDED = ("add", "sub", "mul", "div", "rcp", "sqrt")


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    kernel: str
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.kernel}: {self.rule}: {self.text}"


# --- what an instruction is ----------------------------------------------------------------------
def is_strong(i: Instruction) -> bool:
    return i.opcode in ("ld", "st") and any(i.has(order) for order in ORDERS)


def is_flag_store(i: Instruction) -> bool:
    return i.opcode == "st" and is_strong(i) and i.qualifiers[-1] in ("u64", "s64", "b64")


def is_flag_load(i: Instruction) -> bool:
    return i.opcode == "ld" and is_strong(i) and i.qualifiers[-1] in ("u64", "s64", "b64")


def is_fence(i: Instruction) -> bool:
    return i.opcode in ("fence", "membar")


def is_block_barrier(i: Instruction) -> bool:
    return i.opcode in ("bar", "barrier") and not i.has("warp")


def is_data_store(i: Instruction) -> bool:
    """To memory that others may see. Of a generic address nobody knows."""
    private = ("shared", "shared::cta", "local", "param")
    return i.opcode == "st" and not is_strong(i) and not any(i.has(space) for space in private)


# --- one instruction at a time -------------------------------------------------------------------
def scope_of_access(i: Instruction) -> str:
    if is_strong(i) and not i.has("sys"):
        return "what peers see needs scope .sys"
    return ""


def form_of_fence(i: Instruction) -> str:
    if is_fence(i) and (i.opcode, i.qualifiers) != ("fence", ("acq_rel", "sys")):
        return "the only fence is fence.acq_rel.sys"
    return ""


def kind_of_access(i: Instruction) -> str:
    if i.opcode in ("atom", "red", "multimem", "cp", "ldu"):
        return "flags have one writer, data are loaded and stored"
    if i.has("volatile"):
        return "volatile says nothing of order"
    if i.opcode == "ld" and (i.has("nc") or i.has("const")):
        return "what peers write is not read by way of the read-only caches"
    if is_strong(i) and any(i.has(vector) for vector in ("v2", "v4", "v8")):
        return "a vector is several accesses; a packet needs .b128"
    return ""


def arithmetic(i: Instruction) -> str:
    if any(i.has(q) for q in ("ftz", "approx", "full")):
        return "no approximation, no flushing of subnormals"
    typed = i.qualifiers[-1] if i.qualifiers else ""
    if i.opcode == "fma" or (i.opcode == "mad" and typed in FLOATS):
        return "no fused multiplication and addition"
    if i.opcode in ROUNDED and typed in FLOATS and any(i.has(q) for q in ("rz", "rm", "rp")):
        return "results are rounded to nearest even"
    if i.opcode == "cvt" and any(i.has(q) for q in ("rz", "rm", "rp", "rna", "rs")):
        return "conversions round to nearest even"
    return ""


def meeting(i: Instruction) -> str:
    if i.opcode in ("bar", "barrier") and not (i.has("sync") and len(i.operands) == 1):
        return "a barrier is of all threads"
    if i.opcode in ("shfl", "vote", "redux", "match") and not i.has("sync"):
        return "warp functions have their sync form"
    return ""


RULES: tuple[Callable[[Instruction], str], ...] = (
    scope_of_access,
    form_of_fence,
    kind_of_access,
    arithmetic,
    meeting,
)


# --- along the ways through a kernel -------------------------------------------------------------
class Flow:
    """The instructions of an entry, and which may follow which."""

    def __init__(self, entry: Entry) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, tuple[str, ...]] = {}
        for statement in entry.body:
            if isinstance(statement, Instruction):
                self.instructions.append(statement)
            elif isinstance(statement, Label):
                self.labels[statement.name] = len(self.instructions)
            elif isinstance(statement, BranchTargets):
                self.tables[statement.name] = statement.labels
        self.after = [self.successors(at) for at in range(len(self.instructions))]

    def successors(self, at: int) -> list[int]:
        i = self.instructions[at]
        following: list[int] = []
        if i.opcode in ("bra", "brx"):
            target = i.operands[-1]
            assert isinstance(target, Name)
            names = self.tables[target.name] if i.opcode == "brx" else (target.name,)
            following += [self.labels[name] for name in names]
        if i.opcode not in ("bra", "brx", "ret", "exit", "trap") or i.guard:
            following.append(at + 1)
        return [place for place in following if place < len(self.instructions)]

    def states(self, step: Callable[[Instruction, bool], bool], everywhere: bool) -> list[bool]:
        """A fact before each instruction, false at the start.

        `step` says what an instruction makes of it. Where ways meet it has to hold on all of them
        (`everywhere`) or on one.
        """
        facts: list[bool | None] = [None] * len(self.instructions)
        if facts:
            facts[0] = False
        pending = [0] if facts else []
        while pending:
            at = pending.pop()
            before = facts[at]
            assert before is not None
            out = step(self.instructions[at], before)
            for place in self.after[at]:
                old = facts[place]
                new = out if old is None else (old and out if everywhere else old or out)
                if new != old:
                    facts[place] = new
                    pending.append(place)
        return [bool(fact) for fact in facts]

    def backwards(self, step: Callable[[Instruction, bool], bool]) -> list[bool]:
        """A fact after each instruction that holds if it does on one way from there on."""
        before: list[list[int]] = [[] for _ in self.instructions]
        for at, places in enumerate(self.after):
            for place in places:
                before[place].append(at)
        facts = [False] * len(self.instructions)
        pending = list(range(len(self.instructions)))
        while pending:
            at = pending.pop()
            if step(self.instructions[at], facts[at]):
                for place in before[at]:
                    if not facts[place]:
                        facts[place] = True
                        pending.append(place)
        return facts


def fenced_after(i: Instruction, before: bool) -> bool:
    if is_fence(i) and not i.guard:
        return True
    return before and not is_block_barrier(i) and not is_data_store(i)


def wanted_after(i: Instruction, before: bool) -> bool:
    """Backwards: whether the block goes on to a barrier."""
    return before or is_block_barrier(i)


def waiting_after(i: Instruction, before: bool) -> bool:
    """Backwards: whether a pause comes before the next barrier."""
    return not is_block_barrier(i) and (before or i.opcode == "nanosleep")


def published(flow: Flow) -> list[Instruction]:
    """The stores of flags that peers wait for."""
    goes_on = flow.backwards(wanted_after)
    stores = [at for at, i in enumerate(flow.instructions) if is_flag_store(i)]
    return [flow.instructions[at] for at in stores if goes_on[at]]


def polled(flow: Flow) -> list[Instruction]:
    """The relaxed loads of flags that the kernel waits for."""
    pauses = flow.backwards(waiting_after)
    loads = [at for at, i in enumerate(flow.instructions) if is_flag_load(i) and i.has("relaxed")]
    return [flow.instructions[at] for at in loads if pauses[at]]


def order(flow: Flow) -> Iterator[tuple[Instruction, str]]:
    fenced = flow.states(fenced_after, everywhere=True)
    maybe_fenced = flow.states(fenced_after, everywhere=False)
    stores = published(flow)
    for at, i in enumerate(flow.instructions):
        if i in stores and not fenced[at]:
            yield i, "a flag is stored with no fence right before, at least on one way"
        if is_fence(i) and maybe_fenced[at]:
            yield i, "a second fence with nothing in between"
    fences = [i for i in flow.instructions if is_fence(i)]
    if fences and not stores:
        yield fences[0], "a fence, and no flag that it is for"
    acquired = {i.operands[1] for i in flow.instructions if is_flag_load(i) and i.has("acquire")}
    for i in polled(flow):
        if i.operands[1] not in acquired:
            yield i, "a flag that is polled, and never acquired by the same address"


def lint(module: Module) -> list[Finding]:
    """What is wrong with the kernels of a module."""
    found: list[Finding] = []
    for entry in module.entries:

        def report(i: Instruction, problem: str, kernel: str = entry.name) -> None:
            found.append(Finding(module.path, i.line, kernel, problem, i.text))

        for instruction in entry.instructions():
            for rule in RULES:
                if problem := rule(instruction):
                    report(instruction, problem)
        for instruction, problem in order(Flow(entry)):
            report(instruction, problem)
    return found


# --- command -------------------------------------------------------------------------------------
def summary(entry: Entry) -> dict[str, int]:
    """How many of what a kernel has."""
    instructions = entry.instructions()
    flow = Flow(entry)
    packets = [i for i in instructions if is_strong(i) and i.qualifiers[-1] == "b128"]
    words = [i for i in instructions if is_strong(i) and i.qualifiers[-1][1:] == "32"]
    return {
        "instructions": len(instructions),
        "fences": sum(map(is_fence, instructions)),
        "flag stores": len(published(flow)),
        "polls": len(polled(flow)),
        "acquires": sum(is_flag_load(i) and i.has("acquire") for i in instructions),
        "packets": len(packets),
        "words": len(words),
        "barriers": sum(map(is_block_barrier, instructions)),
    }


def modules(paths: list[str]) -> Iterator[Module]:
    if paths:
        for path in paths:
            yield parse(Path(path).read_text(), path)
        return
    from ptx import kernels

    if why := kernels.missing():
        raise PtxError(why)
    for arch in ARCHITECTURES:
        yield kernels.module_of(arch, kernels.all_kernels())


def main(paths: list[str]) -> int:
    findings: list[Finding] = []
    try:
        for module in modules(paths):
            print(f"{module.path} ({module.target})")
            for entry in module.entries:
                counts = ", ".join(f"{count} {name}" for name, count in summary(entry).items())
                print(f"  {entry.name}: {counts}")
            findings += lint(module)
    except PtxError as error:
        print(error, file=sys.stderr)
        return 2
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
