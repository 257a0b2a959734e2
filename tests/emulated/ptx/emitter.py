"""From operands to C++: registers, variables, special registers, labels, types.

Registers become local variables that hold bits (uint16_t, uint32_t, uint64_t, u128, bool); an
instruction reads them as the type that it names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NoReturn

from ptx.syntax import (
    TYPE_BYTES,
    Address,
    BranchTargets,
    Entry,
    FloatBits,
    Instruction,
    Integer,
    Label,
    Module,
    Name,
    Negated,
    Operand,
    PtxError,
    Registers,
    ScopeBegin,
    ScopeEnd,
    Sink,
    Variable,
    Vector,
)

CPP_TYPES = {
    **{f"u{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"b{bits}": f"uint{bits}_t" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f16": "uint16_t",
    "bf16": "uint16_t",
    "f16x2": "uint32_t",
    "bf16x2": "uint32_t",
    "f32": "float",
    "f64": "double",
    "b128": "u128",
    "pred": "bool",
}
REGISTER_TYPES = {2: "uint16_t", 4: "uint32_t", 8: "uint64_t", 16: "u128"}

SPECIAL_REGISTERS = {
    "%tid.x": "m.place.thread",
    "%ntid.x": "m.place.threads",
    "%ctaid.x": "m.place.block_x",
    "%ctaid.y": "m.place.block_y",
    "%nctaid.x": "m.place.blocks_x",
    "%nctaid.y": "m.place.blocks_y",
    "%laneid": "m.lane()",
    **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.z"), "0u"),
    **dict.fromkeys(("%ntid.y", "%ntid.z", "%nctaid.z"), "1u"),
    "WARP_SZ": "32u",
}


class Qualifiers:
    """The qualifiers of an instruction; each has to be taken by somebody."""

    def __init__(self, instruction: Instruction) -> None:
        self.left = list(instruction.qualifiers)

    def take(self, *names: str) -> str:
        """The first of `names` that is there, taken; else an empty string."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return name
        return ""

    def first(self) -> str:
        """The next one from the left, taken; else an empty string."""
        return self.left.pop(0) if self.left else ""

    def last(self) -> str:
        """The last one, taken: mostly the type."""
        return self.left.pop() if self.left else ""


@dataclass
class Scope:
    """Names between braces."""

    number: int
    parent: Scope | None
    registers: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (C++ name, type)
    labels: dict[str, str] = field(default_factory=dict)


def plain(name: str) -> str:
    """A C++ identifier's part for a PTX name."""
    return re.sub(r"\W", "_", name.lstrip("%").replace("$", "_"))


def symbol_of(entry: Entry) -> str:
    """The C++ name of a kernel."""
    return f"kernel_{plain(entry.name)}"


def variables_of(entry: Entry) -> str:
    """The C++ name of the struct with the module's variables."""
    return f"variables_of_{plain(entry.name)}"


def scopes_of(entry: Entry) -> list[Scope]:
    """The scopes in the order in which they begin; the first is the entry's."""
    scopes = [Scope(0, None)]
    current = scopes[0]
    for statement in entry.body:
        if isinstance(statement, ScopeBegin):
            current = Scope(len(scopes), current)
            scopes.append(current)
        elif isinstance(statement, ScopeEnd):
            assert current.parent
            current = current.parent
        elif isinstance(statement, Registers):
            for name in statement.names:
                current.registers[name] = (f"v{current.number}_{plain(name)}", statement.type)
        elif isinstance(statement, Label):
            current.labels[statement.name] = f"L{current.number}_{plain(statement.name)}"
    return scopes


class Emitter:
    """Writes the C++ of one entry; what it does not know is a PtxError."""

    def __init__(self, module: Module, entry: Entry) -> None:
        self.module = module
        self.entry = entry
        self.scopes = scopes_of(entry)
        self.scope = self.scopes[0]
        self.scopes_begun = 0
        self.instruction: Instruction | None = None
        self.used: dict[tuple[int, str], tuple[str, str]] = {}
        self.tables: dict[str, tuple[str, ...]] = {}
        self.addresses: dict[str, tuple[str, str]] = {}  # variable -> (space, C++ address)
        self.shared_bytes = 0
        self.parameter_bytes = 0
        self.local_bytes = 0
        for parameter in entry.parameters:
            at = -(-self.parameter_bytes // parameter.align) * parameter.align
            self.addresses[parameter.name] = ("param", f"(m.parameters + {at})")
            self.parameter_bytes = at + parameter.size
        for variable in (*module.variables, *entry.body):
            if isinstance(variable, Variable):
                self.add_variable(variable)
            elif isinstance(variable, BranchTargets):
                self.tables[variable.name] = variable.labels

    def fail(self, problem: str) -> NoReturn:
        assert self.instruction
        raise PtxError(
            f"{self.module.path}:{self.instruction.line}: {problem}: {self.instruction.text}"
        )

    def add_variable(self, variable: Variable) -> None:
        name = f"variable_{plain(variable.name)}"
        if variable.space == "shared":
            self.shared_bytes = -(-self.shared_bytes // variable.align) * variable.align
            address = f"uint64_t{{{self.shared_bytes}}}"
            self.shared_bytes += variable.size
        elif variable.space == "local":
            self.local_bytes = -(-self.local_bytes // variable.align) * variable.align
            address = f"(m.local + {self.local_bytes})"
            self.local_bytes += variable.size
        elif variable.space in ("global", "const"):
            whole = variables_of(self.entry)
            address = f"reinterpret_cast<uint64_t>({whole}.{name})"
        else:
            raise PtxError(f"{self.module.path}:{variable.line}: a .{variable.space} in an entry")
        self.addresses[variable.name] = (variable.space, address)

    # -- scopes
    def enter(self) -> None:
        """Into the next scope in the order of the text."""
        self.scopes_begun += 1
        self.scope = self.scopes[self.scopes_begun]

    def leave(self) -> None:
        assert self.scope.parent
        self.scope = self.scope.parent

    # -- names
    def register(self, name: str) -> tuple[str, str] | None:
        """C++ name and PTX type, or None if there is no such register."""
        scope: Scope | None = self.scope
        while scope:
            if name in scope.registers:
                self.used[(scope.number, name)] = scope.registers[name]
                return scope.registers[name]
            scope = scope.parent
        return None

    def label(self, name: str) -> str:
        scope: Scope | None = self.scope
        while scope:
            if name in scope.labels:
                return scope.labels[name]
            scope = scope.parent
        self.fail(f"there is no label {name!r}")

    def declarations(self, scope: Scope) -> list[str]:
        """Of the registers of a scope that are in use."""
        by_type: dict[str, list[str]] = {}
        for (number, _), (name, ptx_type) in self.used.items():
            if number == scope.number:
                by_type.setdefault(self.register_type(ptx_type), []).append(name)
        return [f"{cpp} {', '.join(names)};" for cpp, names in by_type.items()]

    @staticmethod
    def register_type(ptx_type: str) -> str:
        return "bool" if ptx_type == "pred" else REGISTER_TYPES[TYPE_BYTES[ptx_type]]

    # -- reading
    def cpp(self, ptx_type: str) -> str:
        if ptx_type not in CPP_TYPES:
            self.fail(f"unknown type or qualifier {ptx_type!r}")
        return CPP_TYPES[ptx_type]

    def read(self, operand: Operand, ptx_type: str, wider: bool = False) -> str:
        """An expression of the C++ type of `ptx_type`; `wider` allows a wider register."""
        cpp = self.cpp(ptx_type)
        if ptx_type == "pred":
            return self.predicate(operand)
        if isinstance(operand, Integer):
            return self.integer(operand, ptx_type)
        if isinstance(operand, FloatBits):
            if CPP_TYPES.get(f"f{operand.width}") != cpp and ptx_type != f"b{operand.width}":
                self.fail("a constant of another width")
            return f"as<{cpp}>(uint{operand.width}_t{{{operand.bits:#x}u}})"
        if not isinstance(operand, Name):
            self.fail(f"cannot be read here: {operand}")
        found = self.register(operand.name)
        if found and not operand.offset:
            name, register_type = found
            if register_type == "pred":
                self.fail("a predicate where a value is needed")
            have, want = TYPE_BYTES[register_type], TYPE_BYTES[ptx_type]
            if have < want or (have > want and not wider):
                self.fail(f"{operand.name} has {have} bytes, {want} are needed")
            return name if self.register_type(register_type) == cpp else f"as<{cpp}>({name})"
        if operand.name in SPECIAL_REGISTERS and not operand.offset:
            return f"static_cast<{cpp}>({SPECIAL_REGISTERS[operand.name]})"
        if operand.name in self.addresses and ptx_type in ("u32", "b32", "u64", "b64", "s64"):
            return f"static_cast<{cpp}>({self.addresses[operand.name][1]} + {operand.offset})"
        self.fail(f"{operand.name!r} is not known")

    def integer(self, operand: Integer, ptx_type: str) -> str:
        if ptx_type[0] not in "bus" or ptx_type not in TYPE_BYTES:
            self.fail("an integer where a floating-point value is needed")
        bits = 8 * TYPE_BYTES[ptx_type]
        if not -(1 << (bits - 1)) <= operand.value < (1 << bits) or bits > 64:
            self.fail(f"{operand.value} does not fit {bits} bits")
        cpp = CPP_TYPES[ptx_type]
        return f"static_cast<{cpp}>(uint64_t{{{operand.value % (1 << 64)}u}})"

    def predicate(self, operand: Operand) -> str:
        if isinstance(operand, Negated):
            return f"!{self.predicate(operand.name)}"
        if isinstance(operand, Name):
            found = self.register(operand.name)
            if found and found[1] == "pred":
                return found[0]
        if isinstance(operand, Integer) and operand.value in (0, 1, -1):
            return "true" if operand.value else "false"
        self.fail(f"not a predicate: {operand}")

    def address(self, operand: Operand, space: str) -> str:
        """Of the host's memory."""
        if not isinstance(operand, Address):
            self.fail("an address is needed")
        base = operand.base
        if isinstance(base, Name) and base.name in self.addresses:
            known = self.addresses[base.name][0]
            if space and known != space:
                self.fail(f"{base.name} lies in .{known}, not in .{space}")
            space = known
            text = self.addresses[base.name][1]
        elif space == "shared" and self.width_of(base) == 4:
            text = f"uint64_t{{{self.read(base, 'u32')}}}"
        else:
            text = self.read(base, "u64")
        if operand.offset:
            text = f"({text} + static_cast<uint64_t>(int64_t{{{operand.offset}}}))"
        return f"(m.shared + {text})" if space == "shared" else text

    def width_of(self, operand: Operand) -> int:
        """Bytes of a register; 8 for all else."""
        found = self.register(operand.name) if isinstance(operand, Name) else None
        return TYPE_BYTES.get(found[1], 0) if found else 8

    # -- writing
    def write(self, operand: Operand, ptx_type: str, value: str, wider: bool = False) -> str:
        """A statement that gives a register a value of the C++ type of `ptx_type`."""
        if isinstance(operand, Sink):
            return f"static_cast<void>({value});"
        found = self.register(operand.name) if isinstance(operand, Name) else None
        if not found:
            self.fail(f"not a destination: {operand}")
        name, register_type = found
        if (register_type == "pred") != (ptx_type == "pred"):
            self.fail("a predicate and a value are mixed")
        if ptx_type != "pred":
            have, want = TYPE_BYTES[register_type], TYPE_BYTES[ptx_type]
            if have < want or (have > want and not wider):
                self.fail(f"{name} has {have} bytes, {want} are given")
            if self.register_type(register_type) != self.cpp(ptx_type):
                value = f"put<{self.register_type(register_type)}>({value})"
        return f"{name} = {value};"

    def items(self, operand: Operand, count: int) -> tuple[Operand, ...]:
        """The registers of a vector operand of `count` elements; one stands for itself."""
        if count == 1 and not isinstance(operand, Vector):
            return (operand,)
        if not isinstance(operand, Vector) or len(operand.items) != count:
            self.fail(f"{count} operands in braces are needed")
        return operand.items

    def operands(self, least: int, most: int | None = None) -> tuple[Operand, ...]:
        assert self.instruction
        found = self.instruction.operands
        if not least <= len(found) <= (most or least):
            self.fail(f"{least} operands are needed, {len(found)} are there")
        return found


Handler = Callable[[Emitter, Qualifiers], str]


class Handlers:
    """What emits which opcode; @handles("add", "sub") adds to it."""

    def __init__(self) -> None:
        self.by_opcode: dict[str, Handler] = {}

    def __call__(self, *opcodes: str) -> Callable[[Handler], Handler]:
        def register(handler: Handler) -> Handler:
            self.by_opcode.update(dict.fromkeys(opcodes, handler))
            return handler

        return register


def joined(statements: Iterable[str]) -> str:
    return " ".join(statements)
