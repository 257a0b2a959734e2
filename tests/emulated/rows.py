"""What may vary in an emulated case, and which combinations make sense."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

from emulate import REDUCING, Case, Operation
from pairs import Row, covering_rows

from dpcomm.oracle import wire as codecs
from dpcomm.schedule.plans import algorithms, find

#: (collective, algorithm, by packets)
KERNELS = [(a.collective, a.name, False) for a in algorithms() if a.on_devices]
KERNELS += [("all_reduce", "one_shot", True)]
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "kernel": tuple(KERNELS),
    "wire": ("native", "fp16", "bf16", "int8"),
    "dtype": ("float32", "float16", "bfloat16", "int32", "int64", "float64", "uint8"),
    "op": ("sum", "avg", "premul_sum", "product", "min", "max"),
    "world": (2, 3, 4, 5, 6, 7, 8),
    "ctas": (1, 2, 3, 4),
    "slots": ("least", "least and one", "some", "never wraps"),
    "grains_per_slot": (1, 3),
    "size": ("one", "few", "a round", "rounds"),
    "in_place": (False, True),
    "shifted": ("no", "input", "output", "both"),
    "values": ("mixed", "special", "small"),
    "virtual_ranks": (True, False),
    "threads": (64, 32, 160),
}
#: Elements of a tensor at most, so that no case takes long.
MOST_ELEMS = 50_000


def allowed(row: Row) -> bool:
    """Whether the kernels have it; a partial row counts as allowed until it cannot become so."""
    kernel, wire, dtype, op = (row.get(name) for name in ("kernel", "wire", "dtype", "op"))
    copies = kernel is not None and kernel[0] not in REDUCING
    reducing = kernel is not None and not copies
    if copies and (wire not in (None, "native") or op not in (None, "sum")):
        return False
    if dtype == "uint8" and (reducing or wire not in (None, "native") or op not in (None, "sum")):
        return False
    if wire not in (None, "native"):
        if dtype not in (None, "float32", "float16", "bfloat16"):
            return False
        if op not in (None, "sum", "avg", "premul_sum"):
            return False
    if op == "premul_sum" and dtype in ("int32", "int64"):
        return False
    if row.get("in_place") and row.get("shifted") in ("input", "output"):
        return False
    return not (row.get("values") == "small" and dtype in ("int32", "int64", "uint8"))


def grain_elems(wire: str, dtype: str) -> int:
    return max(codecs.BLOCK_ELEMS[wire], 64 // codecs.tensor_dtype(dtype).itemsize)


def slot_bytes(wire: str, dtype: str, grains: int) -> int:
    """A slot for so many grains, and for one of fp32 on the native wire."""
    needed = codecs.slice_bytes(wire, dtype, grains * grain_elems(wire, dtype))
    return max((needed + 15) // 16 * 16, 64)


def case_of(row: Row, number: int) -> Case:
    """A few operations one after the other, of sizes that differ."""
    collective, algorithm, packets = row["kernel"]
    wire, dtype, world, ctas = row["wire"], row["dtype"], row["world"], row["ctas"]
    info = find(algorithm, collective)
    least = info.min_slots(world)
    slots = {"least": least, "least and one": least + 1, "some": least + 2, "never wraps": 80}
    a_round = info.chunks(world) * row["grains_per_slot"] * grain_elems(wire, dtype) * ctas
    if info.collective in ("all_gather", "reduce_scatter"):
        a_round //= world
    sizes = {"one": 1, "few": 7, "a round": a_round - 3, "rounds": 2 * a_round + a_round // 3 + 5}
    count = max(1, min(sizes[row["size"]], MOST_ELEMS))
    off = {"no": (0, 0), "input": (1, 0), "output": (0, 1), "both": (1, 3)}[row["shifted"]]

    slot_count = slots[row["slots"]]
    other = "one_shot" if slot_count < 2 else ("ring", "two_shot", "double_tree")[number % 3]

    def operation(count: int, ctas: int, **changes: Any) -> Operation:
        fields: dict[str, Any] = {
            "collective": collective,
            "algorithm": algorithm,
            "dtype": dtype,
            "op": row["op"],
            "wire": wire,
            "count": count,
            "root": number % world,
            "factor": 0.37,
            "ctas": ctas,
            "in_place": row["in_place"],
            "input_offset": off[0],
            "output_offset": off[1],
            "values": row["values"],
        }
        return Operation(**(fields | changes))

    operations = (
        operation(count, ctas),
        operation(count // 3 + 1, 1 + number % ctas, root=(number + 1) % world),
        # Another operation on the same channels in between.
        Operation("all_reduce", other, count=1 + number % 90),
        operation(count, ctas),
        operation(
            1 + number % 3, ctas, in_place=not row["in_place"], input_offset=0, output_offset=0
        ),
    )
    return Case(
        world=world,
        operations=operations,
        ctas=ctas,
        threads=row["threads"],
        slots=slot_count,
        slot_bytes=slot_bytes(wire, dtype, row["grains_per_slot"]),
        packets=60_000 if packets else 0,
        virtual_ranks=row["virtual_ranks"],
        seed=number,
        extra=(("first_message", 2**32 - 2),) if number % 5 == 0 and not packets else (),
    )


def covering() -> list[Case]:
    """Every two values of two parameters meet in one of the cases."""
    return [
        case_of(row, number) for number, row in enumerate(covering_rows(PARAMETERS, allowed), 1)
    ]


def drawn(count: int, seed: int, **fixed: Any) -> list[Case]:
    """Random cases; `fixed` holds some parameters, or the values to choose from in a tuple."""
    chosen = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        row = {name: chosen.choice(values) for name, values in PARAMETERS.items()}
        row |= {
            k: chosen.choice(v) if isinstance(v, tuple) and k != "kernel" else v
            for k, v in fixed.items()
        }
        if allowed(row):
            cases.append(case_of(row, chosen.randrange(1, 1 << 30)))
    return cases


#: Under ThreadSanitizer time goes with the square of the number of threads.
FOR_THREADS = {"threads": 32, "virtual_ranks": False, "size": "rounds", "grains_per_slot": 1}
FOR_THREADS |= {"slots": "least", "values": "mixed", "world": (2, 3, 4), "ctas": (1, 2)}

#: What the campaign multiplies out; all else is drawn for each case.
MULTIPLIED = ("wire", "dtype", "op", "world", "ctas", "slots", "size")


def everything(kernel: tuple[str, str, bool], seed: int) -> Iterator[Case]:
    """The product for one kernel."""
    chosen = random.Random(seed)
    for values in product(*(PARAMETERS[name] for name in MULTIPLIED)):
        row = {name: chosen.choice(options) for name, options in PARAMETERS.items()}
        row |= dict(zip(MULTIPLIED, values, strict=True)) | {"kernel": kernel}
        if allowed(row | {"in_place": False, "values": "mixed"}):
            while not allowed(row):
                row["in_place"] = chosen.choice((False, True))
                row["values"] = chosen.choice(PARAMETERS["values"])
            yield case_of(row, chosen.randrange(1, 1 << 30))
