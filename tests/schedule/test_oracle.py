"""The NumPy executor of plans against plain NumPy: exact small numbers, and the wires' bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dpcomm import schedule
from dpcomm.errors import UsageError
from dpcomm.oracle import wire as codecs
from dpcomm.oracle.execute import Geometry, execute, partition
from dpcomm.schedule import Algorithm

Array = npt.NDArray[Any]

ALGORITHMS = schedule.algorithms()
IDS = [f"{a.collective}-{a.name}" for a in ALGORITHMS]
REDUCING = [a for a in ALGORITHMS if a.collective in ("all_reduce", "reduce", "reduce_scatter")]
REDUCING_IDS = [f"{a.collective}-{a.name}" for a in REDUCING]
#: Collectives whose input has a block for each rank.
WHOLE_INPUT = ("reduce_scatter", "scatter", "all_to_all")
each_reduction = pytest.mark.parametrize("algorithm", REDUCING, ids=REDUCING_IDS)
WORLDS = range(1, 10)
#: Small slots, so that a few thousand elements take several rounds.
SMALL = Geometry(slots=4, slot_bytes=2304)


def small_integers(world: int, count: int, dtype: str, seed: int, low: int = -7) -> list[Array]:
    """Tensors whose sums, products and extremes over 9 ranks are exact in every wire format."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0 if dtype in ("uint8", "bool") else low, 8, (world, count))
    if dtype == "bool":
        numbers = numbers % 2
    tensors = []
    for row in numbers:
        acc = row.astype(codecs.accumulator_dtype(dtype))
        tensors.append(codecs.store(dtype, acc))
    return tensors


def inputs_of(algorithm: Algorithm, world: int, count: int, dtype: str, seed: int) -> list[Array]:
    elems = count * world if algorithm.collective in WHOLE_INPUT else count
    return small_integers(world, elems, dtype, seed)


def outputs_of(algorithm: Algorithm, inputs: list[Array], result: Array, root: int) -> list[Any]:
    """What every rank must hold: `result` is the reduction of all inputs."""
    world = len(inputs)
    match algorithm.collective:
        case "all_reduce":
            return [result] * world
        case "reduce":
            return [result if r == root else None for r in range(world)]
        case "reduce_scatter":
            return list(np.split(result, world))
        case "broadcast":
            return [inputs[root]] * world
        case "scatter":
            return list(np.split(inputs[root], world))
        case "gather":
            return [np.concatenate(inputs) if r == root else None for r in range(world)]
        case "all_to_all":
            blocks = [np.split(x, world) for x in inputs]
            return [np.concatenate([row[r] for row in blocks]) for r in range(world)]
        case _:
            return [np.concatenate(inputs)] * world


def assert_same(found: list[Array | None], wanted: list[Any]) -> None:
    for rank, (got, want) in enumerate(zip(found, wanted, strict=True)):
        if want is None:
            assert got is None, f"rank {rank}"
        else:
            assert got is not None, f"rank {rank}"
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want, err_msg=f"rank {rank}")


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
@pytest.mark.parametrize("world", WORLDS)
def test_exact_numbers_give_the_plain_sum(algorithm: Algorithm, world: int) -> None:
    root = world * 2 // 3
    for seed, count in enumerate([0, 1, 7, 511, 513, 5000]):
        inputs = inputs_of(algorithm, world, count, "float32", seed)
        total = np.sum(inputs, axis=0, dtype=np.float32)
        wires = codecs.WIRES if algorithm in REDUCING else ("native",)
        for wire in wires:
            found = execute(
                algorithm.collective,
                algorithm.name,
                inputs,
                wire=wire,
                root=root,
                geometry=SMALL,
            )
            assert_same(found, outputs_of(algorithm, inputs, total, root))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
@pytest.mark.parametrize("dtype", codecs.DTYPES)
def test_every_dtype_and_operator(algorithm: Algorithm, dtype: str) -> None:
    world, count, root = 5, 777, 3
    inputs = inputs_of(algorithm, world, count, dtype, seed=1)
    reducing = algorithm in REDUCING
    for op in codecs.OPS if reducing else ("sum",):
        if reducing and not codecs.is_supported(op, dtype):
            continue
        used = powers_of_two(inputs, dtype) if op == "product" else inputs
        found = execute(
            algorithm.collective,
            algorithm.name,
            used,
            op=op,
            dtype=dtype,
            root=root,
            factor=2.0,
            geometry=Geometry(4, 512),
        )
        wanted = outputs_of(algorithm, used, plain(op, dtype, used), root)
        assert_same(found, wanted)


@pytest.mark.parametrize("world", WORLDS)
def test_blocks_of_unequal_size(world: int) -> None:
    """Against plain slices; several rounds for some blocks, none for others."""
    rng = np.random.default_rng(world)
    sizes = [int(n) for n in rng.choice([0, 1, 700, 2000], world)]
    pairs = [[int(n) for n in rng.choice([0, 1, 700, 2000], world)] for _ in range(world)]
    ends = np.cumsum(sizes)[:-1]
    root = world // 2
    whole = small_integers(world, sum(sizes), "float32", world)
    parts = [x[:n] for x, n in zip(whole, sizes, strict=True)]
    rows = [small_integers(world, sum(row), "float32", r)[r] for r, row in enumerate(pairs)]
    blocks = [np.split(x, np.cumsum(row)[:-1]) for x, row in zip(rows, pairs, strict=True)]
    joined = np.concatenate(parts)
    only_root = [joined if r == root else None for r in range(world)]
    scattered = np.split(whole[root], ends)
    wanted: dict[str, tuple[list[Any], list[Any]]] = {
        "all_gather": (parts, [joined] * world),
        "gather": (parts, only_root),
        "scatter": ([whole[root] if r == root else None for r in range(world)], scattered),
        "reduce_scatter": (whole, np.split(np.sum(whole, axis=0, dtype=np.float32), ends)),
    }
    for algorithm in ALGORITHMS:
        if algorithm.collective in wanted:
            inputs, outputs = wanted[algorithm.collective]
            found = execute(
                algorithm.collective,
                algorithm.name,
                inputs,
                root=root,
                counts=sizes,
                geometry=SMALL,
            )
            assert_same(found, outputs)
    found = execute("all_to_all", "direct", list(rows), pairs=pairs, geometry=SMALL)
    assert_same(found, [np.concatenate([row[r] for row in blocks]) for r in range(world)])


def powers_of_two(tensors: list[Array], dtype: str) -> list[Array]:
    """-2 .. 2 in place of the numbers, so that products are exact in 8 significant bits."""
    if dtype in ("uint8", "bool"):
        return tensors
    return [codecs.store(dtype, np.clip(codecs.load(dtype, x), -2, 2)) for x in tensors]


def plain(op: str, dtype: str, inputs: list[Array]) -> Array:
    """The reduction over ranks in wide arithmetic, wrapped or rounded once at the end."""
    floating = dtype in ("float32", "float64", "float16", "bfloat16")
    wide = [codecs.load(dtype, x).astype(np.float64 if floating else np.int64) for x in inputs]
    if dtype == "bool":
        any_, all_ = np.any(wide, axis=0), np.all(wide, axis=0)
        odd = np.sum(wide, axis=0) % 2
        table = {"sum": any_, "max": any_, "bor": any_, "bxor": odd}
        return table.get(op, all_).astype(np.uint8)
    functions = {
        "sum": lambda x: np.sum(x, axis=0),
        "avg": lambda x: np.sum(x, axis=0) / len(x) if floating else truncated_mean(x, dtype),
        "premul_sum": lambda x: 2.0 * np.sum(x, axis=0),
        "product": lambda x: np.prod(x, axis=0),
        "min": lambda x: np.min(x, axis=0),
        "max": lambda x: np.max(x, axis=0),
        "band": np.bitwise_and.reduce,
        "bor": np.bitwise_or.reduce,
        "bxor": np.bitwise_xor.reduce,
    }
    result = functions[op](np.array(wide))
    return codecs.store(dtype, result.astype(codecs.accumulator_dtype(dtype)))


def truncated_mean(wide: Array, dtype: str) -> Array:
    total = np.sum(wide, axis=0).astype(codecs.tensor_dtype(dtype)).astype(np.int64)
    return np.sign(total) * (np.abs(total) // len(wide))


@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8"])
@each_reduction
def test_avg_divides_once_before_it_rounds(algorithm: Algorithm, wire: str) -> None:
    """The sum is 3 * 2^16 or so: too fine for the wire undivided, exact when divided by 3."""
    world, count = 3, 600
    elems = count * world if algorithm.collective == "reduce_scatter" else count
    inputs = [np.full(elems, 48.0, np.float32)] * world
    found = execute(algorithm.collective, algorithm.name, inputs, op="avg", wire=wire)
    for output in found:
        assert output is None or (output == 48.0).all()


def test_sixteen_bit_tensors_round_at_each_hop_of_a_ring_but_not_in_a_two_shot() -> None:
    inputs = [np.full(3, x, np.float16) for x in (1.0, 2048.0, 1.0)]
    ring = execute("all_reduce", "ring", inputs, dtype="float16", cut=one_element_chunks(3))
    two_shot = execute("all_reduce", "two_shot", inputs, dtype="float16", cut=one_element_chunks(3))
    assert ring[0] is not None
    assert two_shot[0] is not None
    # Chunk 0 goes rank 1, 2, 0: 2048 + 1 rounds to 2048, and again.
    assert ring[0][0] == 2048.0
    # Chunk 1 goes rank 2, 0, 1: (1 + 1) + 2048 is exact.
    assert ring[0][1] == 2050.0
    assert (two_shot[0] == 2050.0).all()


def one_element_chunks(world: int) -> schedule.Partition:
    return schedule.Partition(world, world, 1, 1, 1)


def test_premultiplied_contributions_are_rounded_to_the_dtype() -> None:
    inputs = [np.full(8, 1.0, np.float16), np.full(8, 3.0, np.float16)]
    found = execute("all_reduce", "two_shot", inputs, op="premul_sum", dtype="float16", factor=0.1)
    one, three = (np.float16(np.float32(x) * np.float32(0.1)) for x in (1.0, 3.0))
    wanted = np.float16(np.float32(one) + np.float32(three))
    assert found[0] is not None
    assert (found[0] == wanted).all()


def test_one_rank_alone_is_not_rounded() -> None:
    x = np.array([1.0001, np.pi, 1e-30, np.inf], np.float32)
    for algorithm in REDUCING:
        for wire in codecs.WIRES:
            found = execute(algorithm.collective, algorithm.name, [x], op="avg", wire=wire)
            assert_same(found, [x])


@pytest.mark.parametrize("algorithm", schedule.algorithms("all_reduce"), ids=lambda a: a.name)
@pytest.mark.parametrize("wire", codecs.WIRES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_all_ranks_keep_the_same_bits(algorithm: Algorithm, wire: str, dtype: str) -> None:
    """Laws 1, 2 and 7, with NaN and Inf among the elements."""
    for world in (2, 3, 6, 8):
        rng = np.random.default_rng(world)
        wide = rng.normal(size=(world, 1800)).astype(np.float32)
        special = rng.random(wide.shape) < 0.004
        wide[special] = rng.choice([np.nan, np.inf, -np.inf], int(special.sum()))
        inputs = [codecs.store(dtype, row) for row in wide]
        found = execute(
            algorithm.collective,
            algorithm.name,
            inputs,
            dtype=dtype,
            wire=wire,
            geometry=SMALL,
        )
        for output in found:
            assert output is not None
            assert found[0] is not None
            assert output.tobytes() == found[0].tobytes()
            finite = np.isfinite(codecs.load(dtype, output).astype(np.float64))
            np.testing.assert_array_equal(finite, ~special.any(axis=0))


@each_reduction
@pytest.mark.parametrize("k", [-30, -7, 11])
def test_fp16_scales_by_powers_of_two(algorithm: Algorithm, k: int) -> None:
    world, count = 4, 1200
    elems = count * world if algorithm.collective == "reduce_scatter" else count
    rng = np.random.default_rng(3)
    inputs = list(rng.normal(size=(world, elems)).astype(np.float32))
    scaled = [np.ldexp(x, k) for x in inputs]
    once = execute(algorithm.collective, algorithm.name, inputs, wire="fp16", geometry=SMALL)
    again = execute(algorithm.collective, algorithm.name, scaled, wire="fp16", geometry=SMALL)
    assert_same(again, [None if x is None else np.ldexp(x, k) for x in once])


# --- the bound on the error (DESIGN, "Wire formats") ----------------------------------------------


def gradients(kind: str, world: int, count: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(world, count))
    if kind == "ill-scaled elements":
        x *= 10.0 ** rng.uniform(-8, 4, (1, count))
    elif kind == "ill-scaled ranks":
        x *= 10.0 ** rng.uniform(-8, 4, (world, 1))
    elif kind == "all ill-scaled":
        x *= 10.0 ** rng.uniform(-8, 4, (world, count))
    elif kind == "tiny":
        x *= 1e-8
    elif kind == "equal":
        x[:] = x[0]
    return x.astype(np.float32)


KINDS = ["normal", "ill-scaled elements", "ill-scaled ranks", "all ill-scaled", "tiny", "equal"]


def block_maximum(x: Array, block: int, cut: schedule.Partition) -> Array:
    """For each element, the largest magnitude of its block; blocks start with slices."""
    result = np.zeros_like(x)
    for _, chunk, _, first, elems in cut:
        base = chunk * cut.count if cut.blocked else 0
        for at in range(base + first, base + first + elems, block):
            part = slice(at, min(at + block, base + first + elems))
            result[..., part] = np.abs(x[..., part]).max(axis=-1, keepdims=True)
    return result


def bound(wire: str, wide: Array, roundings: int, cut: schedule.Partition) -> Array:
    """The largest error allowed for each element."""
    world = len(wide)
    total = np.abs(wide).sum(axis=0)
    if wire == "int8":
        maxima = block_maximum(wide, 128, cut).sum(axis=0) + block_maximum(total, 128, cut)
        return maxima / 127 * (1 + 2 / 127) + world * 2.0**-24 * total
    u = {"native": 0.0, "fp16": 2.0**-11, "bf16": 2.0**-8}[wire]
    eta = np.zeros_like(total)
    if wire == "fp16":
        # The largest magnitude of a block goes at 2^14, so the block exponent is that much lower.
        exponent = np.floor(np.log2(block_maximum(total, 512, cut) * (1 + 1e-3))) - 14
        eta = 2.0 ** (np.maximum(exponent, -126) - 25)
    elif wire == "bf16":
        eta = np.full_like(total, 2.0**-134)
    growth = (1 + u) ** roundings - 1
    return growth * total * (1 + world * 2.0**-24) + world * eta + world * 2.0**-24 * total


@each_reduction
@pytest.mark.parametrize("wire", codecs.WIRES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_stays_within_the_bound(algorithm: Algorithm, wire: str, kind: str) -> None:
    for world in (2, 3, 5, 8, 9):
        roundings = algorithm.roundings(world)
        if wire == "int8" and roundings > 2:
            continue
        count = 1300
        elems = count * world if algorithm.collective == "reduce_scatter" else count
        wide = gradients(kind, world, elems, seed=world).astype(np.float64)
        cut = partition(algorithm.collective, algorithm.name, world, count, "float32", wire, SMALL)
        found = execute(
            algorithm.collective,
            algorithm.name,
            [row.astype(np.float32) for row in wide],
            wire=wire,
            geometry=SMALL,
        )
        wanted = outputs_of(algorithm, list(wide), wide.sum(axis=0), 0)
        allowed = outputs_of(algorithm, list(wide), bound(wire, wide, roundings, cut), 0)
        for rank, output in enumerate(found):
            if output is not None:
                error = np.abs(output.astype(np.float64) - wanted[rank])
                over = error > allowed[rank]
                assert not over.any(), (
                    f"{world} ranks, rank {rank}: {over.sum()} elements, worst ratio "
                    f"{(error[over] / allowed[rank][over]).max():.3g}"
                )


def test_the_bound_is_not_idle() -> None:
    """A ring over many equal gradients uses more than a tenth of what the bound allows."""
    wide = gradients("equal", 9, 1300, seed=0).astype(np.float64)
    found = execute("all_reduce", "ring", [r.astype(np.float32) for r in wide], wire="fp16")
    cut = partition("all_reduce", "ring", 9, 1300, "float32", "fp16", Geometry(4, 1 << 18))
    assert found[0] is not None
    error = np.abs(found[0].astype(np.float64) - wide.sum(axis=0))
    assert (error / bound("fp16", wide, 9, cut)).max() > 0.1


# --- what makes no sense --------------------------------------------------------------------------


def test_what_may_not_be_lossy_is_a_usage_error() -> None:
    x = np.ones(4, np.float32)
    with pytest.raises(UsageError):
        execute("broadcast", "ring", [x, x], wire="fp16")
    with pytest.raises(UsageError):
        execute("all_reduce", "ring", [x, x], op="max", wire="fp16")
    with pytest.raises(UsageError):
        execute("all_reduce", "ring", [x, x], op="band")
    with pytest.raises(UsageError):
        execute("all_reduce", "ring", [x, x], wire="fp8")
    with pytest.raises(UsageError, match="too small"):
        execute("all_reduce", "ring", [x, x], wire="fp16", geometry=Geometry(4, 512))
