"""The reference: right results pass, and every kind of wrong one is counted."""

from __future__ import annotations

import itertools

import pytest

torch = pytest.importorskip("torch")

from dpcomm.bench.cases import (  # noqa: E402
    COLLECTIVES,
    DTYPES,
    PERIOD,
    REDUCE_OPS,
    Case,
    Expected,
    fill,
)
from dpcomm.bench.options import COLLECTIVES as OPTION_COLLECTIVES  # noqa: E402
from dpcomm.bench.options import DTYPES as OPTION_DTYPES  # noqa: E402
from dpcomm.bench.options import OPS as OPTION_OPS  # noqa: E402

WORLD = 3
COUNT = 2 * PERIOD + 1000  # two whole periods and a part


def case(collective: str = "all_reduce", op: str = "sum", dtype: str = "float") -> Case:
    gathers = collective not in ("all_reduce", "broadcast")
    size = COUNT * DTYPES[dtype].itemsize * (WORLD if gathers else 1)
    return Case(collective, dtype, op, size, WORLD, root=1)


def inputs(c: Case, seed: int, lossy: bool = False) -> list[torch.Tensor]:
    tensors = []
    for rank in range(WORLD):
        tensor = torch.empty(c.input_elems, dtype=c.dtype)
        fill(tensor, c.contribution(rank, seed, lossy))
        tensors.append(tensor)
    return tensors


def execute(c: Case, rank: int, seed: int, lossy: bool = False) -> torch.Tensor:
    """The collective by plain torch arithmetic over whole tensors."""
    contributions = inputs(c, seed, lossy)
    if c.collective == "broadcast":
        return contributions[c.root].clone()
    if c.gathers:
        return torch.cat(contributions)
    stacked = torch.stack(contributions)
    if c.op in ("min", "max"):
        whole = stacked.amin(0) if c.op == "min" else stacked.amax(0)
    elif c.op == "prod":
        whole = stacked.prod(0, dtype=c.dtype)
    else:
        wide = torch.float64 if c.dtype.is_floating_point else torch.int64
        whole = stacked.to(wide).sum(0)
        if c.op == "avg":
            whole = torch.div(
                whole, WORLD, rounding_mode=None if wide.is_floating_point else "trunc"
            )
        elif c.op == "premul":
            whole = whole * 2
        whole = whole.to(c.dtype)
    if c.collective == "reduce_scatter":
        return whole[rank * c.count : (rank + 1) * c.count].clone()
    return whole


def test_the_options_offer_what_there_is() -> None:
    assert OPTION_COLLECTIVES == COLLECTIVES
    assert OPTION_OPS == REDUCE_OPS
    assert tuple(DTYPES) == OPTION_DTYPES


@pytest.mark.parametrize(("op", "dtype"), list(itertools.product(REDUCE_OPS, DTYPES)))
def test_right_reductions_pass(op: str, dtype: str) -> None:
    c = case(op=op, dtype=dtype)
    assert Expected.of(c, 0, seed=5).count_wrong(execute(c, 0, seed=5)) == 0


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_right_results_pass_on_every_rank(collective: str) -> None:
    c = case(collective)
    for rank in range(WORLD):
        assert Expected.of(c, rank, seed=2).count_wrong(execute(c, rank, seed=2)) == 0


@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("dtype", ["float", "bfloat16", "uint8", "int64"])
def test_one_wrong_element_counts_as_one(collective: str, dtype: str) -> None:
    c = case(collective, dtype=dtype)
    expected, output = Expected.of(c, 1, seed=3), execute(c, 1, seed=3)
    for place in (0, PERIOD - 1, PERIOD, c.output_elems - 1):
        wrong = output.clone()
        wrong[place] += 1
        assert expected.count_wrong(wrong) == 1
    if output.is_floating_point():
        output[7] = float("nan")
        assert expected.count_wrong(output) == 1


def test_missing_doubled_and_swapped_contributions_are_counted() -> None:
    c = case()
    expected, contributions = Expected.of(c, 0, seed=1), inputs(c, seed=1)
    total = torch.stack(contributions).sum(0)
    most = COUNT // 2
    assert expected.count_wrong(total - contributions[2]) > most  # one rank left out
    assert expected.count_wrong(total + contributions[1]) > most  # one counted twice
    assert expected.count_wrong(contributions[0]) > most  # nothing done
    assert expected.count_wrong(execute(c, 0, seed=9)) > most  # results of another call
    swapped = total.clone()
    swapped[:4096], swapped[4096:8192] = total[4096:8192], total[:4096]
    assert 4096 < expected.count_wrong(swapped) <= 8192


def test_blocks_of_another_rank_are_counted() -> None:
    c = case("reduce_scatter")
    assert Expected.of(c, 0, seed=1).count_wrong(execute(c, 1, seed=1)) > c.count // 2
    c = case("all_gather")
    shuffled = execute(c, 0, seed=1).view(WORLD, -1).roll(1, 0).flatten()
    assert Expected.of(c, 0, seed=1).count_wrong(shuffled) > c.output_elems // 2


def test_an_output_of_another_length_is_wrong() -> None:
    c = case()
    assert Expected.of(c, 0, seed=1).count_wrong(execute(c, 0, seed=1)[:-5]) >= 5


@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("op", ["sum", "avg", "premul"])
def test_lossy_wires_are_held_to_their_bound(wire: str, dtype: str, op: str) -> None:
    c = case(op=op, dtype=dtype)
    expected, output = Expected.of(c, 0, 4, wire), execute(c, 0, 4, lossy=True)
    assert expected.count_wrong(output) == 0
    assert expected.tolerance is not None
    limit = torch.empty(c.count, dtype=torch.float64)
    fill(limit, expected.tolerance)
    assert expected.count_wrong(output.double() + 0.4 * limit) == 0
    assert expected.count_wrong(output.double() + 3 * limit) == c.count
    assert expected.count_wrong(torch.full_like(output, float("nan"))) == c.count


@pytest.mark.parametrize(("wire", "scale"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_the_bound_is_near_the_roundings(wire: str, scale: float) -> None:
    c = case()
    tolerance = Expected.of(c, 0, 4, wire).tolerance
    magnitudes = torch.stack(
        [c.contribution(r, 4, lossy=True).double().abs() for r in range(WORLD)]
    )
    ratio = tolerance / magnitudes.sum(0) / scale
    assert 3 <= float(ratio.median()) < 3.1  # as many as there are ranks


def test_lossy_wires_do_not_loosen_what_must_be_exact() -> None:
    for c in (case("broadcast"), case("all_gather"), case(op="max"), case(dtype="int32")):
        expected = Expected.of(c, 0, 4, wire="int8")
        assert expected.tolerance is None
        assert expected.count_wrong(execute(c, 0, 4)) == 0


def test_counts_are_those_of_nccl_tests() -> None:
    assert Case("all_reduce", "float", "sum", 1024, 4).count == 256
    assert Case("broadcast", "half", "none", 1024, 4).count == 512
    gather = Case("all_gather", "float", "none", 1024, 4)
    assert (gather.count, gather.input_elems, gather.output_elems) == (64, 64, 256)
    scatter = Case("reduce_scatter", "float", "sum", 1024, 4)
    assert (scatter.count, scatter.input_elems, scatter.output_elems) == (64, 256, 64)
    assert gather.size_bytes == scatter.size_bytes == 1024
    assert Case("all_reduce", "double", "sum", 1, 4).count == 1
