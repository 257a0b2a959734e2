"""What ends an operation on a device that cannot come to its end, and what the error says.

Planted here: a rank that is late, gone, or has called something else, with eager operations and
with graphs. Kernels, streams and memory are those of the fake CUDA runtime.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_memory import Runtime
from processes import Rank, launch, results
from stand_in_array import CUDA, DLPackArray

import dpcomm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COUNT = 5000


class Place:
    """A stream of a device, and an array that is there."""

    def __init__(self, device: int, count: int = COUNT) -> None:
        self.runtime = Runtime(device)
        self.stream = self.runtime.stream()
        self.count = count
        self.address = self.runtime.allocate(4 * count)
        self.array = DLPackArray(self.address, [count], "float32", device=(CUDA, device))
        self.fill()

    def fill(self) -> None:
        self.runtime.write(self.address, np.ones(self.count, np.float32))

    def values(self) -> set[float]:
        return set(self.runtime.read(self.address, self.count, np.float32).tolist())

    def reduce(self, comm: dpcomm.Communicator, **options: Any) -> Any:
        return comm.all_reduce(self.array, stream=self.stream, async_op=True, **options)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def graph_of(place: Place, comm: dpcomm.Communicator) -> int:
    """A graph of one operation by ring, that has run once."""
    place.reduce(comm).synchronize()
    place.runtime.begin_capture(place.stream)
    comm.all_reduce(place.array, algorithm="ring", stream=place.stream)
    graph = place.runtime.end_capture(place.stream)
    place.runtime.launch_graph(graph, place.stream)
    place.runtime.synchronize(place.stream)
    return graph


def scenario(rank: Rank, kind: str) -> str:
    place = Place(rank.rank)
    comm = rank.communicator(timeout=4)
    first = rank.rank == 0
    if kind.startswith("graph"):
        graph = graph_of(place, comm)
        if not first:
            if kind == "graph_dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(8)
            return error_of(lambda: place.reduce(comm).synchronize())
        place.runtime.launch_graph(graph, place.stream)
        place.runtime.synchronize(place.stream)  # comes back: the kernel leaves
        return error_of(lambda: place.reduce(comm).synchronize())
    place.reduce(comm).synchronize()
    if kind == "busy" and not first:
        place.runtime.sleep(place.stream, 8)
    if kind == "wire" and not first:
        return error_of(lambda: place.reduce(comm, algorithm="two_shot", wire="fp16").synchronize())
    if kind == "absent" and not first:
        time.sleep(8)
    return error_of(lambda: place.reduce(comm, algorithm="two_shot").synchronize())


AT = r"\(pid \d+, host \S+\)"
OPERATION = r"all_reduce #\d+ \(5000 x float32, sum, \w+\)"
WAIT = rf"for rank 1 {AT}: CTA 0, lane 0, step \d+, message \d+ seen, \d+ wanted; "
WAITED = rf"TimeoutError: rank 0 {AT} waited 4 s in {OPERATION} {WAIT}rank 1 {AT} "


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("absent", rf"{WAITED}has not called it \(finished last: {OPERATION}\)"),
        ("busy", f"{WAITED}has called it, but its device is busy with what its stream does before"),
        ("graph_absent", f"{WAITED}has finished it"),  # once, and not again
        (
            "graph_dies",
            rf"PeerError: rank 1 {AT} died .*in {OPERATION} of a graph",
        ),
        ("wire", rf"UsageError: ranks disagree: .* called {OPERATION}, but .*, wire fp16\)(?s:.*)"),
    ],
)
def test_errors(emulated_cuda: dict[str, str], kind: str, text: str) -> None:
    may_die = (1,) if kind == "graph_dies" else ()
    said = [o.result for o in launch(scenario, 2, emulated_cuda, kind, may_die=may_die)]
    assert re.fullmatch(text, said[0]), said[0]
    assert said[1] in (said[0], None)


def recorded(rank: Rank, _: None) -> list[tuple[str, bool, bool, str]]:
    """Rank 1 takes part in the first of three operations that one stream has."""
    place = Place(rank.rank)
    comm = rank.communicator(timeout=30)
    place.reduce(comm, algorithm="ring").synchronize()
    if rank.rank == 1:
        time.sleep(4)
        return []
    place.reduce(comm, algorithm="ring", timeout=1)
    error_of(lambda: place.reduce(comm, algorithm="ring", timeout=1).synchronize())
    return [
        (
            entry["state"],
            entry["started_ns"] is not None,
            entry["completed_ns"] is not None,
            entry["error"] or "",
        )
        for entry in dpcomm.flight_record(comm)
        if entry["on_device"]
    ]


def test_the_flight_recorder_sees_how_far_operations_came(
    emulated_cuda: dict[str, str], tmp_path: Path
) -> None:
    variables = {**emulated_cuda, "DPCOMM_FLIGHT_RECORDER_DUMP": str(tmp_path / "flight")}
    first, second, third = results(recorded, 2, variables, None)[0]
    assert first == ("completed", True, True, "")
    assert second[:3] == ("started", True, False)
    assert third[:3] == ("scheduled", False, False)
    assert re.match(rf"rank 0 {AT} waited 1 s in all_reduce #2 ", second[3])
    assert third[3] == second[3]
    entries = pickle.loads((tmp_path / "flight0").read_bytes())["entries"]
    on_device = [entry for entry in entries if entry["process_group"][0].endswith("on device")]
    assert [entry["state"] for entry in on_device] == ["completed", "started", "scheduled"]


# --- ranks in one process -------------------------------------------------------------------------
def threads_of_one_process(rank: Rank, world: int) -> list[Any]:
    """Ranks as threads, two of them to a device: no cudaIpc, one address space."""
    found: list[Any] = [None] * world

    def run(number: int) -> None:
        place = Place(number // 2)
        with dpcomm.Communicator(number, world, transport="inproc", timeout=30) as comm:
            for algorithm in ("one_shot", "two_shot", "ring", "double_tree"):
                place.reduce(comm, algorithm=algorithm).synchronize()
            found[number] = place.values()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_ranks_are_threads(emulated_cuda: dict[str, str]) -> None:
    [outcome] = launch(threads_of_one_process, 1, emulated_cuda, 3)
    assert outcome.result == [{3.0**4}] * 3
    assert "cudaIpcOpenMemHandle" not in outcome.report
    assert '"misuse": []' in outcome.report


# --- the end --------------------------------------------------------------------------------------
def close_at_once(rank: Rank, late: bool) -> set[float]:
    """Closes while the operation is on its way; what it can still do, it does."""
    place = Place(rank.rank)
    comm = rank.communicator(timeout=30)
    place.reduce(comm).synchronize()
    place.fill()
    if late and rank.rank == 1:
        time.sleep(0.3)
    place.reduce(comm, algorithm="ring")
    comm.close()
    comm.close()
    place.runtime.synchronize()
    return place.values()


@pytest.mark.parametrize("late", [False, True])
def test_close_lets_operations_end(emulated_cuda: dict[str, str], late: bool) -> None:
    assert results(close_at_once, 2, emulated_cuda, late) == [{2.0}] * 2


def close_alone(rank: Rank, request: Any) -> Any:
    """Rank 0 closes in the middle of an operation that never ends; rank 1 comes later."""
    place = Place(rank.rank)
    comm = rank.communicator(timeout=30)
    place.reduce(comm).synchronize()
    if rank.rank == 1:
        time.sleep(5)
        return error_of(lambda: place.reduce(comm, algorithm="ring").synchronize())
    place.reduce(comm, algorithm="ring")
    begun = time.monotonic()
    comm.close()
    took = time.monotonic() - begun
    place.runtime.synchronize()
    return took


def test_close_does_not_wait_for_others(emulated_cuda: dict[str, str]) -> None:
    took, said = results(close_alone, 2, emulated_cuda)
    assert took < 4
    assert re.match(rf"PeerError: rank 0 {AT} has closed its communicator", said), said
