"""The executor gives the oracle's bits: every algorithm, wire, dtype and operator, odd sizes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import dpcomm
from dpcomm import schedule
from dpcomm.oracle import wire as codecs
from dpcomm.oracle.execute import Geometry, execute
from dpcomm.schedule import Algorithm

Array = npt.NDArray[Any]

SLOT_BYTES = 4096  # the least that the transport takes, so that there are many rounds
GEOMETRY = Geometry(slots=4, slot_bytes=SLOT_BYTES)
LEAST_LOSSY_BYTES = 16 << 10  # smaller messages go native
MOST_INT8_ROUNDINGS = 2
REDUCING = ("all_reduce", "reduce", "reduce_scatter")
WHOLE_INPUT = ("reduce_scatter", "scatter", "all_to_all")
DEADLINE_S = 90.0
NUMPY_DTYPES = [dtype for dtype in codecs.DTYPES if dtype != "bfloat16"]


@dataclass
class Job:
    """One collective, its inputs, and what each rank got."""

    algorithm: Algorithm
    op: str
    dtype: str
    wire: str
    root: int
    inputs: list[Array]
    in_place: bool = False
    factor: float = 0.3
    results: dict[int, Array] = field(default_factory=dict)

    def run(self, rank: int, communicator: dpcomm.Communicator) -> None:
        options: dict[str, Any] = {"algorithm": self.algorithm.name}
        array = self.inputs[rank].copy()
        out = self._output(array)
        collective = self.algorithm.collective
        if collective in REDUCING:
            options |= {"op": self.op, "factor": self.factor, "wire": self.wire}
        if collective in ("broadcast", "reduce", "gather", "scatter"):
            options["root"] = self.root
        if collective != "broadcast":
            options["out"] = self._typed(out)
        getattr(communicator, collective)(self._typed(array), **options)
        self.results[rank] = array if collective == "broadcast" else out

    def _typed(self, array: Array) -> Any:
        """The same memory as an array of the dtype that NumPy does not have, or names otherwise."""
        if self.dtype == "bfloat16":
            import torch

            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return array.view(np.bool_) if self.dtype == "bool" else array

    def _output(self, array: Array) -> Array:
        world = len(self.inputs)
        if self.algorithm.collective in ("all_reduce", "reduce") and self.in_place:
            return array
        whole, block = array.size * world, array.size // world
        elems = {"all_gather": whole, "gather": whole, "reduce_scatter": block, "scatter": block}
        output = np.empty(elems.get(self.algorithm.collective, array.size), array.dtype)
        output.view(np.uint8)[:] = 0xCC
        return output

    def check(self) -> None:
        wanted = execute(
            self.algorithm.collective,
            self.algorithm.name,
            self.inputs,
            op=self.op,
            dtype=self.dtype,
            wire=self.wire,
            root=self.root,
            factor=self.factor,
            geometry=GEOMETRY,
        )
        for rank, want in enumerate(wanted):
            if want is None:
                continue
            same = self.results[rank].tobytes() == want.tobytes()
            assert same, f"{self}: rank {rank} has other bits than the oracle"

    def __str__(self) -> str:
        return (
            f"{self.algorithm.collective} {self.algorithm.name}, {len(self.inputs)} ranks, "
            f"{self.inputs[0].size} x {self.dtype}, {self.op}, {self.wire}, root {self.root}"
        )


def run_jobs(world: int, jobs: list[Job], name: str) -> None:
    """Runs the jobs on all ranks."""

    def on_rank(rank: int) -> None:
        with dpcomm.Communicator(
            rank,
            world,
            transport="inproc",
            name=name,
            wire="int8",
            wire_links="all",
            timeout=DEADLINE_S,
        ) as communicator:
            for job in jobs:
                job.run(rank, communicator)

    in_threads(world, on_rank)


def in_threads(world: int, on_rank: Callable[[int], None]) -> None:
    """Runs ranks as threads, and raises what one of them raised."""
    errors: list[BaseException] = []

    def guarded(rank: int) -> None:
        try:
            on_rank(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(r,), daemon=True) for r in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S + 10)
        assert not thread.is_alive(), "a rank does not come to an end"
    if errors:
        raise errors[0]


def tensors(rng: np.random.Generator, dtype: str, world: int, elems: int) -> list[Array]:
    """Random ones of many magnitudes, NaN and Inf among them."""
    if dtype not in ("float32", "float64", "float16", "bfloat16"):
        low, high = (0, 2) if dtype == "bool" else (0, 200) if dtype == "uint8" else (-100, 100)
        numbers = rng.integers(low, high, (world, elems))
        return [row.astype(codecs.tensor_dtype(dtype)) for row in numbers]
    wide = rng.normal(size=(world, elems)) * 10.0 ** rng.uniform(-4, 2, (world, elems))
    special = rng.random(wide.shape) < 0.001
    wide[special] = rng.choice([np.nan, np.inf, -np.inf], int(special.sum()))
    return [codecs.store(dtype, row.astype(codecs.accumulator_dtype(dtype))) for row in wide]


def fresh(world: int, wanted: Callable[[Algorithm], list[tuple[str, str, str, int]]]) -> list[Job]:
    """A job for each (op, dtype, wire, count) that `wanted` gives for an algorithm."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")  # shown where the test fails
    rng = np.random.default_rng(seed)
    jobs = []
    for algorithm in schedule.algorithms():
        for op, dtype, wire, count in wanted(algorithm):
            elems = count * world if algorithm.collective in WHOLE_INPUT else count
            inputs = tensors(rng, dtype, world, elems)
            root = int(rng.integers(world))
            in_place = bool(rng.integers(2))
            jobs.append(Job(algorithm, op, dtype, wire, root, inputs, in_place))
    return jobs


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPCOMM_SLOT_BYTES", str(SLOT_BYTES))


@pytest.mark.parametrize("world", range(1, 10))
def test_odd_sizes(world: int) -> None:
    sizes = (0, 1, 15, 17, 1023, 1025, 4 * 1024 * world + 1)

    def wanted(algorithm: Algorithm) -> list[tuple[str, str, str, int]]:
        op = "avg" if algorithm.collective in REDUCING else "sum"
        return [(op, "float32", "native", count) for count in sizes]

    jobs = fresh(world, wanted)
    run_jobs(world, jobs, f"odd-{world}")
    for job in jobs:
        job.check()


@pytest.mark.parametrize("world", [2, 3, 7])
def test_unequal_blocks_of_a_sum_on_every_wire(world: int) -> None:
    """Some blocks empty; every algorithm of reduce_scatter, against the oracle's bits."""
    rng = np.random.default_rng()
    sizes = [int(n) for n in rng.choice([0, 1, 5000, 9000], world)]
    sizes[world // 2] = 7777  # the largest block decides on the wire format
    inputs = tensors(rng, "float32", world, sum(sizes))
    results: dict[tuple[str, str, int], Array] = {}
    used = [
        (a.name, wire)
        for a in schedule.algorithms("reduce_scatter")
        for wire in codecs.WIRES
        if wire != "int8" or a.roundings(world) <= MOST_INT8_ROUNDINGS
    ]

    def on_rank(rank: int) -> None:
        with dpcomm.Communicator(
            rank,
            world,
            transport="inproc",
            name=f"unequal-{world}",
            wire="int8",
            wire_links="all",
            timeout=DEADLINE_S,
        ) as communicator:
            for algorithm, wire in used:
                results[algorithm, wire, rank] = communicator.reduce_scatter(
                    inputs[rank].copy(), "avg", counts=sizes, wire=wire, algorithm=algorithm
                )

    in_threads(world, on_rank)
    for algorithm, wire in used:
        wanted = execute(
            "reduce_scatter",
            algorithm,
            inputs,
            op="avg",
            wire=wire,
            geometry=GEOMETRY,
            counts=sizes,
        )
        for rank, want in enumerate(wanted):
            assert want is not None
            assert results[algorithm, wire, rank].tobytes() == want.tobytes(), (algorithm, wire)


@pytest.mark.parametrize("world", range(2, 10))
def test_wire_formats(world: int) -> None:
    def wanted(algorithm: Algorithm) -> list[tuple[str, str, str, int]]:
        if algorithm.collective not in REDUCING:
            return []
        wires = ["fp16", "bf16"]
        if algorithm.roundings(world) <= MOST_INT8_ROUNDINGS:
            wires.append("int8")
        ops = itertools.islice(itertools.cycle(["sum", "avg", "premul_sum"]), world, None)
        return [
            (next(ops), dtype, wire, LEAST_LOSSY_BYTES // 2 + 129 * world)
            for wire in wires
            for dtype in ("float32", "float16")
        ]

    jobs = fresh(world, wanted)
    run_jobs(world, jobs, f"wires-{world}")
    for job in jobs:
        job.check()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_dtype_and_operator(world: int) -> None:
    def wanted(algorithm: Algorithm) -> list[tuple[str, str, str, int]]:
        ops = codecs.OPS if algorithm.collective in REDUCING else ("sum",)
        return [
            (op, dtype, "native", 700 + world)
            for op in ops
            for dtype in NUMPY_DTYPES
            if codecs.is_supported(op, dtype)
        ]

    jobs = fresh(world, wanted)
    run_jobs(world, jobs, f"dtypes-{world}")
    for job in jobs:
        job.check()


def test_bfloat16() -> None:
    pytest.importorskip("torch")

    def wanted(algorithm: Algorithm) -> list[tuple[str, str, str, int]]:
        if algorithm.collective not in REDUCING:
            return [("sum", "bfloat16", "native", 1025)]
        native = [(op, "bfloat16", "native", 1025) for op in ("sum", "avg", "premul_sum", "max")]
        return [*native, *(("avg", "bfloat16", wire, 9000) for wire in ("fp16", "bf16"))]

    for world in (2, 5):
        jobs = fresh(world, wanted)
        run_jobs(world, jobs, f"bfloat16-{world}")
        for job in jobs:
            job.check()


@pytest.mark.parametrize("allowed", ["native", "fp16", "bf16", "int8"])
def test_auto_is_as_lossy_as_allowed_and_only_for_sums(allowed: str) -> None:
    """Laws 8 and 11: what `auto` gives has the bits of two-shot in the allowed format, or exact."""
    world, count = 3, 9000
    rng = np.random.default_rng()
    inputs = tensors(rng, "float32", world, count)
    results: dict[tuple[str, int], Array] = {}

    def on_rank(rank: int) -> None:
        with dpcomm.Communicator(
            rank,
            world,
            transport="inproc",
            name=f"auto-{allowed}",
            wire=allowed,
            wire_links="all",
            timeout=DEADLINE_S,
        ) as communicator:
            for op in ("sum", "max"):
                results[op, rank] = inputs[rank].copy()
                communicator.all_reduce(results[op, rank], op)
            results["broadcast", rank] = inputs[rank].copy()
            communicator.broadcast(results["broadcast", rank], 1)
            results["gather", rank] = communicator.all_gather(inputs[rank]).reshape(-1)

    in_threads(world, on_rank)
    wanted = {
        "sum": execute("all_reduce", "two_shot", inputs, wire=allowed, geometry=GEOMETRY)[0],
        "max": execute("all_reduce", "two_shot", inputs, op="max", geometry=GEOMETRY)[0],
        "broadcast": inputs[1],
        "gather": np.concatenate(inputs),
    }
    for (what, rank), got in results.items():
        want = wanted[what]
        assert want is not None
        assert got.tobytes() == want.tobytes(), f"{what} on rank {rank}"


@pytest.mark.parametrize("world", [2, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_direct_forms_on_the_native_wire_have_the_same_bits(world: int, dtype: str) -> None:
    """All that `auto` chooses from adds in the order of ranks and rounds once."""
    inputs = tensors(np.random.default_rng(), dtype, world, 96 * world)
    shape: dict[str, Any] = {"dtype": dtype, "geometry": GEOMETRY, "op": "avg"}
    one = execute("all_reduce", "one_shot", inputs, **shape)[0]
    two = execute("all_reduce", "two_shot", inputs, **shape)[0]
    root = execute("reduce", "direct", inputs, **shape)[0]
    blocks = execute("reduce_scatter", "direct", inputs, **shape)
    assert one is not None
    assert two is not None
    assert root is not None
    scattered = b"".join(block.tobytes() for block in blocks if block is not None)
    assert one.tobytes() == two.tobytes() == root.tobytes() == scattered
