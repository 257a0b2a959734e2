"""Which cases are run: a covering of all pairs of what a case can be, or everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from cases import BLOCKED, REDUCING, Case
from expected import Lanes

from dpcomm import schedule
from dpcomm.oracle import wire as codecs
from dpcomm.oracle.execute import Geometry, partition

KINDS = ("exact", "random", "special", "ill")
OFFSETS = (0, 1, 4, 6, 60)
#: Counts by name; those that hang on slots and rounds are resolved per case.
FIXED_COUNTS = (0, 1, 2, 63, 64, 65, 511, 512, 513)
NAMED_COUNTS = (
    *("world-1", "world", "world+1"),
    *("slot-1", "slot", "slot+1"),
    *("chunk-1", "chunk+1"),
    *("round-1", "round", "round+1", "rounds"),
    *("lossy-1", "lossy", "lossy+1"),
)
LOSSY_BYTES = 16384  # smaller messages go native
LARGE_COUNTS = ("lossy", "lossy+1", "round-1", "round", "round+1", "rounds", "rounds")
PARAMETERS = {
    "world": range(1, 10),
    "algorithm": [
        *((a.collective, a.name) for a in schedule.algorithms()),
        *((collective, "auto") for collective in schedule.COLLECTIVES),
    ],
    "dtype": codecs.DTYPES,
    "op": codecs.OPS,
    "wire": codecs.WIRES,
    "count": (*FIXED_COUNTS, *NAMED_COUNTS),
    "data": KINDS,
    "offset": OFFSETS,
    "in_place": (False, True),
    "unequal": (False, True),
}


def is_legal(row: dict[str, object]) -> bool:
    """Whether the values go together; what the library refuses is tested elsewhere."""
    collective, algorithm = row["algorithm"]  # type: ignore[misc]
    op, dtype, wire = str(row["op"]), str(row["dtype"]), str(row["wire"])
    if row["unequal"] and collective not in BLOCKED:
        return False
    if collective not in REDUCING:  # op and wire have no meaning then
        return op == "sum" and wire == "native"
    if not codecs.is_supported(op, dtype):
        return False
    if wire != "native" and not codecs.may_be_lossy(op, dtype):
        return False
    return not (wire == "int8" and algorithm not in ("two_shot", "one_shot", "direct", "auto"))


def count_of(row: dict[str, object], world: int, lanes: Lanes) -> int:
    """The number of elements that a name stands for."""
    name = row["count"]
    if isinstance(name, int):
        return name
    text = str(name)
    collective, algorithm = row["algorithm"]  # type: ignore[misc]
    dtype, wire = str(row["dtype"]), str(row["wire"])
    if algorithm == "auto":
        algorithm = "two_shot" if collective == "all_reduce" else "direct"
    info = schedule.find(algorithm, collective)
    geometry = Geometry(*lanes[info.first_lane])
    # Large enough for the number of slices that a large message has.
    cut = partition(collective, algorithm, world, 1 << 22, dtype, wire, geometry)
    per_chunk = cut.slices * cut.slot_elems
    per_round = per_chunk * (1 if cut.blocked else cut.chunks)
    lossy = LOSSY_BYTES // codecs.tensor_dtype(dtype).itemsize
    base = {"world": world, "slot": cut.slot_elems, "chunk": per_chunk, "round": per_round}
    base |= {"rounds": max(2 * per_round, lossy) + 77, "lossy": lossy}
    name, sign, by = text.partition("-" if "-" in text else "+")
    return base[name] + (int(sign + by) if sign else 0)


def case_of(row: dict[str, object], world: int, lanes: Lanes, seed: int) -> Case:
    """The case of a row of values; root, factor and data come from the seed."""
    collective, algorithm = row["algorithm"]  # type: ignore[misc]
    chosen = random.Random(seed)
    op = str(row["op"])
    return Case(
        collective=collective,
        algorithm=algorithm,
        count=count_of(row, world, lanes),
        dtype=str(row["dtype"]),
        op=op,
        wire=str(row["wire"]),
        root=chosen.randrange(world),
        factor=chosen.choice([0.1, -3.0, 2.0**-20]) if op == "premul_sum" else 1.0,
        data=str(row["data"]),
        offset=int(str(row["offset"])),
        in_place=bool(row["in_place"]),
        unequal=bool(row["unequal"]),
        seed=seed,
    )


def _pairs(row: dict[str, object]) -> set[tuple[int, object, int, object]]:
    values = list(enumerate(row.values()))
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(values, 2)}


def random_row(chosen: random.Random) -> dict[str, object]:
    """A legal row, drawn at random."""
    while True:
        row: dict[str, object] = {
            name: chosen.choice(list(values)) for name, values in PARAMETERS.items()
        }
        if row["algorithm"][0] not in REDUCING:  # type: ignore[index]
            row["op"], row["wire"] = "sum", "native"
        if row["algorithm"][0] not in BLOCKED:  # type: ignore[index]
            row["unequal"] = False
        if row["wire"] != "native" and chosen.random() < 0.8:
            row["count"] = chosen.choice(LARGE_COUNTS)
        if is_legal(row):
            return row


def lossy_row(chosen: random.Random) -> dict[str, object]:
    """A legal row whose wire format is a lossy one."""
    while (row := random_row(chosen))["wire"] == "native":
        pass
    return row


def covering(seed: int) -> list[dict[str, object]]:
    """Rows that together have (nearly) every legal pair of values, greedily, from random rows."""
    chosen = random.Random(seed)
    covered: set[tuple[int, object, int, object]] = set()
    rows: list[dict[str, object]] = []
    dry = 0
    while dry < 40:
        best = max(
            (random_row(chosen) for _ in range(15)), key=lambda row: len(_pairs(row) - covered)
        )
        fresh = _pairs(best) - covered
        dry = 0 if fresh else dry + 1
        if fresh:
            covered |= fresh
            rows.append(best)
    return rows


def everything(world: int, lanes: Lanes, seed: int) -> Iterator[Case]:
    """Each legal combination of algorithm, dtype, operator, wire format and count."""
    names = ("algorithm", "dtype", "op", "wire", "count")
    for number, values in enumerate(itertools.product(*(PARAMETERS[name] for name in names))):
        chosen = random.Random(seed + number)
        row: dict[str, object] = dict(zip(names, values, strict=True))
        row["unequal"] = row["algorithm"][0] in BLOCKED and chosen.random() < 0.5  # type: ignore[index]
        if not is_legal(row):
            continue
        for name in ("data", "offset", "in_place"):
            row[name] = chosen.choice(list(PARAMETERS[name]))
        yield case_of(row, world, lanes, seed + number)
