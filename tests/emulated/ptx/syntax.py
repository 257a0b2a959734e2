"""Reads PTX text: modules, entries, declarations and instructions, each with its line.

It knows the form of an instruction (guard, opcode, qualifiers, operands) and nothing of what an
instruction does. What it cannot read is an error that names file and line.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field
from pathlib import Path


class PtxError(Exception):
    """Something in a PTX file that is not known; the text names file, line and source."""


# --- operands ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Name:
    """A register, a special register, a variable or a label, with an offset in bytes."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Integer:
    value: int


@dataclass(frozen=True)
class FloatBits:
    """0f3F800000 or 0d3FF0000000000000."""

    bits: int
    width: int


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a name or an absolute address."""

    base: Name | Integer
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b, ...}."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """first|second, two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Negated:
    """!predicate."""

    name: Name


@dataclass(frozen=True)
class Sink:
    """_, a destination that nobody wants."""


Operand = Name | Integer | FloatBits | Address | Vector | Pair | Negated | Sink


# --- statements ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    guard: Name | Negated | None
    opcode: str
    qualifiers: tuple[str, ...]
    operands: tuple[Operand, ...]

    def has(self, qualifier: str) -> bool:
        return qualifier in self.qualifiers


@dataclass(frozen=True)
class Label:
    line: int
    name: str


@dataclass(frozen=True)
class Registers:
    """.reg .type names."""

    line: int
    type: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Variable:
    """.shared, .local, .global, .const or .param memory with a name; sizes in bytes."""

    line: int
    space: str
    name: str
    align: int
    size: int
    values: bytes | None = None


@dataclass(frozen=True)
class BranchTargets:
    """The table of a brx.idx."""

    line: int
    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ScopeBegin:
    line: int


@dataclass(frozen=True)
class ScopeEnd:
    line: int


Statement = Instruction | Label | Registers | Variable | BranchTargets | ScopeBegin | ScopeEnd


@dataclass
class Entry:
    """A kernel."""

    name: str
    line: int
    parameters: list[Variable]
    body: list[Statement]

    def instructions(self) -> list[Instruction]:
        return [statement for statement in self.body if isinstance(statement, Instruction)]


@dataclass
class Module:
    path: str
    version: str = ""
    target: str = ""
    variables: list[Variable] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)


TYPE_BYTES = {
    **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)},
    "b128": 16,
    "f16": 2,
    "bf16": 2,
    "f16x2": 4,
    "bf16x2": 4,
    "f32": 4,
    "f64": 8,
}
STATE_SPACES = ("shared", "local", "global", "const", "param")
_IGNORED_DIRECTIVES = (".pragma ", ".loc ")
_IDENTIFIER = r"[A-Za-z_$%][\w$]*(?:\.[xyzw](?![\w$]))?"


def blank_comments(text: str) -> str:
    """The text with its comments replaced by blanks, so that lines stay where they are."""
    return re.sub(
        r"/\*.*?\*/|//[^\n]*",
        lambda match: re.sub(r"[^\n]", " ", match.group()),
        text,
        flags=re.DOTALL,
    )


def split_commas(text: str) -> list[str]:
    """The parts between the commas that lie outside of brackets and braces."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    if part.strip() or parts:
        parts.append(part.strip())
    return parts


class Parser:
    """Reads one file."""

    def __init__(self, text: str, path: str) -> None:
        self.text = blank_comments(text)
        self.path = path
        self.at = 0
        self.line_ends = [match.start() for match in re.finditer("\n", self.text)]

    # -- places and errors
    def line_of(self, position: int) -> int:
        return bisect.bisect_left(self.line_ends, position) + 1

    def error(self, line: int, problem: str, source: str = "") -> PtxError:
        shown = " ".join(source.split())
        return PtxError(f"{self.path}:{line}: {problem}" + (f": {shown}" if shown else ""))

    def skip_blanks(self) -> bool:
        """False at the end of the file."""
        match = re.compile(r"\s*").match(self.text, self.at)
        assert match
        self.at = match.end()
        return self.at < len(self.text)

    # -- module level
    def module(self) -> Module:
        module = Module(self.path)
        heads = {"version": r"\.version\s+([\d.]+)", "target": r"\.target\s+([\w, ]+)"}
        while self.skip_blanks():
            for attribute, pattern in heads.items():
                if match := re.compile(pattern).match(self.text, self.at):
                    setattr(module, attribute, match[1].strip())
                    self.at = match.end()
                    break
            else:
                self.module_item(module)
        return module

    def module_item(self, module: Module) -> None:
        line = self.line_of(self.at)
        if match := re.compile(r"\.address_size\s+(\d+)").match(self.text, self.at):
            if match[1] != "64":
                raise self.error(line, "addresses of 64 bits are needed", match[0])
            self.at = match.end()
            return
        entry = re.compile(
            r"(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{"
        )
        if match := entry.match(self.text, self.at):
            parameters = [
                self.variable(line, text) for text in split_commas(match[2] or "") if text
            ]
            self.at = match.end()
            module.entries.append(Entry(match[1], line, parameters, self.body()))
            return
        end = self.text.find(";", self.at)
        source = self.text[self.at : end if end >= 0 else len(self.text)]
        if end < 0 or ".func" in source or ".extern" in source:
            raise self.error(line, "not known at module level", source.split("\n")[0])
        self.at = end + 1
        module.variables.append(self.variable(line, source))

    def body(self) -> list[Statement]:
        """From behind the opening brace to behind the closing one."""
        statements: list[Statement] = []
        depth = 0
        while self.skip_blanks():
            line = self.line_of(self.at)
            if self.text[self.at] == "{":
                statements.append(ScopeBegin(line))
                depth += 1
                self.at += 1
            elif self.text[self.at] == "}":
                self.at += 1
                if depth == 0:
                    return statements
                statements.append(ScopeEnd(line))
                depth -= 1
            elif match := re.compile(r"([\w$]+)\s*:(?!:)").match(self.text, self.at):
                self.at = match.end()
                statements.append(self.label_or_table(line, match[1]))
            else:
                statements.extend(self.statement(line, self.to_semicolon(line)))
        raise self.error(self.line_of(self.at), "the file ends within an entry")

    def to_semicolon(self, line: int) -> str:
        end = self.text.find(";", self.at)
        if end < 0:
            raise self.error(line, "no semicolon")
        source = self.text[self.at : end].strip()
        self.at = end + 1
        return source

    def label_or_table(self, line: int, name: str) -> Statement:
        match = re.compile(r"\s*\.branchtargets\s+([^;]*);").match(self.text, self.at)
        if not match:
            return Label(line, name)
        self.at = match.end()
        return BranchTargets(line, name, tuple(split_commas(match[1])))

    # -- statements
    def statement(self, line: int, source: str) -> list[Statement]:
        if source.startswith(".reg"):
            return [self.registers(line, source)]
        if source.startswith(_IGNORED_DIRECTIVES):
            return []
        if source.startswith("."):
            return [self.variable(line, source)]
        return [self.instruction(line, source)]

    def registers(self, line: int, source: str) -> Registers:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", source, re.DOTALL)
        if not match or (match[1] != "pred" and match[1] not in TYPE_BYTES):
            raise self.error(line, "registers of an unknown form", source)
        names: list[str] = []
        for item in split_commas(match[2]):
            if numbered := re.fullmatch(r"([\w$%]+)<(\d+)>", item):
                names += [f"{numbered[1]}{index}" for index in range(int(numbered[2]))]
            elif re.fullmatch(r"[\w$%]+", item):
                names.append(item)
            else:
                raise self.error(line, "registers of an unknown form", source)
        return Registers(line, match[1], tuple(names))

    def variable(self, line: int, source: str) -> Variable:
        match = re.fullmatch(
            r"(?:\.(?:visible|weak)\s+)?\.(\w+)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
            r"(?:\.ptr(?:\s+\.\w+)*(?:\s+\.align\s+\d+)?\s+)?"
            r"([\w$%]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?",
            source.strip(),
            re.DOTALL,
        )
        if not match or match[1] not in STATE_SPACES or match[3] not in TYPE_BYTES:
            raise self.error(line, "not known", source)
        each = TYPE_BYTES[match[3]]
        count = 1
        for length in re.findall(r"\[(\d*)\]", match[5]):
            if not length:
                raise self.error(line, "a variable without a size", source)
            count *= int(length)
        values = None
        if match[6] is not None:
            values = self.initial_values(line, source, match[6], each).ljust(each * count, b"\0")
        return Variable(line, match[1], match[4], int(match[2] or each), each * count, values)

    def initial_values(self, line: int, source: str, text: str, each: int) -> bytes:
        found = b""
        for item in split_commas(re.sub(r"[{}]", " ", text)):
            operand = self.operand(line, source, item)
            if isinstance(operand, Integer):
                found += (operand.value % (1 << 8 * each)).to_bytes(each, "little")
            elif isinstance(operand, FloatBits) and operand.width == 8 * each:
                found += operand.bits.to_bytes(each, "little")
            else:
                raise self.error(line, "an initial value of an unknown form", source)
        return found

    def instruction(self, line: int, source: str) -> Instruction:
        text = " ".join(source.split())
        match = re.fullmatch(
            r"(?:@(!?)([\w$%]+)\s+)?([a-z][a-z0-9]*)((?:\.[\w:]+)*)(?:\s+(.*))?", text
        )
        if not match:
            raise self.error(line, "not an instruction", text)
        guard: Name | Negated | None = None
        if match[2]:
            guard = Negated(Name(match[2])) if match[1] else Name(match[2])
        operands = tuple(self.operand(line, text, item) for item in split_commas(match[5] or ""))
        qualifiers = tuple(match[4].split(".")[1:])
        return Instruction(line, text, guard, match[3], qualifiers, operands)

    # -- operands
    def operand(self, line: int, source: str, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text[:1] == "{" and text[-1:] == "}":
            items = split_commas(text[1:-1])
            return Vector(tuple(self.operand(line, source, item) for item in items))
        if text[:1] == "[" and text[-1:] == "]":
            inner = self.operand(line, source, text[1:-1])
            if isinstance(inner, Name):
                return Address(Name(inner.name), inner.offset)
            if isinstance(inner, Integer):
                return Address(inner, 0)
            raise self.error(line, "an address of an unknown form", source)
        if "|" in text:
            first, second = (self.operand(line, source, part) for part in text.split("|", 1))
            return Pair(first, second)
        if text[:1] == "!" and re.fullmatch(_IDENTIFIER, text[1:].strip()):
            return Negated(Name(text[1:].strip()))
        if (number := self.number(text)) is not None:
            return number
        if match := re.fullmatch(rf"({_IDENTIFIER})\s*(?:([+-])\s*(-?\w+))?", text):
            offset = self.number(match[3]) if match[3] else Integer(0)
            if isinstance(offset, Integer):
                return Name(match[1], -offset.value if match[2] == "-" else offset.value)
        raise self.error(line, f"operand {text!r} of an unknown form", source)

    @staticmethod
    def number(text: str) -> Integer | FloatBits | None:
        for prefix, digits in (("f", 8), ("d", 16)):
            if match := re.fullmatch(
                rf"0[{prefix}{prefix.upper()}]([0-9A-Fa-f]{{{digits}}})", text
            ):
                return FloatBits(int(match[1], 16), 4 * digits)
        if match := re.fullmatch(r"(-?)(0[xX][0-9A-Fa-f]+|0[bB][01]+|0[0-7]+|[0-9]+)[uU]?", text):
            digits_ = match[2]
            base = 8 if re.fullmatch(r"0[0-7]+", digits_) else 0
            value = int(digits_, base)
            return Integer(-value if match[1] else value)
        return None


def parse(text: str, path: str | Path = "<text>") -> Module:
    """Reads PTX text.

    Returns: the module; raises PtxError for what is not known.
    """
    return Parser(text, str(path)).module()
