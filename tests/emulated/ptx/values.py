"""Instructions that compute: arithmetic, bits, comparisons, conversions, moves."""

from __future__ import annotations

from ptx.emitter import CPP_TYPES, Emitter, Handlers, Qualifiers, joined
from ptx.syntax import TYPE_BYTES, Name, Pair, Vector

handles = Handlers()

INTEGERS = [f"{sign}{bits}" for sign in "us" for bits in (16, 32, 64)]
FLOATS = ["f32", "f64"]
WIDER = {f"{sign}{bits}": f"{sign}{2 * bits}" for sign in "us" for bits in (16, 32)}


def type_of(e: Emitter, q: Qualifiers, allowed: list[str]) -> str:
    """The type, the last qualifier."""
    ptx_type = q.last()
    if ptx_type not in allowed:
        e.fail(f"type {ptx_type!r} is not known here")
    return ptx_type


def opcode_of(e: Emitter) -> str:
    assert e.instruction
    return e.instruction.opcode


def simple(e: Emitter, function: str, ptx_type: str, operands: int, result: str = "") -> str:
    """dst = function(operands...), all of one type."""
    found = e.operands(operands + 1)
    values = ", ".join(e.read(operand, ptx_type) for operand in found[1:])
    return e.write(found[0], result or ptx_type, f"{function}({values})")


# --- arithmetic ----------------------------------------------------------------------------------
@handles("add", "sub", "mul", "div", "min", "max", "abs", "neg", "mad", "fma", "rcp", "sqrt")
def arithmetic(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, INTEGERS + FLOATS)
    return (floating if ptx_type in FLOATS else integer)(e, q, ptx_type)


def floating(e: Emitter, q: Qualifiers, ptx_type: str) -> str:
    opcode = opcode_of(e)
    count = {"abs": 1, "neg": 1, "rcp": 1, "sqrt": 1, "fma": 3, "mad": 3}.get(opcode, 2)
    rounded = q.take("rn")
    if opcode in ("div", "rcp", "sqrt", "fma", "mad") and not rounded:
        e.fail("the rounding to nearest is needed")
    if opcode in ("min", "max", "abs", "neg") and rounded:
        e.fail("unknown qualifier 'rn'")
    function = f"f{'fma' if opcode == 'mad' else opcode}"
    if opcode in ("min", "max") and q.take("NaN"):
        function += "_nan"
    function += f"<{CPP_TYPES[ptx_type]}>"
    if opcode in ("add", "sub", "mul", "fma") and q.take("sat"):
        found = e.operands(count + 1)
        values = ", ".join(e.read(operand, ptx_type) for operand in found[1:])
        return e.write(found[0], ptx_type, f"fsat({function}({values}))")
    return simple(e, function, ptx_type, count)


def integer(e: Emitter, q: Qualifiers, ptx_type: str) -> str:
    opcode = opcode_of(e)
    cpp = CPP_TYPES[ptx_type]
    if opcode in ("mul", "mad"):
        return product(e, q, ptx_type)
    if opcode in ("add", "sub") and ptx_type == "s32" and q.take("sat"):
        return simple(e, f"{opcode}_sat", ptx_type, 2)
    if opcode in ("fma", "rcp", "sqrt"):
        e.fail("not for integers")
    if opcode in ("abs", "neg"):
        if ptx_type[0] == "u":
            e.fail("a signed type is needed")
        return simple(e, f"{opcode}<{cpp}>", ptx_type, 1)
    return simple(e, f"{opcode}<{cpp}>", ptx_type, 2)


def product(e: Emitter, q: Qualifiers, ptx_type: str) -> str:
    """mul and mad: the low half, the high half or all of the product; mad adds a third operand."""
    half = q.take("lo", "hi", "wide")
    if not half or (half == "wide" and ptx_type not in WIDER):
        e.fail("which half of the product?")
    result = WIDER[ptx_type] if half == "wide" else ptx_type
    found = e.operands(4 if opcode_of(e) == "mad" else 3)
    a, b = (e.read(operand, ptx_type) for operand in found[1:3])
    value = f"mul_{half}<{CPP_TYPES[ptx_type]}>({a}, {b})"
    if len(found) == 4:
        value = f"add<{CPP_TYPES[result]}>({value}, {e.read(found[3], result)})"
    return e.write(found[0], result, value)


@handles("rem")
def remainder(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, INTEGERS)
    return simple(e, f"rem<{CPP_TYPES[ptx_type]}>", ptx_type, 2)


@handles("sad")
def sum_of_absolute_difference(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, INTEGERS)
    return simple(e, f"sad<{CPP_TYPES[ptx_type]}>", ptx_type, 3)


@handles("copysign")
def copy_sign(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, FLOATS)
    return simple(e, "ptx::copysign", ptx_type, 2)


# --- bits ----------------------------------------------------------------------------------------
@handles("and", "or", "xor")
def bitwise(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, ["pred", "b16", "b32", "b64"])
    sign = {"and": "&", "or": "|", "xor": "^"}[opcode_of(e)]
    to, a, b = e.operands(3)
    value = f"({e.read(a, ptx_type)} {sign} {e.read(b, ptx_type)})"
    return e.write(to, ptx_type, f"static_cast<{CPP_TYPES[ptx_type]}>{value}")


@handles("not", "cnot")
def invert(e: Emitter, q: Qualifiers) -> str:
    logical = opcode_of(e) == "cnot"
    ptx_type = type_of(e, q, ["b16", "b32", "b64"] + ([] if logical else ["pred"]))
    to, a = e.operands(2)
    sign = "!" if logical or ptx_type == "pred" else "~"
    return e.write(to, ptx_type, f"static_cast<{CPP_TYPES[ptx_type]}>({sign}{e.read(a, ptx_type)})")


@handles("shl", "shr")
def shift(e: Emitter, q: Qualifiers) -> str:
    left = opcode_of(e) == "shl"
    ptx_type = type_of(e, q, ["b16", "b32", "b64"] + ([] if left else INTEGERS))
    to, a, amount = e.operands(3)
    values = f"{e.read(a, ptx_type)}, {e.read(amount, 'u32')}"
    return e.write(to, ptx_type, f"{opcode_of(e)}<{CPP_TYPES[ptx_type]}>({values})")


@handles("shf")
def funnel_shift(e: Emitter, q: Qualifiers) -> str:
    type_of(e, q, ["b32"])
    direction, mode = q.take("l", "r"), q.take("clamp", "wrap")
    if not direction or not mode:
        e.fail("a funnel shift has a direction and a mode")
    to, a, b, c = e.operands(4)
    amount = e.read(c, "u32")
    amount = f"({amount} & 31)" if mode == "wrap" else f"min<uint32_t>({amount}, 32)"
    return e.write(to, "b32", f"shf_{direction}({e.read(a, 'b32')}, {e.read(b, 'b32')}, {amount})")


@handles("popc", "clz", "brev", "bfind")
def count_bits(e: Emitter, q: Qualifiers) -> str:
    opcode = opcode_of(e)
    allowed = ["u32", "s32", "u64", "s64"] if opcode == "bfind" else ["b32", "b64"]
    ptx_type = type_of(e, q, allowed)
    shifted = "_shift" if opcode == "bfind" and q.take("shiftamt") else ""
    result = ptx_type if opcode == "brev" else "u32"
    return simple(e, f"{opcode}{shifted}<{CPP_TYPES[ptx_type]}>", ptx_type, 1, result)


@handles("bfe", "bfi")
def bit_field(e: Emitter, q: Qualifiers) -> str:
    extract = opcode_of(e) == "bfe"
    ptx_type = type_of(e, q, ["u32", "s32", "u64", "s64"] if extract else ["b32", "b64"])
    found = e.operands(4 if extract else 5)
    values = [e.read(operand, ptx_type) for operand in found[1:-2]]
    values += [e.read(operand, "u32") for operand in found[-2:]]
    return e.write(
        found[0], ptx_type, f"{opcode_of(e)}<{CPP_TYPES[ptx_type]}>({', '.join(values)})"
    )


@handles("lop3", "prmt")
def table_of_bits(e: Emitter, q: Qualifiers) -> str:
    type_of(e, q, ["b32"])
    return simple(e, opcode_of(e), "b32", 4 if opcode_of(e) == "lop3" else 3)


# --- comparisons and selection -------------------------------------------------------------------
SIGNS = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "ne": "!="}
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(e: Emitter, name: str, a: str, b: str, ptx_type: str) -> str:
    if ptx_type in FLOATS:
        if name in ("num", "nan"):
            return f"{'!' if name == 'num' else ''}unordered({a}, {b})"
        if name[-1] == "u" and name[:-1] in SIGNS:
            return f"(unordered({a}, {b}) || {a} {SIGNS[name[:-1]]} {b})"
        if name == "ne":
            return f"ordered_ne({a}, {b})"
    elif name in UNSIGNED and ptx_type[0] in "u":
        name = UNSIGNED[name]
    elif ptx_type[0] == "b" and name not in ("eq", "ne"):
        e.fail(f"comparison {name!r} of bits")
    if name not in SIGNS:
        e.fail(f"unknown comparison {name!r}")
    return f"({a} {SIGNS[name]} {b})"


COMPARED = [*INTEGERS, *FLOATS, "b16", "b32", "b64"]


def compared(e: Emitter, q: Qualifiers, ptx_type: str) -> tuple[str, str, str]:
    """The comparison, and what follows it: '&& c', '|| c', '!= c', or nothing."""
    name = q.first()
    logic = q.take("and", "or", "xor")
    found = e.operands(4 if logic else 3)
    a, b = (e.read(operand, ptx_type) for operand in found[1:3])
    value = comparison(e, name, a, b, ptx_type)
    if not logic:
        return value, "", ""
    return value, {"and": "&&", "or": "||", "xor": "!="}[logic], e.predicate(found[3])


@handles("setp")
def set_predicate(e: Emitter, q: Qualifiers) -> str:
    value, logic, other = compared(e, q, type_of(e, q, COMPARED))
    to = e.operands(3, 4)[0]
    if isinstance(to, Pair):
        first = f"is {logic} other" if logic else "is"
        second = f"!is {logic} other" if logic else "!is"
        statements = [f"const bool is = {value};"]
        statements += [f"const bool other = {other};"] if logic else []
        return joined(
            [*statements, e.write(to.first, "pred", first), e.write(to.second, "pred", second)]
        )
    return e.write(to, "pred", f"{value} {logic} {other}" if logic else value)


@handles("set")
def set_value(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, COMPARED)
    result = type_of(e, q, ["u32", "s32", "f32"])
    value, logic, other = compared(e, q, ptx_type)
    yes, no = ("1.0f", "0.0f") if result == "f32" else ("-1", "0")
    value = f"({value} {logic} {other})" if logic else value
    return e.write(
        e.operands(3, 4)[0], result, f"static_cast<{CPP_TYPES[result]}>({value} ? {yes} : {no})"
    )


@handles("selp")
def select(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, COMPARED)
    to, a, b, chosen = e.operands(4)
    value = f"{e.predicate(chosen)} ? {e.read(a, ptx_type)} : {e.read(b, ptx_type)}"
    return e.write(to, ptx_type, value)


@handles("slct")
def select_by_sign(e: Emitter, q: Qualifiers) -> str:
    tested = type_of(e, q, ["s32", "f32"])
    ptx_type = type_of(e, q, COMPARED)
    to, a, b, chosen = e.operands(4)
    value = f"{e.read(chosen, tested)} >= 0 ? {e.read(a, ptx_type)} : {e.read(b, ptx_type)}"
    return e.write(to, ptx_type, value)


@handles("testp")
def test_property(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, FLOATS)
    functions = {
        "finite": "std::isfinite",
        "infinite": "std::isinf",
        "number": "!std::isnan",
        "notanumber": "std::isnan",
        "normal": "std::isnormal",
    }
    name = q.take(*functions)
    if not name:
        e.fail("unknown property")
    to, a = e.operands(2)
    return e.write(to, "pred", f"{functions[name]}({e.read(a, ptx_type)})")


# --- moves ---------------------------------------------------------------------------------------
@handles("mov")
def move(e: Emitter, q: Qualifiers) -> str:
    ptx_type = type_of(e, q, [*COMPARED, "b128", "pred", "f16", "bf16", "f16x2", "bf16x2"])
    to, source = e.operands(2)
    if isinstance(source, Vector):
        return pack(e, to, source, ptx_type)
    if isinstance(to, Vector):
        return unpack(e, to, source, ptx_type)
    return e.write(to, ptx_type, e.read(source, ptx_type))


def part_type(e: Emitter, vector: Vector, ptx_type: str) -> str:
    part = f"b{8 * TYPE_BYTES.get(ptx_type, 0) // len(vector.items)}"
    if ptx_type[0] != "b" or len(vector.items) not in (2, 4) or part not in ("b16", "b32", "b64"):
        e.fail("parts of this form are not known")
    return part


def pack(e: Emitter, to: Name | object, source: Vector, ptx_type: str) -> str:
    part, whole = part_type(e, source, ptx_type), CPP_TYPES[ptx_type]
    terms = [
        f"static_cast<{whole}>({e.read(item, part)}) << {index * int(part[1:])}"
        for index, item in enumerate(source.items)
    ]
    assert isinstance(to, Name)
    return e.write(to, ptx_type, " | ".join(terms))


def unpack(e: Emitter, to: Vector, source: object, ptx_type: str) -> str:
    part = part_type(e, to, ptx_type)
    assert isinstance(source, Name)
    statements = [f"const {CPP_TYPES[ptx_type]} whole = {e.read(source, ptx_type)};"]
    for index, item in enumerate(to.items):
        value = f"static_cast<{CPP_TYPES[part]}>(whole >> {index * int(part[1:])})"
        statements.append(e.write(item, part, value))
    return joined(statements)


@handles("cvta")
def convert_address(e: Emitter, q: Qualifiers) -> str:
    type_of(e, q, ["u64"])
    into = bool(q.take("to"))
    space = q.take("global", "shared", "local", "const", "param")
    if not space:
        e.fail("which memory?")
    to, source = e.operands(2)
    value = e.read(source, "u64")
    if space == "shared":
        value = f"{value} {'-' if into else '+'} m.shared"
    return e.write(to, "u64", value)


# --- conversions ---------------------------------------------------------------------------------
ALL_INTEGERS = [f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)]
HALVES = ["f16", "bf16"]
TO_INTEGRAL = ("rni", "rzi", "rmi", "rpi")


@handles("cvt")
def convert(e: Emitter, q: Qualifiers) -> str:
    source = q.last()
    if source == "f32" and q.left and q.left[-1] in ("f16x2", "bf16x2"):
        return convert_two(e, q)
    if source not in ALL_INTEGERS + FLOATS + HALVES:
        e.fail(f"type {source!r} is not known here")
    result = type_of(e, q, ALL_INTEGERS + FLOATS + HALVES)
    to, operand = e.operands(2)
    value = e.read(operand, source, wider=source in ALL_INTEGERS)
    if source in ALL_INTEGERS and result in ALL_INTEGERS:
        function = "saturate" if q.take("sat") else "static_cast"
        value = f"{function}<{CPP_TYPES[result]}>({value})"
    elif result in ALL_INTEGERS:
        value = float_to_integer(e, q, value, source, result)
    elif source in ALL_INTEGERS:
        value = integer_to_float(e, q, value, source, result)
    else:
        value = float_to_float(e, q, value, source, result)
    return e.write(to, result, value, wider=result in ALL_INTEGERS)


def widened(value: str, source: str) -> str:
    """A float of a 16-bit value; others as they are."""
    return {"f16": f"float_of_half({value})", "bf16": f"float_of_bfloat({value})"}.get(
        source, value
    )


def float_to_integer(e: Emitter, q: Qualifiers, value: str, source: str, result: str) -> str:
    rounding = q.take(*TO_INTEGRAL)
    if not rounding:
        e.fail("a rounding to integers is needed")
    q.take("sat")  # always so
    return f"int_of<{CPP_TYPES[result]}>(round_{rounding}({widened(value, source)}))"


def integer_to_float(e: Emitter, q: Qualifiers, value: str, source: str, result: str) -> str:
    if not q.take("rn"):
        e.fail("the rounding to nearest is needed")
    if result in FLOATS:
        return f"static_cast<{CPP_TYPES[result]}>({value})"
    if result == "f16":
        return f"half_of(static_cast<double>({value}))"
    e.fail("an integer to bf16 is not known")


def float_to_float(e: Emitter, q: Qualifiers, value: str, source: str, result: str) -> str:
    bits = {"bf16": 8, "f16": 11, "f32": 24, "f64": 53}
    if source == result:
        rounding = q.take(*TO_INTEGRAL)
        if source in HALVES:
            e.fail("a conversion that is not known")
        value = f"round_{rounding}({value})" if rounding else value
        return f"fsat({value})" if q.take("sat") else value
    if bits[result] < bits[source]:
        if not q.take("rn"):
            e.fail("the rounding to nearest is needed")
        if result == "f32":
            value = f"canonical(static_cast<float>({value}))"
            return f"fsat({value})" if q.take("sat") else value
        if result == "bf16" and source == "f32":
            return f"bfloat_of({value})"
        if result == "f16" and source in FLOATS:
            return f"half_of({value})"
        e.fail("a conversion that is not known")
    value = widened(value, source)
    if result in HALVES:
        e.fail("a conversion that is not known")
    return value if result == "f32" else f"static_cast<double>({value})"


def convert_two(e: Emitter, q: Qualifiers) -> str:
    """Two floats into the halves of a register, the first operand into the upper one."""
    result = type_of(e, q, ["f16x2", "bf16x2"])
    if not q.take("rn"):
        e.fail("the rounding to nearest is needed")
    function = "half_of" if result == "f16x2" else "bfloat_of"
    to, high, low = e.operands(3)
    upper, lower = (f"uint32_t{{{function}({e.read(x, 'f32')})}}" for x in (high, low))
    return e.write(to, result, f"{upper} << 16 | {lower}")
