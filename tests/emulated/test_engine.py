"""Collectives over arrays on emulated devices, from dpcomm.Communicator down to the kernels.

A process a device; the host's side of the library is what a machine with GPUs runs, linked against
the fake CUDA runtime. The bits have to be the oracle's.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import fake_runtime
import numpy as np
import pytest
import rows
from device_memory import Runtime
from emulate import REDUCING, Array, Case, Operation, differences, expected
from processes import Outcome, Rank, launch
from ptx.kernels import list_of
from stand_in_array import CUDA, DLPackArray

from dpcomm import _core
from dpcomm.oracle import wire as codecs
from dpcomm.schedule.plans import find

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

POISON = 0xE7
BYTES_PER_CTA = 64 << 10  # of an operation, before it takes one more


class Tensor:
    """Device memory with an array in it, `offset` elements behind an aligned place."""

    def __init__(self, runtime: Runtime, count: int, dtype: str, offset: int = 0) -> None:
        self.runtime, self.count, self.name = runtime, count, dtype
        self.dtype = codecs.tensor_dtype(dtype)
        self.size_bytes = count * self.dtype.itemsize
        self.base = runtime.allocate((count + offset) * self.dtype.itemsize)
        self.address = self.base + offset * self.dtype.itemsize

    def array(self, first: int = 0, count: int | None = None) -> DLPackArray:
        """As a library would hand it over."""
        shape = [self.count if count is None else count]
        address = self.address + first * self.dtype.itemsize
        return DLPackArray(address, shape, self.name, device=(CUDA, self.runtime.device))

    def write(self, values: Array) -> None:
        self.runtime.write(self.address, values)

    def read(self) -> Array:
        return self.runtime.read(self.address, self.count, self.dtype)


def counts(operation: Operation, world: int) -> tuple[int, int]:
    """Elements of input and output."""
    n = operation.count
    if operation.collective == "all_gather":
        return n, n * world
    if operation.collective == "reduce_scatter":
        return n * world, n
    return n, n


def give(
    comm: Any, operation: Operation, source: DLPackArray, target: DLPackArray, stream: int
) -> Any:
    """Calls the operation on `stream`."""
    name = operation.collective
    options: dict[str, Any] = {"algorithm": operation.algorithm, "stream": stream}
    if name == "broadcast":
        return comm.broadcast(target, operation.root, **options)
    if name in REDUCING:
        options |= {"op": operation.op, "wire": operation.wire}
        if operation.op == "premul_sum":
            options["factor"] = operation.factor
    if name == "reduce":
        options["root"] = operation.root
    return getattr(comm, name)(source, out=target, **options)


class Prepared:
    """The memory of one operation on one rank."""

    def __init__(self, runtime: Runtime, rank: Rank, operation: Operation, values: Any) -> None:
        self.runtime, self.operation, self.rank, self.values = runtime, operation, rank, values
        inputs, outputs = counts(operation, rank.world)
        self.target = Tensor(runtime, outputs, operation.dtype, operation.output_offset)
        self.source = self.target
        self.place = 0
        if operation.in_place:
            if operation.collective == "all_gather":
                self.place = rank.rank * operation.count
            elif operation.collective == "reduce_scatter":
                self.source = Tensor(runtime, inputs, operation.dtype, operation.input_offset)
                self.target = self.source
                self.place = rank.rank * operation.count
        elif operation.collective != "broadcast":
            self.source = Tensor(runtime, inputs, operation.dtype, operation.input_offset)

    def fill(self) -> None:
        """Poison in the output, the input in its place. Complete on return."""
        count = self.target.count
        poison = np.full(count * self.target.dtype.itemsize, POISON, np.uint8)
        self.target.write(poison.view(self.target.dtype))
        if self.values is None:
            return
        if self.source is self.target and self.operation.collective == "all_gather":
            size = self.target.dtype.itemsize
            self.runtime.write(self.target.address + self.place * size, self.values)
        else:
            self.source.write(self.values)

    def give(self, comm: Any, stream: int) -> Any:
        count = self.operation.count
        source, target = self.source.array(), self.target.array()
        if self.operation.in_place and self.operation.collective == "all_gather":
            source = self.source.array(self.place, count)
        if self.operation.in_place and self.operation.collective == "reduce_scatter":
            target = self.target.array(self.place, count)
        return give(comm, self.operation, source, target, stream)

    def result(self) -> Array | None:
        if self.operation.collective == "reduce" and self.rank.rank != self.operation.root:
            return None
        values = self.target.read()
        if self.operation.in_place and self.operation.collective == "reduce_scatter":
            return values[self.place : self.place + self.operation.count]
        return values


def run_all(rank: Rank, request: Any) -> Any:
    """All operations one after the other; the host waits only at the end."""
    operations, inputs, options = request
    runtime = Runtime(options.pop("device", rank.rank))
    stream = runtime.stream()
    with rank.communicator(wire_links="all", **options) as comm:
        prepared = [
            Prepared(runtime, rank, operation, values[rank.rank])
            for operation, values in zip(operations, inputs, strict=True)
        ]
        for each in prepared:
            each.fill()
        for each in prepared:
            each.give(comm, stream)
        comm.synchronize()
        runtime.synchronize(stream)
        return [each.result() for each in prepared], [wire_of(comm, o) for o in operations]


def wire_of(comm: Any, operation: Operation) -> str:
    """The wire format that it takes; small messages go natively."""
    settings = _core.Settings(operation.wire, operation.algorithm)
    op = operation.op if operation.collective in REDUCING else "sum"
    name, wire = comm._core.choice(
        operation.collective, operation.count, operation.dtype, op, settings
    )
    assert name == operation.algorithm
    return str(wire)


# --- what has to come out -------------------------------------------------------------------------
@dataclass
class Staging:
    """As the library tells in its log."""

    ctas: int
    slots: int
    slot_bytes: int

    @classmethod
    def told(cls, outcomes: Sequence[Outcome]) -> Staging:
        found = {
            re.search(r"(\d+) CTAs, (\d+) slots of (\d+) bytes", outcome.output)
            for outcome in outcomes
        }
        told = {match.groups() for match in found if match}
        assert len(told) == 1, "\n".join(outcome.output for outcome in outcomes)
        return cls(*map(int, told.pop()))

    def ctas_of(self, operation: Operation) -> int:
        """choose_ctas() of csrc/cuda/launch_plan.cc."""
        size = operation.count * codecs.tensor_dtype(operation.dtype).itemsize
        return max(1, min(self.ctas, -(-size // BYTES_PER_CTA)))


def wanted(
    staging: Staging, world: int, operation: Operation, inputs: Sequence[Array | None]
) -> list[Array | None]:
    exact = replace(operation, ctas=staging.ctas_of(operation))
    case = Case(world, (exact,), slots=staging.slots, slot_bytes=staging.slot_bytes)
    return expected(case, exact, inputs)


def problems_of(
    staging: Staging,
    operation: Operation,
    inputs: Sequence[Array | None],
    got: Sequence[Array | None],
) -> list[str]:
    """One line for each rank whose result is not the oracle's."""
    problems = []
    for rank, want in enumerate(wanted(staging, len(got), operation, inputs)):
        have = got[rank]
        if want is None or have is None:
            continue
        wrong = differences(operation, have, want)
        if wrong.size:
            first = int(wrong[0])
            problems.append(
                f"{operation}, rank {rank}: {wrong.size} of {want.size} differ, first "
                f"{first}: {have[first]!r}, not {want[first]!r}"
            )
    return problems


def hold(outcomes: Sequence[Outcome], operations: Sequence[Operation], inputs: Any) -> None:
    """`outcomes` are those of run_all()."""
    staging = Staging.told(outcomes)
    problems: list[str] = []
    for index, operation in enumerate(operations):
        got = [outcome.result[0][index] for outcome in outcomes]
        exact = replace(operation, wire=outcomes[0].result[1][index])
        problems += problems_of(staging, exact, inputs[index], got)
    assert not problems, f"{len(problems)}:\n" + "\n".join(problems[:10])


def used_well(outcomes: Sequence[Outcome]) -> None:
    """No misuse of the runtime, and no peer's memory is mapped any more."""
    for outcome in outcomes:
        report = json.loads(outcome.report)
        assert report["misuse"] == [], outcome.report
        assert "peer" not in [entry["kind"] for entry in report["memory"]], outcome.report


def draw_operations(world: int, seed: int) -> list[Operation]:
    """Each schedule, and packets, a few times; sizes vary from call to call."""
    random = Random(seed)
    drawn = []
    for collective, algorithm, _ in rows.KERNELS * 2:
        row: dict[str, Any] = {"kernel": (collective, algorithm, False)}
        while True:
            for name in ("wire", "dtype", "op", "in_place", "shifted", "values"):
                row[name] = random.choice(rows.PARAMETERS[name])
            # On int8, algorithms of at most two roundings (csrc/comm/tuner.cc).
            many = find(algorithm, collective).roundings(world) > 2
            if rows.allowed(row) and not (row["wire"] == "int8" and many):
                break
        off = {"no": (0, 0), "input": (1, 0), "output": (0, 1), "both": (1, 3)}[row["shifted"]]
        drawn.append(
            Operation(
                collective,
                algorithm,
                row["dtype"],
                row["op"],
                row["wire"],
                random.choice((1, 7, 600, 3001, 20_000, 40_001)),
                root=random.randrange(world),
                factor=0.37,
                in_place=row["in_place"],
                input_offset=off[0],
                output_offset=off[1],
                values=row["values"],
            )
        )
    random.shuffle(drawn)
    return drawn


def inputs_of(world: int, operations: Sequence[Operation], seed: int) -> list[list[Array | None]]:
    return Case(world, tuple(operations), data_seed=seed).inputs()


@pytest.fixture
def environment(emulated_cuda: dict[str, str]) -> dict[str, str]:
    return emulated_cuda | {"DPCOMM_DEBUG": "INFO"}


# --- results --------------------------------------------------------------------------------------
@pytest.mark.parametrize("world", [2, 3, 4])
def test_collectives_give_the_bits_of_the_oracle(environment: dict[str, str], world: int) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    operations = draw_operations(world, seed)
    inputs = inputs_of(world, operations, seed)
    variables = environment | {"FAKE_CUDA_SEED": str(seed), "FAKE_CUDA_JITTER_US": "500"}
    outcomes = launch(run_all, world, variables, (operations, inputs, {}))
    hold(outcomes, operations, inputs)
    used_well(outcomes)


def test_all_ranks_on_one_device(environment: dict[str, str]) -> None:
    operations = [Operation(count=5000), Operation("all_gather", "ring", count=900)]
    inputs = inputs_of(2, operations, 3)
    outcomes = launch(run_all, 2, environment, (operations, inputs, {"device": 1}))
    hold(outcomes, operations, inputs)


@pytest.mark.parametrize(("variables", "ctas"), [({"DPCOMM_MAX_CTAS": "2"}, 2), ({}, 4)])
def test_number_of_ctas(environment: dict[str, str], variables: dict[str, str], ctas: int) -> None:
    operations = [Operation(algorithm=name, count=150_000) for name in ("ring", "double_tree")]
    inputs = inputs_of(2, operations, 4)
    # Eight multiprocessors hold 16 blocks; four lanes of four CTAs are all there is room for.
    outcomes = launch(run_all, 2, environment | variables, (operations, inputs, {}))
    assert Staging.told(outcomes).ctas == ctas
    hold(outcomes, operations, inputs)


def one_after_the_other(rank: Rank, request: Any) -> Any:
    """Several communicators on one device, each closed with work that may still run."""
    runtime = Runtime(rank.rank)
    operation = Operation(algorithm="ring", count=4000)
    results = []
    for number in range(request):
        comm = rank.communicator(name=f"group {number}")
        prepared = Prepared(runtime, rank, operation, np.full(4000, number + 1.0, np.float32))
        prepared.fill()
        prepared.give(comm, 0)
        if number % 2:
            comm.synchronize()
        runtime.synchronize()
        results.append(float(prepared.result().sum()))
        runtime.free(prepared.target.base)
        runtime.free(prepared.source.base)
        comm.close()
        del comm
    return results


def test_communicators_do_not_pile_up(environment: dict[str, str]) -> None:
    number = 5
    outcomes = launch(one_after_the_other, 2, environment, number)
    for outcome in outcomes:
        assert outcome.result == [4000 * 2 * (n + 1) for n in range(number)]
        report = json.loads(outcome.report)
        # What a peer may write to is freed by the next communicator: that of the last one is left.
        assert len([e for e in report["memory"] if e["bytes"] > 1 << 20]) <= 2, outcome.report
        assert report["streams"] <= 2, outcome.report
        assert report["events"] <= 8, outcome.report
    used_well(outcomes)


def test_kernels_by_way_of_ptx(environment: dict[str, str]) -> None:
    """What nvcc made of host and device code, together: the kernels are those of its PTX."""
    few = list_of(["collective_f32_native", "collective_f32_fp16"])
    source = fake_runtime.CSRC / "cuda" / "kernels.cu"
    translated = fake_runtime.translated_kernels("libptx_kernels.so", source, [few])
    libraries = f"{environment['FAKE_CUDA_KERNELS']}:{translated}"  # the later one wins
    operations = [
        Operation(algorithm=algorithm, count=count, wire=wire)
        for algorithm in ("ring", "two_shot", "double_tree", "one_shot")
        for wire, count in (("native", 1001), ("fp16", 9000))
    ] + [Operation("all_gather", "ring", count=700)]
    inputs = inputs_of(2, operations, 6)
    variables = environment | {"FAKE_CUDA_KERNELS": libraries}
    outcomes = launch(run_all, 2, variables, (operations, inputs, {}))
    hold(outcomes, operations, inputs)
    for outcome in outcomes:
        launched = json.loads(outcome.report)["launched"]
        assert sum(launched.values()) == len(operations)
        assert {name.split(":")[0] for name in launched} == {"libptx_kernels.so"}, launched


# --- order ----------------------------------------------------------------------------------------
def in_stream_order(rank: Rank, request: Any) -> Any:
    """Tensors are filled late, and overwritten right after the call, on the caller's stream."""
    operations, inputs, flags = request
    runtime = Runtime(rank.rank)
    stream = 0 if flags is None else runtime.stream(flags)
    kept = []
    results = []
    with rank.communicator(wire_links="all") as comm:
        for operation, values in zip(operations, inputs, strict=True):
            tensor = Prepared(runtime, rank, operation, values[rank.rank])
            tensor.fill()
            size = tensor.source.size_bytes
            late = runtime.pinned(values[rank.rank])
            copy = runtime.pinned(np.zeros(tensor.target.size_bytes, np.uint8))
            runtime.fill(tensor.source.address, 0xEE, size, stream)
            runtime.sleep(stream, 0.05)
            runtime.copy(tensor.source.address, late, size, stream)
            tensor.give(comm, stream)
            runtime.copy(copy, tensor.target.address, tensor.target.size_bytes, stream)
            runtime.fill(tensor.source.address, 0xDD, size, stream)
            runtime.fill(tensor.target.address, 0xCC, tensor.target.size_bytes, stream)
            kept.append((copy, tensor))
        runtime.synchronize(stream)
        for copy, tensor in kept:
            results.append(runtime.host(copy, tensor.target.count, tensor.target.dtype))
        comm.synchronize()
        return results, [wire_of(comm, operation) for operation in operations]


@pytest.mark.parametrize("flags", [None, 0, 1], ids=["default", "blocking", "non-blocking"])
def test_order_of_the_callers_stream(environment: dict[str, str], flags: int | None) -> None:
    operations = [
        Operation(algorithm="ring", count=6001, wire="fp16"),
        Operation(algorithm="one_shot", count=1000),
        Operation("all_gather", "ring", count=700),
        Operation(algorithm="two_shot", count=3000, in_place=True),
    ]
    inputs = inputs_of(2, operations, 5)
    variables = environment | {"FAKE_CUDA_JITTER_US": "3000"}
    outcomes = launch(in_stream_order, 2, variables, (operations, inputs, flags))
    hold(outcomes, operations, inputs)


# --- graphs ---------------------------------------------------------------------------------------
def replay(rank: Rank, request: Any) -> Any:
    """A graph of all operations, launched once for each set of inputs, with others in between."""
    operations, sets, between = request
    runtime = Runtime(rank.rank)
    stream = runtime.stream()
    with rank.communicator(wire_links="all") as comm:
        eager = Prepared(runtime, rank, between, sets[0][-1][rank.rank])
        eager.fill()
        eager.give(comm, stream)  # the device is opened before a capture
        prepared = [Prepared(runtime, rank, operation, None) for operation in operations]
        runtime.synchronize(stream)
        runtime.begin_capture(stream)
        for each in prepared:
            each.give(comm, stream)
        graph = runtime.end_capture(stream)
        results = []
        for values in sets:
            for index, each in enumerate(prepared):
                each.values = values[index][rank.rank]
                each.fill()
            runtime.launch_graph(graph, stream)
            runtime.synchronize(stream)
            results.append([each.result() for each in prepared])
            eager.fill()
            eager.give(comm, stream)
            runtime.synchronize(stream)
            results[-1].append(eager.result())
        comm.synchronize()
        runtime.destroy_graph(graph)
    return results


@pytest.mark.parametrize("world", [2, 3])
def test_graphs(environment: dict[str, str], world: int) -> None:
    operations = [
        Operation(algorithm="ring", count=5001, wire="fp16"),
        Operation(algorithm="one_shot", count=801),
        Operation("reduce_scatter", "ring", count=333),
        Operation(algorithm="double_tree", count=9000, dtype="bfloat16"),
    ]
    between = Operation(algorithm="two_shot", count=777)
    sets = []
    for number in range(4):
        values = inputs_of(world, [*operations, between], number)
        values[-1] = sets[0][-1] if sets else values[-1]
        sets.append(values)
    outcomes = launch(replay, world, environment, (operations, sets, between))
    staging = Staging.told(outcomes)
    problems = []
    for number, values in enumerate(sets):
        for index, operation in enumerate([*operations, between]):
            got = [outcome.result[number][index] for outcome in outcomes]
            problems += problems_of(staging, operation, values[index], got)
    assert not problems, "\n".join(problems[:10])
    used_well(outcomes)


# --- failures -------------------------------------------------------------------------------------
def caught(body: Callable[[], object]) -> tuple[str, str, float]:
    """What a call raises, its text, and after how many seconds."""
    start = time.monotonic()
    try:
        body()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def alone(rank: Rank, request: Any) -> Any:
    """Rank 1 leaves the others alone with an operation, in one of several ways."""
    how = request
    runtime = Runtime(rank.rank)
    stream = runtime.stream()
    timeout = 6 if how == "late" else 60
    comm = rank.communicator(timeout=timeout)
    operation = Operation(algorithm="ring", count=9000)
    prepared = Prepared(runtime, rank, operation, np.ones(9000, np.float32))
    prepared.fill()
    prepared.give(comm, stream)
    comm.synchronize()
    if rank.rank == 1:
        if how == "dies":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "aborts":
            time.sleep(1)
            comm.abort("enough")
        if how == "differs":
            operation = replace(operation, count=9001)
            Prepared(runtime, rank, operation, None).give(comm, stream)
            return caught(comm.synchronize)
        if how == "late":
            time.sleep(14)
        return None
    prepared.fill()
    prepared.give(comm, stream)
    answer = caught(comm.synchronize)
    runtime.synchronize(stream)  # the kernel has left
    poisoned = prepared.target.read()
    after = caught(lambda: prepared.give(comm, stream))
    comm.close()
    return answer, after, poisoned.size


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("dies", "PeerError", "rank 1"),
        ("aborts", "PeerError", "enough"),
        ("late", "TimeoutError", "rank 1"),
    ],
)
def test_a_rank_that_does_not_come(
    environment: dict[str, str], how: str, error: str, text: str
) -> None:
    outcomes = launch(alone, 3, environment, how, may_die=(1,))
    for rank in (0, 2):
        (kind, message, seconds), (again, _, _), _ = outcomes[rank].result
        print(message)
        assert kind == error, message
        assert text in message
        assert seconds < 30
        assert again == error


def test_ranks_that_call_different_operations(environment: dict[str, str]) -> None:
    outcomes = launch(alone, 2, environment, "differs")
    kind, message, _ = outcomes[0].result[0]
    print(message)
    assert kind == "UsageError"
    assert "9000" in message
    assert "9001" in message
    kind, message, _ = outcomes[1].result
    assert kind == "UsageError"


def start_fails(rank: Rank, request: Any) -> Any:
    """A device that cannot be opened on one rank; the CPU works on."""
    call = request
    if rank.rank == 1:
        os.environ["FAKE_CUDA_FAIL"] = call
    runtime = Runtime(rank.rank)
    with rank.communicator(timeout=30) as comm:
        prepared = Prepared(runtime, rank, Operation(count=100), np.ones(100, np.float32))
        answer = caught(lambda: prepared.give(comm, 0))
        array = np.full(50, rank.rank + 1.0, np.float32)
        comm.all_reduce(array)
        return answer, array.tolist()


@pytest.mark.parametrize(
    "call", ["cudaMalloc:3:2", "cudaIpcOpenMemHandle:1:1", "cudaHostAlloc:1:2"]
)
def test_a_device_that_cannot_be_opened(environment: dict[str, str], call: str) -> None:
    outcomes = launch(start_fails, 3, environment, call)
    for rank, outcome in enumerate(outcomes):
        (kind, message, _), array = outcome.result
        print(message)
        assert kind == "UsageError"
        assert rank == 1 or "rank 1" in message
        assert array == [6.0] * 50
    used_well(outcomes)
