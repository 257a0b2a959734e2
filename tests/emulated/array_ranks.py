"""One rank of test_communicator_arrays.py: python array_ranks.py SCENARIO RESULT [ARGUMENTS].

RANK, WORLD_SIZE and FOLDER say who it is; ARGUMENTS is JSON. What the scenario returns is pickled
into the file RESULT, or the error that it raises.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from device_memory import Pointer, Runtime
from emulate import Operation, make_input
from stand_in_array import DLPackArray, InterfaceArray

import dpcomm
from dpcomm import Communicator
from dpcomm.errors import UsageError
from dpcomm.oracle import wire as codecs

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
LIMIT_S = 60.0
runtime = Runtime(RANK if "DEVICE_FOR_EACH_RANK" in os.environ else 0)
_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_kept: list[Any] = []


def gate(stream: int) -> threading.Event:
    """What the stream gets from now on waits until the event is set (or a minute)."""
    opened = threading.Event()

    def wait(_: Any) -> None:
        opened.wait(60)

    function = _HostFunction(wait)
    _kept.append(function)
    runtime.call("cudaLaunchHostFunc", Pointer(stream), function, None)
    return opened


def pinned(count: int, dtype: Any) -> Any:
    """Zeros on the host that copies in the order of a stream do not wait for."""
    zeros = np.zeros(count, dtype)
    raw = (ctypes.c_char * zeros.nbytes).from_address(runtime.pinned(zeros))
    return np.frombuffer(raw, dtype, count)


class Tensor:
    """`count` elements on the current device, with poison before and behind.

    They begin `offset` elements behind an aligned place.
    """

    GUARD = 64  # bytes

    def __init__(self, count: int, dtype: Any, offset: int = 0) -> None:
        self.dtype, self.count = np.dtype(dtype), count
        self.size = count * self.dtype.itemsize
        self._before = self.GUARD + offset * self.dtype.itemsize
        self._whole = np.full(self._before + self.size + self.GUARD, 0xA5, np.uint8)
        self._base = runtime.allocate(self._whole.size)
        self.address = self._base + self._before
        runtime.write(self._base, self._whole)

    def put(self, values: Any) -> None:
        assert values.nbytes == self.size
        runtime.write(self.address, values)

    def get(self) -> Any:
        return runtime.read(self.address, self.count, self.dtype)

    def put_on(self, stream: int, values: Any) -> None:
        """In the order of the stream; the values are pinned, and live until then."""
        runtime.copy(self.address, values.ctypes.data, self.size, stream)

    def get_on(self, stream: int, into: Any) -> None:
        runtime.copy(into.ctypes.data, self.address, self.size, stream)

    def check_guards(self) -> None:
        seen = runtime.read(self._base, self._whole.size, np.uint8)
        assert (seen[: self._before] == 0xA5).all(), "written before the tensor"
        assert (seen[self._before + self.size :] == 0xA5).all(), "written behind the tensor"

    def free(self) -> None:
        runtime.free(self._base)


def connect(**options: Any) -> Communicator:
    options.setdefault("timeout", LIMIT_S)
    return Communicator(RANK, WORLD, init=f"file://{os.environ['FOLDER']}", **options)


def wrap(tensor: Tensor, dtype: str, kind: str, **changes: Any) -> Any:
    """The tensor as a library would hand it over."""
    shape = (tensor.count,)
    if kind == "dlpack":
        device = (2, runtime.device)
        return DLPackArray(tensor.address, shape, dtype, device=device, **changes)
    return InterfaceArray(tensor.address, shape, dtype, **changes)


def inputs_of(operation: Operation, seed: int) -> list[Any]:
    random = np.random.default_rng(seed)
    return [make_input(operation, rank, WORLD, random) for rank in range(WORLD)]


def sizes(operation: Operation) -> tuple[int, int]:
    """Elements of input and output."""
    scatter, gather = (operation.collective == name for name in ("reduce_scatter", "all_gather"))
    return operation.count * (WORLD if scatter else 1), operation.count * (WORLD if gather else 1)


class Call:
    """An operation on tensors of this rank, in place or not."""

    def __init__(self, operation: Operation, values: Any, kind: str) -> None:
        self.operation = operation
        dtype = codecs.tensor_dtype(operation.dtype)
        count_in, count_out = sizes(operation)
        self.values = values
        self.input = Tensor(count_in, dtype, operation.input_offset)
        self.output = self.input
        if not operation.in_place:
            self.output = Tensor(count_out, dtype, operation.output_offset)
        self.array = wrap(self.input, operation.dtype, kind)
        self.out = self.array
        if not operation.in_place:
            self.out = wrap(self.output, operation.dtype, kind)

    def run(self, comm: Communicator, **options: Any) -> Any:
        operation = self.operation
        chosen = {"algorithm": operation.algorithm, **options}
        reducing = {"op": operation.op, "wire": operation.wire, "factor": operation.factor}
        if operation.collective == "broadcast":
            return comm.broadcast(self.array, operation.root, **chosen)
        if operation.collective == "all_gather":
            return comm.all_gather(self.array, out=self.out, **chosen)
        if operation.collective == "reduce":
            return comm.reduce(self.array, operation.root, out=self.out, **reducing, **chosen)
        function = getattr(comm, operation.collective)
        return function(self.array, out=self.out, **reducing, **chosen)

    def finish(self) -> Any:
        """The output; everything else has to be as it was."""
        for tensor in {id(t): t for t in (self.input, self.output)}.values():
            tensor.check_guards()
        result = self.output.get()
        if self.output is not self.input and self.values is not None:
            assert (self.input.get().view(np.uint8) == self.values.view(np.uint8)).all()
        for tensor in {id(t): t for t in (self.input, self.output)}.values():
            tensor.free()
        return result


def collectives(operations: list[dict[str, Any]], seed: int, kind: str) -> list[Any]:
    """Runs the operations one after the other on one stream; the outputs of this rank."""
    stream = runtime.stream()
    with connect(wire="int8", wire_links="all") as comm:
        calls = []
        for number, words in enumerate(operations):
            operation = Operation(**words)
            values = inputs_of(operation, seed + number)[RANK]
            call = Call(operation, values, kind)
            if values is not None:
                call.input.put(values)
            returned = call.run(comm, stream=stream)
            has_output = operation.collective != "reduce" or operation.root == RANK
            assert returned is (call.out if has_output else call.array)
            calls.append(call)
        comm.synchronize()
        runtime.synchronize(stream)
        return [call.finish() for call in calls]


def stream_order() -> dict[str, Any]:
    """The input comes to the caller's stream late; the host waits for nothing."""
    mine, other = runtime.stream(), runtime.stream()
    comm = connect()
    dtype, count = np.dtype(np.float32), 3000
    first, second = (Tensor(count, dtype) for _ in range(2))
    ready = wrap(first, "float32", "dlpack")
    comm.all_reduce(ready, stream=mine)  # connects the devices
    comm.synchronize()
    values, seen, twice = (pinned(count, dtype) for _ in range(3))
    values[:] = RANK + 1
    opened = gate(mine)
    begin = time.monotonic()
    first.put_on(mine, values)
    comm.all_reduce(wrap(first, "float32", "interface", stream=mine))  # the array's own stream
    first.get_on(mine, seen)
    work = comm.all_reduce(ready, out=wrap(second, "float32", "dlpack"), async_op=True, stream=mine)
    work.wait(stream=other)
    second.get_on(other, twice)
    took = time.monotonic() - begin
    done_early = work.done()
    opened.set()
    runtime.synchronize(other)
    runtime.synchronize(mine)
    assert work.done()
    assert work.synchronize(timeout=LIMIT_S) is not None
    comm.close()
    return {"took": took, "early": done_early, "seen": seen.copy(), "twice": twice.copy()}


def lifetime() -> dict[str, Any]:
    """Arrays live until the device is through with them, and no longer."""
    stream = runtime.stream()
    with connect() as comm:
        tensors = [Tensor(100, np.float32) for _ in range(3)]
        comm.all_reduce(wrap(tensors[0], "float32", "dlpack"), stream=stream)
        comm.synchronize()
        opened = gate(stream)
        exported = wrap(tensors[0], "float32", "dlpack")
        array = wrap(tensors[1], "float32", "interface")
        dropped = wrap(tensors[2], "float32", "interface")
        comm.all_reduce(exported, stream=stream)
        comm.all_reduce(array, stream=stream)
        comm.all_reduce(dropped, stream=stream, async_op=True)  # the handle goes at once
        gone = [weakref.ref(array), weakref.ref(dropped)]
        del array, dropped
        gc.collect()
        before = exported.released, [ref() is None for ref in gone]
        opened.set()
        comm.synchronize()
        gc.collect()
        after = exported.released, [ref() is None for ref in gone]
        return {"before": before, "after": after}


def on_both(steps: int) -> list[Any]:
    """Operations on the CPU and on the device take turns."""
    outputs: list[Any] = []
    with connect() as comm:
        tensor = Tensor(257, np.float32)
        array = wrap(tensor, "float32", "dlpack")
        for step in range(steps):
            here = np.full(1000, RANK + step, np.float32)
            tensor.put(np.full(257, RANK * 2 + step, np.float32))
            comm.all_reduce(array)
            comm.all_reduce(here)
            comm.barrier()
            outputs += [tensor.get(), here]
        comm.synchronize()
        recorded = [entry for entry in dpcomm.flight_record(comm) if entry["on_device"]]
        assert [entry["sequence"] for entry in recorded] == list(range(1, steps + 1))
        assert {entry["input_elems"] for entry in recorded} == {257}
        assert {entry["state"] for entry in recorded} == {"completed"}
        for entry in recorded:
            assert 0 < entry["created_ns"] <= entry["started_ns"] <= entry["completed_ns"]
        assert dpcomm.stats(comm).collectives["all_reduce"].operations == 2 * steps
    return outputs


def captured(replays: int) -> list[Any]:
    """Operations of several sizes become a graph, which is replayed between others."""
    stream = runtime.stream()
    outputs = []
    with connect() as comm:
        small, large = (Tensor(count, np.float32) for count in (100, 30000))
        arrays = [wrap(tensor, "float32", "dlpack") for tensor in (small, large)]
        comm.all_reduce(arrays[1], stream=stream)
        runtime.synchronize(stream)
        runtime.begin_capture(stream)
        for array in arrays:
            comm.all_reduce(array, stream=stream)
        comm.all_reduce(arrays[1], "max", stream=stream, async_op=True).wait()
        graph = runtime.end_capture(stream)
        for number in range(replays):
            for tensor in (small, large):
                tensor.put(np.full(tensor.count, RANK + number, np.float32))
            runtime.launch_graph(graph, stream)
            comm.all_reduce(arrays[1], stream=stream)
            runtime.synchronize(stream)
            outputs += [small.get(), large.get()]
        comm.synchronize()
    return outputs


def absent(timeout: float, async_op: bool) -> Any:
    """The last rank does not take part in the second operation; it stays."""
    comm = connect(timeout=timeout)
    array = wrap(Tensor(5000, np.float32), "float32", "dlpack")
    comm.all_reduce(array)
    comm.synchronize()
    if RANK == WORLD - 1:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            try:
                comm.synchronize()
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            time.sleep(0.05)
        return "nothing"
    begin = time.monotonic()
    try:
        work = comm.all_reduce(array, async_op=async_op)
        if async_op:
            work.synchronize()
        comm.synchronize()
    except Exception as error:
        assert time.monotonic() - begin < timeout + 20
        texts = [str(error)]
        try:
            comm.all_reduce(array)
        except Exception as later:
            texts.append(str(later))
        return [f"{type(error).__name__}: {error}", texts]
    return ["nothing", []]


def disagree(mine: list[dict[str, Any]]) -> str:
    """Ranks call different operations."""
    comm = connect()
    words = mine[RANK]
    tensor = Tensor(words["count"] * WORLD, codecs.tensor_dtype(words["dtype"]))
    tensor.count = words["count"]
    array = wrap(tensor, words["dtype"], "dlpack")
    try:
        if words["collective"] == "broadcast":
            comm.broadcast(array, 0)
        else:
            comm.all_reduce(array, words["op"])
        comm.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagree_at_once(rounds: int) -> list[str]:
    """Kernels that find out that ranks disagree end at once; so does the wait for them."""
    texts = []
    for number in range(rounds):
        comm = connect(name=f"round-{number}")
        array = wrap(Tensor(64, np.float32), "float32", "dlpack")
        comm.all_reduce(array, algorithm="two_shot")  # connects the devices
        comm.synchronize()
        try:
            work = comm.all_reduce(
                array, ("sum", "max")[RANK % 2], algorithm="two_shot", async_op=True
            )
            while not work.done():
                pass
            work.synchronize()
            texts.append("nothing")
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


def place_differs() -> str:
    """Rank 0 has its array on the CPU, the others on a device."""
    comm = connect(timeout=10)
    here = np.ones(10, np.float32)
    array: Any = here if RANK == 0 else wrap(Tensor(10, np.float32), "float32", "dlpack")
    try:
        comm.all_reduce(array)
        comm.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def dies() -> str:
    """The last rank dies while the others wait for it."""
    comm = connect(timeout=LIMIT_S)
    array = wrap(Tensor(5000, np.float32), "float32", "dlpack")
    comm.all_reduce(array)
    comm.synchronize()
    if RANK == WORLD - 1:
        os._exit(3)
    try:
        comm.all_reduce(array)
        comm.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def leaves(how: str, absence: float) -> str:
    """An operation that waits for an absent rank is ended by close() or abort()."""
    comm = connect(timeout=LIMIT_S)
    tensor = Tensor(5000, np.float32)
    array = wrap(tensor, "float32", "dlpack")
    comm.all_reduce(array)
    comm.synchronize()
    if RANK == WORLD - 1:
        time.sleep(absence)
        comm.close()
        return "left"
    work = comm.all_reduce(array, async_op=True)
    assert not work.done()
    end: Callable[[], None] = comm.close if how == "close" else lambda: comm.abort("enough")
    threading.Timer(0.3, end).start()
    try:
        work.synchronize(timeout=20)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "nothing"
    comm.close()
    assert work.done()
    tensor.get()  # the device works
    return text


def fails_to_launch() -> str:
    """A call of CUDA fails on rank 0, with the kernel already on its way."""
    comm = connect()
    array = wrap(Tensor(5000, np.float32), "float32", "dlpack")
    try:
        for _ in range(3):
            comm.all_reduce(array)
        comm.synchronize()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = "nothing"
    comm.close()
    return text


def first_in_a_graph(blocking: bool) -> Any:
    """The first operation of all connects the devices while a stream is captured."""
    stream = runtime.stream(0 if blocking else 1)
    with connect(timeout=20) as comm:
        tensor = Tensor(500, np.float32)
        array = wrap(tensor, "float32", "dlpack")
        tensor.put(np.full(500, RANK + 1, np.float32))
        runtime.begin_capture(stream)
        try:
            comm.all_reduce(array, stream=stream)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        graph = runtime.end_capture(stream)
        runtime.launch_graph(graph, stream)
        runtime.synchronize(stream)
        return tensor.get()


def graph_outlives(rounds: int) -> str:
    """A graph is on its way while its communicator is closed."""
    stream = runtime.stream()
    for number in range(rounds):
        comm = connect(name=f"graph-{number}")
        array = wrap(Tensor(20000, np.float32), "float32", "dlpack")
        comm.all_reduce(array, stream=stream)
        runtime.synchronize(stream)
        runtime.begin_capture(stream)
        comm.all_reduce(array, stream=stream)
        graph = runtime.end_capture(stream)
        opened = gate(stream)
        runtime.launch_graph(graph, stream)
        threading.Timer(2.0, opened.set).start()
        comm.close()
    runtime.synchronize()
    return "closed"


def stays_on_its_device() -> None:
    """Nothing of a rank whose device is not the first one touches the first one."""
    with connect() as comm:
        array = wrap(Tensor(1000, np.float32), "float32", "dlpack")
        for _ in range(3):
            comm.all_reduce(array)
            time.sleep(0.1)  # the watchdog looks
        comm.synchronize()


def devices() -> list[Any]:
    """Every rank has a device of its own, and every array its memory there."""
    runtime.call("cudaSetDevice", RANK)
    with connect() as comm:
        tensor = Tensor(1000, np.float32)
        tensor.put(np.full(1000, RANK + 1, np.float32))
        runtime.call("cudaSetDevice", 0)  # the caller's current device does not matter
        array: Any = DLPackArray(tensor.address, (1000,), device=(2, RANK))
        if RANK == 1:
            array = InterfaceArray(tensor.address, (1000,))  # does not say where it lies
        comm.all_reduce(array)
        comm.synchronize()
        result = tensor.get()
        current = ctypes.c_int()
        runtime.call("cudaGetDevice", ctypes.byref(current))
        assert current.value == 0  # and stays as it is
        elsewhere = DLPackArray(tensor.address, (1000,), device=(2, RANK + 1))
        try:
            comm.all_reduce(elsewhere)
        except UsageError as error:
            return [result, str(error)]
        return [result, "nothing"]


def main() -> None:
    scenario, target = sys.argv[1:3]
    arguments = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    outcome: Any
    try:
        outcome = globals()[scenario](**arguments)
    except BaseException as error:
        import traceback

        traceback.print_exc()
        outcome = error
    Path(target).write_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    main()
