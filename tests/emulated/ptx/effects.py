"""Instructions with effects: memory, fences, barriers, warp functions, control."""

from __future__ import annotations

from ptx.emitter import CPP_TYPES, Emitter, Handlers, Qualifiers, joined
from ptx.syntax import TYPE_BYTES, Integer, Name, Pair
from ptx.values import ALL_INTEGERS, opcode_of, type_of

handles = Handlers()

MEMORY_TYPES = [*ALL_INTEGERS, "f32", "f64", "b8", "b16", "b32", "b64", "b128"]
SCOPES = ("sys", "gpu", "cluster", "cta")
# Hints on caches, without effect on values.
LOAD_HINTS = ("ca", "cg", "cs", "lu", "nc")
STORE_HINTS = ("wb", "cg", "cs", "wt")
LEVEL_HINTS = tuple(
    [f"L1::{hint}" for hint in ("evict_normal", "evict_unchanged", "evict_first", "evict_last")]
    + ["L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"]
    + [f"L2::evict_{hint}" for hint in ("last", "normal", "first")]
)


class Access:
    """The qualifiers of a load or store."""

    def __init__(self, e: Emitter, q: Qualifiers, load: bool) -> None:
        self.load = load
        self.type = type_of(e, q, MEMORY_TYPES)
        self.count = int(q.take("v2", "v4", "v8")[1:] or 1)
        self.order = q.take("weak", "relaxed", "acquire" if load else "release", "volatile")
        self.order = self.order or "weak"
        scope = q.take(*SCOPES)
        if bool(scope) != (self.order not in ("weak", "volatile")):
            e.fail("a strong access has a scope, a weak one has none")
        space = q.take("global", "shared", "shared::cta", "local", "param", "const")
        self.space = space.split(":")[0]
        if not load and self.space in ("param", "const"):
            e.fail(f"a store to .{self.space}")
        while q.take(*(LOAD_HINTS if load else STORE_HINTS), *LEVEL_HINTS):
            pass
        self.each = TYPE_BYTES[self.type]
        self.bytes = self.each * self.count
        if self.bytes > 32 or (self.order == "weak" and self.type == "b128"):
            e.fail("an access of this form is not known")
        if self.order != "weak":
            self.check_strong(e)

    def check_strong(self, e: Emitter) -> None:
        """Flags of 8 bytes, words of 4 and packets of 16: what the emulator knows."""
        ordered = self.order in ("acquire", "release")
        if self.space not in ("", "global") or self.count > 1 or self.each < (8 if ordered else 4):
            e.fail("a strong access of this form is not known")
        if ordered and self.each > 8:
            e.fail("a strong access of this form is not known")

    def begin(self, e: Emitter) -> str:
        """The statement that checks and counts the access at `at`."""
        assert e.instruction
        line = e.instruction.line
        write = "false" if self.load else "true"
        if self.space in ("", "global"):
            kind = self.space or "generic"
            return f"m.begin_{kind}(at, {self.bytes}, {write}, {line});"
        kind = "shared" if self.space == "shared" else "private"
        return f"m.begin_{kind}(at, {self.bytes}, {line});"


def strong_name(access: Access) -> str:
    return {4: "word", 8: "flag", 16: "packet"}[access.each]


@handles("ld")
def load(e: Emitter, q: Qualifiers) -> str:
    access = Access(e, q, load=True)
    to, place = e.operands(2)
    assert e.instruction
    address = e.address(place, access.space)
    cpp = CPP_TYPES[access.type]
    if access.order != "weak":
        arguments = [address]
        if access.each == 8:
            arguments.append("true" if access.order == "acquire" else "false")
        call = f"m.load_{strong_name(access)}({', '.join(arguments)}, {e.instruction.line})"
        return e.write(to, access.type, f"as<{cpp}>({call})", wider=True)
    statements = [f"const uint64_t at = {address};", access.begin(e)]
    for index, item in enumerate(e.items(to, access.count)):
        at = f"at + {index * access.each}" if index else "at"
        statements.append(e.write(item, access.type, f"m.load<{cpp}>({at})", wider=True))
    return joined(statements)


@handles("st")
def store(e: Emitter, q: Qualifiers) -> str:
    access = Access(e, q, load=False)
    place, source = e.operands(2)
    assert e.instruction
    address = e.address(place, access.space)
    cpp = CPP_TYPES[access.type]
    if access.order != "weak":
        value = e.read(source, access.type, wider=True)
        arguments = [address, value if access.each == 16 else f"bits_as<Bits<{cpp}>>({value})"]
        if access.each == 8:
            arguments.append("true" if access.order == "release" else "false")
        return f"m.store_{strong_name(access)}({', '.join(arguments)}, {e.instruction.line});"
    statements = [f"const uint64_t at = {address};", access.begin(e)]
    for index, item in enumerate(e.items(source, access.count)):
        at = f"at + {index * access.each}" if index else "at"
        statements.append(f"m.store<{cpp}>({at}, {e.read(item, access.type, wider=True)});")
    return joined(statements)


@handles("fence", "membar")
def fence(e: Emitter, q: Qualifiers) -> str:
    e.operands(0, 0)
    if opcode_of(e) == "membar":
        scope = q.take("sys", "gl", "cta")
    else:
        q.take("acq_rel", "sc")
        scope = q.take(*SCOPES)
    if not scope:
        e.fail("a fence has a scope")
    return "m.fence();" if scope in ("sys", "gpu", "gl") else "static_cast<void>(0);"


# --- meetings ------------------------------------------------------------------------------------
@handles("bar", "barrier")
def barrier(e: Emitter, q: Qualifiers) -> str:
    assert e.instruction
    q.take("cta")
    if not q.take("warp"):
        if not q.take("sync") or e.operands(1)[0] != Integer(0):
            e.fail("only barrier 0 of the whole block is known")
        q.take("aligned")
        return "m.block_sync();"
    if not q.take("sync"):
        e.fail("only sync is known")
    return f"m.warp_sync({e.read(e.operands(1)[0], 'u32')}, {e.instruction.line});"


@handles("shfl")
def shuffle(e: Emitter, q: Qualifiers) -> str:
    assert e.instruction
    type_of(e, q, ["b32"])
    mode = q.take("up", "down", "bfly", "idx")
    if not q.take("sync") or not mode:
        e.fail("a shuffle has sync and a mode")
    to, *rest = e.operands(5)
    a, b, c, members = (e.read(operand, "b32") for operand in rest)
    call = (
        f"m.shuffle(Shuffle::k{mode.capitalize()}, {a}, {b}, {c}, {members}, valid, "
        f"{e.instruction.line})"
    )
    statements = ["bool valid;", f"const uint32_t value = {call};"]
    first = to.first if isinstance(to, Pair) else to
    statements.append(e.write(first, "b32", "value"))
    if isinstance(to, Pair):
        statements.append(e.write(to.second, "pred", "valid"))
    return joined(statements)


@handles("vote")
def vote(e: Emitter, q: Qualifiers) -> str:
    assert e.instruction
    result = type_of(e, q, ["pred", "b32"])
    mode = q.take("any", "all", "uni", "ballot")
    if not q.take("sync") or not mode or (mode == "ballot") != (result == "b32"):
        e.fail("a vote of an unknown form")
    to, mine, members = e.operands(3)
    ballot = f"m.ballot({e.predicate(mine)}, {e.read(members, 'b32')}, {e.instruction.line})"
    test = {
        "any": "ballot != 0",
        "all": "ballot == 0xffffffffu",
        "uni": "ballot == 0 || ballot == 0xffffffffu",
        "ballot": "ballot",
    }[mode]
    return joined([f"const uint32_t ballot = {ballot};", e.write(to, result, test)])


@handles("redux")
def reduce_in_warp(e: Emitter, q: Qualifiers) -> str:
    assert e.instruction
    ptx_type = type_of(e, q, ["u32", "s32", "b32"])
    operations = {
        "add": "add(x, y)",
        "min": "min(x, y)",
        "max": "max(x, y)",
        "and": "x & y",
        "or": "x | y",
        "xor": "x ^ y",
    }
    operation = q.take(*operations)
    if not q.take("sync") or not operation:
        e.fail("a reduction of an unknown form")
    if (operation in ("and", "or", "xor")) != (ptx_type == "b32"):
        e.fail(f"{operation} of {ptx_type}")
    to, mine, members = e.operands(3)
    cpp = CPP_TYPES[ptx_type]
    combine = f"[]({cpp} x, {cpp} y) {{ return {operations[operation]}; }}"
    values = f"{e.read(mine, ptx_type)}, {e.read(members, 'b32')}, {e.instruction.line}"
    return e.write(to, ptx_type, f"m.reduce<{cpp}>({values}, {combine})")


@handles("nanosleep")
def sleep(e: Emitter, q: Qualifiers) -> str:
    type_of(e, q, ["u32"])
    e.operands(1)
    return "m.pause();"


# --- control -------------------------------------------------------------------------------------
def target(e: Emitter, operand: object) -> str:
    if not isinstance(operand, Name):
        e.fail("a label is needed")
    return e.label(operand.name)


@handles("bra")
def branch(e: Emitter, q: Qualifiers) -> str:
    q.take("uni")
    return f"goto {target(e, e.operands(1)[0])};"


@handles("brx")
def branch_by_table(e: Emitter, q: Qualifiers) -> str:
    assert e.instruction
    if not q.take("idx"):
        e.fail("only brx.idx is known")
    q.take("uni")
    index, table = e.operands(2)
    if not isinstance(table, Name) or table.name not in e.tables:
        e.fail("there is no such table")
    cases = [f"case {i}: goto {e.label(name)};" for i, name in enumerate(e.tables[table.name])]
    outside = f'default: m.fail({e.instruction.line}, "an index outside of the table");'
    return joined([f"switch ({e.read(index, 'u32')}) {{", *cases, outside, "}"])


@handles("ret", "exit")
def leave(e: Emitter, q: Qualifiers) -> str:
    q.take("uni")
    e.operands(0, 0)
    return "return;"


@handles("trap")
def trap(e: Emitter, q: Qualifiers) -> str:
    assert e.instruction
    e.operands(0, 0)
    return f'm.fail({e.instruction.line}, "trap");'
