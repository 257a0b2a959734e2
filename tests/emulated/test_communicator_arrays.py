"""dpcomm.Communicator over arrays on emulated devices: processes, streams, bits, errors.

The arrays are stand-ins for CuPy's; what is behind them is the plugin as it is for a device, on the
fake CUDA runtime.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulate
import numpy as np
import pytest
from emulate import Case, Operation, make_input

import dpcomm
from dpcomm.oracle import wire as codecs

HERE = Path(__file__).parent
LIMIT_S = 100.0  # of each scenario

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first one builds the plugin


class Ranks:
    """Runs scenarios of array_ranks.py."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self._environment, self._folder, self._runs = environment, folder, 0

    def __call__(
        self,
        scenario: str,
        world: int,
        variables: dict[str, str] | None = None,
        on_rank: int | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """What each rank returned, None for one that died; raises the first rank's error.

        `variables` are for all ranks, or for one.
        """
        self._runs += 1
        folder = self._folder / str(self._runs)
        (folder / "store").mkdir(parents=True)
        home = str(Path(dpcomm.__file__).parents[1])
        processes = []
        for rank in range(world):
            environment = {
                **self._environment,
                **(variables or {} if on_rank in (None, rank) else {}),
                "PYTHONPATH": home,
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "FOLDER": str(folder / "store"),
            }
            processes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        str(HERE / "array_ranks.py"),
                        scenario,
                        str(folder / str(rank)),
                        json.dumps(arguments),
                    ],
                    env=environment,
                    start_new_session=True,
                )
            )
        deadline = time.monotonic() + LIMIT_S
        try:
            for process in processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        results = []
        for rank in range(world):
            path = folder / str(rank)
            results.append(pickle.loads(path.read_bytes()) if path.exists() else None)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


@pytest.fixture
def ranks(emulated_cuda: dict[str, str], tmp_path: Path) -> Ranks:
    return Ranks(emulated_cuda, tmp_path)


def expected(words: dict[str, Any], world: int, seed: int) -> list[Any]:
    """What each rank has to hold. All of it goes in one round."""
    operation = Operation(**words)
    random = np.random.default_rng(seed)
    inputs = [make_input(operation, rank, world, random) for rank in range(world)]
    if operation.algorithm == "auto":
        two_shot = operation.collective == "all_reduce"
        operation = replace(operation, algorithm="two_shot" if two_shot else "direct")
    # As the library chooses it: a CTA for each 64 KiB.
    size = operation.count * codecs.tensor_dtype(operation.dtype).itemsize
    operation = replace(operation, ctas=max(1, -(-size // (64 << 10))))
    case = Case(world, (operation,), slots=4, slot_bytes=128 << 10)
    return emulate.expected(case, operation, inputs)


def same_bits(operation: dict[str, Any], got: Any, want: Any) -> bool:
    if operation["dtype"] in ("float32", "float16", "float64"):
        nan = np.isnan(got) & np.isnan(want)
        return bool((nan | (got.view(f"u{got.itemsize}") == want.view(f"u{want.itemsize}"))).all())
    if operation["dtype"] == "bfloat16":
        nan = np.isnan(codecs.load("bfloat16", got)) & np.isnan(codecs.load("bfloat16", want))
        return bool((nan | (got == want)).all())
    return bool((got == want).all())


def check(ranks: Ranks, world: int, operations: list[dict[str, Any]], kind: str) -> None:
    base = {"algorithm": "auto", "dtype": "float32", "op": "sum", "wire": "native"}
    operations = [{**base, **operation} for operation in operations]
    seed = int.from_bytes(os.urandom(3), "little")
    results = ranks("collectives", world, operations=operations, seed=seed, kind=kind)
    for number, operation in enumerate(operations):
        wanted = expected(operation, world, seed + number)
        for rank in range(world):
            if operation["collective"] == "reduce" and rank != operation.get("root", 0):
                continue
            got, want = results[rank][number], wanted[rank]
            what = f"seed {seed}, rank {rank}: {operation}"
            assert same_bits(operation, got, want), f"{what}\n{got}\n{want}"


COLLECTIVES = ("all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter")


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["dlpack", "interface"])
def test_every_collective(ranks: Ranks, world: int, kind: str) -> None:
    operations = [
        {
            "collective": collective,
            "count": count,
            "root": count % world,
            "input_offset": offset,
            "output_offset": offset,
            "in_place": collective == "broadcast",
        }
        for collective in COLLECTIVES
        for count, offset in ((0, 0), (1, 1), (1023, 0), (4099, 3))
    ]
    check(ranks, world, operations, kind)


def test_dtypes_and_operators(ranks: Ranks) -> None:
    operations = [
        {"collective": "all_reduce", "dtype": dtype, "op": op, "count": 777, "factor": 0.5}
        for dtype in ("float32", "float16", "bfloat16", "float64", "int32", "int64")
        for op in ("sum", "avg", "min", "max", "product")
    ]
    operations += [
        {"collective": "all_reduce", "dtype": dtype, "op": "premul_sum", "count": 77, "factor": 0.5}
        for dtype in ("float32", "bfloat16")
    ]
    operations += [
        {"collective": collective, "dtype": dtype, "count": 333, "in_place": gather == "broadcast"}
        for dtype in ("int8", "uint8", "int16", "bool", "bfloat16", "int64")
        for collective in ("broadcast", "all_gather")
        for gather in (collective,)
    ]
    check(ranks, 2, operations, "dlpack")


@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8"])
def test_lossy_wires(ranks: Ranks, wire: str) -> None:
    operations = [
        {
            "collective": collective,
            "algorithm": "two_shot" if collective == "all_reduce" else "direct",
            "dtype": dtype,
            "wire": wire,
            "count": 20011,
            "in_place": collective == "all_reduce" and dtype == "float32",
            "output_offset": 1,
            "values": "special" if wire == "fp16" else "mixed",
        }
        for collective in ("all_reduce", "reduce_scatter")
        for dtype in ("float32", "bfloat16")
    ]
    check(ranks, 2, operations, "interface")


@pytest.mark.parametrize("world", [2, 3])
def test_the_order_of_streams(ranks: Ranks, world: int) -> None:
    once = np.full(3000, sum(range(1, world + 1)), np.float32)
    for result in ranks("stream_order", world):
        assert result["took"] < 20  # nobody waited for the gate, which opens after a minute
        assert result["early"] is False
        assert (result["seen"] == once).all()
        assert (result["twice"] == once * world).all()


def test_arrays_live_as_long_as_the_device_needs_them(ranks: Ranks) -> None:
    for result in ranks("lifetime", 2):
        assert result["before"] == (0, [False, False])
        assert result["after"] == (2, [True, True])  # once as input, once as output


def test_devices_and_cpus_take_turns(ranks: Ranks) -> None:
    steps = 5
    for result in ranks("on_both", 3, steps=steps):
        for step in range(steps):
            on_device, here = result[2 * step], result[2 * step + 1]
            assert (on_device == 6 + 3 * step).all()
            assert (here == 3 + 3 * step).all()


def test_a_device_for_each_rank(ranks: Ranks) -> None:
    for rank, (values, text) in enumerate(ranks("devices", 3)):
        assert (values == 6).all()
        assert f"device {rank + 1}" in text
        assert f"device {rank}" in text


def test_graphs_are_replayed(ranks: Ranks) -> None:
    replays, world = 3, 2
    for result in ranks("captured", world, replays=replays):
        for number in range(replays):
            total = 1 + 2 * number
            assert (result[2 * number] == total).all()
            assert (result[2 * number + 1] == total * world).all()


@pytest.mark.parametrize("async_op", [False, True])
def test_an_absent_rank_is_named(ranks: Ranks, async_op: bool) -> None:
    results = ranks("absent", 2, timeout=3, async_op=async_op)
    text, texts = results[0]
    assert text.startswith("TimeoutError: ")
    for word in ("rank 1", "all_reduce"):
        assert word in text
    assert len(set(texts)) == 1  # a later call says the same
    assert len(texts) == 2
    assert results[1] == text


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({"count": 1000}, {"count": 1001}, ("1000", "1001")),
        ({"dtype": "float32"}, {"dtype": "int32"}, ("float32", "int32")),
        ({"op": "sum"}, {"op": "max"}, ("sum", "max")),
        ({}, {"collective": "broadcast"}, ("all_reduce", "broadcast")),
        ({"count": 100_000}, {"count": 100_001}, ("100000", "100001")),  # not by packets
        ({"count": 90_000, "op": "min"}, {"count": 90_000, "op": "max"}, ("min", "max")),
    ],
    ids=["count", "dtype", "op", "collective", "count of many", "op of many"],
)
def test_different_operations(
    ranks: Ranks, first: dict[str, Any], second: dict[str, Any], words: tuple[str, str]
) -> None:
    base = {"collective": "all_reduce", "dtype": "float32", "op": "sum", "count": 1000}
    results = ranks("disagree", 2, mine=[{**base, **first}, {**base, **second}])
    for result in results:
        assert result.startswith("UsageError: "), result
        for word in words:
            assert word in result
    assert results[0] == results[1]


def test_no_wait_is_quicker_than_the_news_that_ranks_disagree(ranks: Ranks) -> None:
    for result in ranks("disagree_at_once", 2, rounds=6):
        for text in result:
            assert text.startswith("UsageError: ranks disagree: "), result


def test_different_places(ranks: Ranks) -> None:
    for result in ranks("place_differs", 2):
        assert result != "nothing"


def test_a_rank_that_dies_is_named(ranks: Ranks) -> None:
    results = ranks("dies", 3)
    assert results[2] is None
    for result in results[:2]:
        assert result.startswith("PeerError: "), result
        assert "rank 2" in result


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("absence", [1.0, 5.0])
def test_waits_end(ranks: Ranks, how: str, absence: float) -> None:
    first, second = ranks("leaves", 2, how=how, absence=absence)
    assert first.startswith("PeerError: "), first
    assert second == "left"


@pytest.mark.parametrize("call", ["cudaEventRecord:6:4", "cudaStreamWaitEvent:5:4"])
def test_a_launch_that_fails_on_one_rank_ends_all(ranks: Ranks, call: str) -> None:
    first, second = ranks("fails_to_launch", 2, {"FAKE_CUDA_FAIL": call}, on_rank=0)
    assert first.startswith("InternalError: "), first
    assert second == first


def test_a_graph_that_is_on_its_way_when_its_communicator_is_closed(
    ranks: Ranks, tmp_path: Path
) -> None:
    report = tmp_path / "report"
    assert ranks("graph_outlives", 2, {"FAKE_CUDA_REPORT": str(report)}, rounds=2) == ["closed"] * 2
    for line in report.read_text().splitlines():
        assert json.loads(line)["misuse"] == []


@pytest.mark.parametrize("blocking", [False, True])
def test_the_first_operation_may_be_part_of_a_graph(ranks: Ranks, blocking: bool) -> None:
    for result in ranks("first_in_a_graph", 2, blocking=blocking):
        assert not isinstance(result, str), result
        assert (result == 3).all()


def test_no_rank_touches_a_device_that_is_not_its_own(ranks: Ranks, tmp_path: Path) -> None:
    report = tmp_path / "report"
    variables = {"FAKE_CUDA_REPORT": str(report), "DEVICE_FOR_EACH_RANK": "1"}
    ranks("stays_on_its_device", 3, variables)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted(line["initialised"] for line in lines) == [[0], [1], [2]]
