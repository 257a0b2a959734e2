"""dpcomm.Communicator: arrays of every kind, errors that name their cause, handles, lives."""

from __future__ import annotations

import array
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inproc_ranks import run_ranks

import dpcomm
from dpcomm import Communicator
from dpcomm.errors import PeerError, TimeoutError, UsageError


@pytest.fixture
def alone() -> Any:
    """A communicator of one rank, for arguments that are refused before any byte is sent."""
    with Communicator(0, 1) as made:
        yield made


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    ["float32", "float64", "float16", "int8", "uint8", "int16", "int32", "int64", "bool"],
)
def test_numpy_arrays(dtype: str) -> None:
    def body(made: Communicator) -> Any:
        mine = np.ones((2, 3), dtype)
        assert made.all_reduce(mine) is mine
        return mine

    expected = np.full((2, 3), 1 if dtype == "bool" else 2, dtype)
    for result in run_ranks(2, body):
        assert result.dtype == expected.dtype
        assert (result == expected).all()


def test_array_memoryview_bytearray() -> None:
    def body(made: Communicator) -> Any:
        doubles, view, raw = (
            array.array("d", [1.5, 2]),
            memoryview(array.array("i", [3])),
            bytearray(b"\1"),
        )
        for each in (doubles, view, raw):
            assert made.all_reduce(each) is each
        return list(doubles), list(view), list(raw)

    assert run_ranks(2, body) == [([3, 4], [6], [2])] * 2


@pytest.mark.parametrize(
    "name", ["float32", "float64", "float16", "bfloat16", "int64", "bool", "uint8"]
)
def test_torch_tensors(name: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    dtype = getattr(torch, name)

    def body(made: Communicator) -> Any:
        mine = torch.ones(3, 2, dtype=dtype)
        assert made.all_reduce(mine, "max") is mine
        out = torch.zeros(2, 3, 2, dtype=dtype)
        made.all_gather(mine, out=out)
        part = torch.zeros(3, 2, dtype=dtype)
        made.reduce_scatter(out, "max", out=part)
        return mine, out, part

    for mine, out, part in run_ranks(2, body):
        assert bool((mine == 1).all() and (out == 1).all() and (part == 1).all())


def test_torch_bfloat16_adds_in_fp32() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def body(made: Communicator) -> Any:
        return made.all_reduce(torch.full((5,), 1.0 + made.rank / 128, dtype=torch.bfloat16), "avg")

    expected = torch.tensor([sum(1 + rank / 128 for rank in range(3)) / 3]).to(torch.bfloat16)
    for result in run_ranks(3, body):
        assert bool((result == expected).all())


def test_torch_empty_and_sliced_tensors(alone: Communicator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for shape in ((0,), (0, 3), (3, 0), (2, 0, 5)):
        assert alone.all_reduce(torch.empty(shape)).shape == shape
    alone.all_reduce(torch.ones(4, 4)[1:3])  # rows are contiguous
    with pytest.raises(UsageError, match="not C-contiguous"):
        alone.all_reduce(torch.ones(4, 4).t())


def test_ml_dtypes_bfloat16() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")

    def body(made: Communicator) -> Any:
        return made.all_reduce(np.full(5, 1.5, ml_dtypes.bfloat16))

    for result in run_ranks(2, body):
        assert (result == 3).all()


def test_a_read_only_array_can_be_an_input_only() -> None:
    def body(made: Communicator) -> Any:
        mine = np.ones(3, np.float32)
        mine.flags.writeable = False
        out = np.empty(3, np.float32)
        made.all_reduce(mine, out=out)
        with pytest.raises(UsageError, match="the array is read-only"):
            made.all_reduce(mine)
        with pytest.raises(UsageError, match="the array is read-only"):
            made.all_reduce(b"abc")
        return out.tolist()

    assert run_ranks(2, body) == [[2, 2, 2]] * 2


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (np.ones((4, 4), np.float32)[:, 1], "not C-contiguous"),
        (np.ones((4, 4), np.float32).T[:, :2], "not C-contiguous"),
        (np.ones(4, np.float32)[::-1], "not C-contiguous"),
        (np.ones(4, np.complex64), "dtype with buffer format 'Zf' is not supported"),
        (np.ones(4, np.uint16), "buffer format 'H' is not supported"),
        (np.ones(4, np.uint64), "is not supported"),
        (np.ones(4, ">f4"), "is not supported"),
        (np.ones(4, [("a", "f4"), ("b", "i4")]), "is not supported"),
        (np.array(["a"]), "is not supported"),
        ([1.0, 2.0], "'list' is not an array"),
        (1.0, "'float' is not an array"),
        ("text", "'str' is not an array"),
        (None, "None is not an array"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_array_is_refused(alone: Communicator, given: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        alone.all_reduce(given)


def test_a_refused_array_is_not_held(alone: Communicator) -> None:
    raw = bytearray(16)
    with pytest.raises(UsageError):
        alone.all_reduce(memoryview(raw).cast("f")[::2])
    raw.extend(b"more")  # a BufferError where a view of it were still held
    with pytest.raises(UsageError):
        alone.all_reduce(raw, out=bytearray(3))
    raw.extend(b"more")
    alone.all_reduce(raw)
    raw.extend(b"more")


def test_unaligned_and_overlapping(alone: Communicator) -> None:
    raw = bytearray(41)
    odd = np.frombuffer(raw, np.float32, 10, 1)
    odd[:] = 2
    alone.all_reduce(odd, "premul_sum", factor=1.5)
    assert (odd == 3).all()
    whole = np.zeros(12, np.float32)
    with pytest.raises(UsageError, match="input and output overlap in part"):
        alone.all_reduce(whole[:8], out=whole[4:])


# --- arguments ------------------------------------------------------------------------------------

ONES = np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda made: made.all_reduce(ONES.copy(), "add"), "op 'add' is not known; there are sum,"),
        (
            lambda made: made.all_reduce(ONES.copy(), "band"),
            "operator band is not defined for float32",
        ),
        (
            lambda made: made.all_reduce(np.ones(2, np.int32), "premul_sum"),
            "operator premul_sum is not defined for int32",
        ),
        (lambda made: made.all_reduce(np.ones(2, bool), "avg"), "avg is not defined for bool"),
        (
            lambda made: made.all_reduce(ONES.copy(), wire="fp8"),
            "wire 'fp8' is not known; there are native, fp16, bf16, int8",
        ),
        (
            lambda made: made.all_reduce(ONES.copy(), algorithm="rings"),
            "algorithm 'rings' is not known; there are auto, ring",
        ),
        (lambda made: made.all_reduce(ONES.copy(), timeout=0), "timeout has to be positive"),
        (lambda made: made.all_reduce(ONES.copy(), timeout=float("nan")), "timeout has to be"),
        (
            lambda made: made.all_reduce(ONES.copy(), out=np.ones(4, np.float64)),
            "all_reduce: input is float32, output is float64",
        ),
        (
            lambda made: made.all_reduce(ONES.copy(), out=np.ones(5, np.float32)),
            "input has 4 elements and output 5",
        ),
        (
            lambda made: made.broadcast(ONES.copy(), root=1),
            "broadcast: root 1 is not a rank of 0..0",
        ),
        (lambda made: made.broadcast(ONES.copy(), root=-1), "root -1 is not a rank"),
        (lambda made: made.reduce(ONES.copy(), root=3), "reduce: root 3 is not a rank"),
        (
            lambda made: made.all_gather(ONES, out=np.ones(5, np.float32)),
            "all_gather over 1 ranks: input has 4 elements and output 5",
        ),
        (
            lambda made: made.reduce_scatter(ONES, out=np.ones(3, np.float32)),
            "reduce_scatter over 1 ranks: input has 4 elements and output 3",
        ),
        (lambda made: made.all_gather(None), "all_gather: 'NoneType' is not an array"),
        (lambda made: made.all_gather(None, out=ONES.copy()), "all_gather: None is not an array"),
        (lambda made: made.reduce_scatter(np.float32(1)), "the first dimension of shape \\(\\)"),
        (lambda made: made.gather(ONES, 1), "gather: root 1 is not a rank of 0..0"),
        (
            lambda made: made.scatter(ONES, 3),
            "scatter: rank 0 is not the root and has to pass out=",
        ),
        (lambda made: made.gather(None), "gather: 'NoneType' is not an array"),
        (lambda made: made.all_gather(ONES, counts=[4, 0]), "all_gather: 2 counts for 1 ranks"),
        (lambda made: made.gather(ONES, counts=[-4]), "counts \\[-4\\] are no numbers of elements"),
        (
            lambda made: made.gather(ONES, counts=[3]),
            "input has 4 elements and output 3, but counts ask for 3 and 3",
        ),
        (lambda made: made.all_to_all(ONES, recv_counts=[4]), "all_to_all: recv_counts alone"),
        (
            lambda made: made.all_to_all(ONES, counts=[4], recv_counts=[3]),
            "all_to_all: rank 0 sends 4 elements to itself and receives 3",
        ),
    ],
)
def test_every_argument_error_names_its_cause(
    alone: Communicator, call: Callable[[Communicator], Any], text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        call(alone)
    fine = np.ones(1, np.float32)  # an argument that is refused harms nothing
    alone.all_reduce(fine)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((2, 2), {}, "rank 2 of 2 ranks makes no sense"),
        ((-1, 2), {}, "rank -1 of 2 ranks makes no sense"),
        ((0, 0), {}, "rank 0 of 0 ranks makes no sense"),
        ((0, 1), {"wire": "fp8"}, "wire 'fp8' is not known"),
        ((0, 1), {"wire_links": "some"}, "wire_links 'some' is neither network nor all"),
        ((0, 1), {"algorithm": "rings"}, "algorithm 'rings' is not known"),
        ((0, 1), {"transport": "ib"}, "transport 'ib' is not known; there are auto, shm, inproc"),
        ((0, 1), {"timeout": -1}, "timeout has to be positive"),
    ],
)
def test_constructor_errors(arguments: tuple[int, int], options: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Communicator(*arguments, init=None if arguments[1] == 1 else _Store(), **options)


class _Store:
    """A store in which nobody is."""

    def set(self, key: str, value: bytes) -> None: ...

    def get(self, key: str, timeout: float) -> bytes | None:
        return None


def test_missing_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="rank is not given and the environment has no RANK"):
        Communicator()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="no WORLD_SIZE"):
        Communicator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="no MASTER_ADDR and MASTER_PORT"):
        Communicator()
    monkeypatch.setenv("WORLD_SIZE", "1")
    with Communicator() as made:
        assert (made.rank, made.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WIRE", "fp8"),
        ("WIRE_LINKS", "some"),
        ("ALGO", "rings"),
        ("TRANSPORT", "ib"),
        ("TIMEOUT", "soon"),
        ("SLOT_BYTES", "4k"),
        ("FAULTS", "stall"),
        ("FAULTS", "explode=1"),
        ("SPIN_US", "x"),
        ("ISA", "sse9"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"DPCOMM_{name}", value)
    with pytest.raises(UsageError) as raised:
        Communicator(0, 1)
    assert value.partition("=")[0] in str(raised.value)


def test_int8_wants_few_roundings() -> None:
    def body(made: Communicator) -> None:
        with pytest.raises(UsageError, match=r"wire int8 needs .* ring over 3 ranks rounds"):
            made.all_reduce(np.ones(9000, np.float32), wire="int8", algorithm="ring")

    run_ranks(3, body, wire_links="all")


# --- results --------------------------------------------------------------------------------------


def test_default_outputs() -> None:
    def body(made: Communicator) -> Any:
        mine = np.full((2, 3), made.rank, np.int32)
        gathered = made.all_gather(mine)
        scattered = made.reduce_scatter(np.arange(12, dtype=np.float64).reshape(6, 2))
        listed = made.all_gather(array.array("f", [made.rank]))
        empty = made.reduce_scatter(np.empty((0, 4), np.float32))
        return gathered, scattered, listed, empty

    for rank, (gathered, scattered, listed, empty) in enumerate(run_ranks(3, body)):
        assert gathered.shape == (3, 2, 3)
        assert gathered.dtype == np.int32
        assert (gathered == np.arange(3)[:, None, None]).all()
        assert scattered.shape == (2, 2)
        assert (
            scattered.tolist()
            == (3 * np.arange(12.0).reshape(6, 2))[2 * rank : 2 * rank + 2].tolist()
        )
        assert listed.tolist() == [[0], [1], [2]]
        assert empty.shape == (0, 4)


def test_gather_scatter_and_all_to_all() -> None:
    def body(made: Communicator) -> Any:
        rank = made.rank
        gathered = made.gather(np.full((2, 3), rank, np.int32), root=1)
        blocks = np.arange(12.0).reshape(6, 2) if rank == 2 else None
        out = None if rank == 2 else np.empty((2, 2))
        scattered = made.scatter(blocks, root=2, out=out)
        turned = made.all_to_all(np.arange(3) + 10 * rank)
        return gathered, scattered, turned

    for rank, (gathered, scattered, turned) in enumerate(run_ranks(3, body)):
        wanted = np.arange(3)[:, None, None] if rank == 1 else rank
        assert gathered.shape == ((3, 2, 3) if rank == 1 else (2, 3))
        assert (gathered == wanted).all()
        assert scattered.tolist() == np.arange(12.0).reshape(6, 2)[2 * rank :][:2].tolist()
        assert turned.tolist() == [rank, 10 + rank, 20 + rank]


def test_blocks_of_unequal_size_make_arrays_of_one_dimension() -> None:
    sizes = [2, 0, 3]

    def body(made: Communicator) -> Any:
        rank = made.rank
        mine = np.full(sizes[rank], rank, np.int16)
        everybodys = made.all_gather(mine, counts=sizes)
        handle = made.gather(mine, root=0, counts=sizes, async_op=True)
        gathered = handle.wait()
        out = None if rank == 0 else np.empty(sizes[rank], np.int16)
        scattered = made.scatter(everybodys if rank == 0 else None, out=out, counts=sizes)
        added = made.reduce_scatter(everybodys, counts=sizes)
        # Rank r sends r elements to each, and gets s elements from rank s.
        turned = made.all_to_all(
            np.full(3 * rank, rank), counts=np.full(3, rank), recv_counts=range(3)
        )
        return everybodys, gathered, scattered, added, turned

    for rank, (everybodys, gathered, *blocks, turned) in enumerate(run_ranks(3, body)):
        assert everybodys.tolist() == [0, 0, 2, 2, 2]
        assert gathered.tolist() == ([0, 0, 2, 2, 2] if rank == 0 else [rank] * sizes[rank])
        assert [block.tolist() for block in blocks] == [
            [rank] * sizes[rank],
            [3 * rank] * sizes[rank],
        ]
        assert turned.tolist() == [1, 2, 2]


def test_own_blocks_in_place() -> None:
    """Of the larger array; another block of it overlaps, as anything does in an all_to_all."""

    def body(made: Communicator) -> Any:
        rank = made.rank
        whole = np.full(6, -1, np.int32)
        whole[2 * rank :][:2] = rank
        made.gather(whole[2 * rank :][:2], root=1, out=whole)
        given = np.arange(6) + 100 * rank
        made.scatter(given, root=1, out=given[2 * rank :][:2])
        return whole.tolist(), given.tolist()

    results = run_ranks(3, body)
    assert results[1][0] == [0, 0, 1, 1, 2, 2]
    assert results[0][1] == [100, 101, 2, 3, 4, 5]
    assert results[1][1] == [100, 101, 102, 103, 104, 105]
    assert results[2][1] == [200, 201, 202, 203, 104, 105]

    def wrong(made: Communicator) -> list[str]:
        whole = np.zeros(6, np.int32)
        texts = []
        for call in (
            lambda: made.all_to_all(whole, out=whole),
            lambda: made.all_to_all(whole[:4], out=whole[2:]),
            lambda: made.gather(whole[1:3], root=made.rank, out=whole[:4]),
            lambda: made.scatter(whole[:4], root=made.rank, out=whole[1:3]),
        ):
            with pytest.raises(UsageError) as caught:
                call()
            texts.append(str(caught.value))
        made.barrier()
        return texts

    for texts in run_ranks(2, wrong):
        assert texts[0] == "all_to_all: input and output overlap; it cannot work in place"
        assert all("overlap in part" in text for text in texts[1:])


class _OnDevice:
    """Says that it lies on a device; nobody looks into it."""

    def __init__(self, elems: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (elems,),
            "typestr": "<f4",
            "data": (1 << 12, False),
            "version": 3,
        }


def test_what_runs_on_the_cpu_only_says_so_and_sends_nothing() -> None:
    def body(made: Communicator) -> None:
        array, out, sizes = _OnDevice(4), _OnDevice(4), [1, 3]
        core = made._core
        for call in (
            lambda: core.gather(array, out, root=made.rank, counts=[4, 0][:: 1 - 2 * made.rank]),
            lambda: core.scatter(array, _OnDevice(2), root=made.rank),
            lambda: core.all_to_all(array, out),
            lambda: core.all_gather(_OnDevice(sizes[made.rank]), out, counts=sizes),
            lambda: core.reduce_scatter(array, _OnDevice(sizes[made.rank]), counts=sizes),
        ):
            if made.rank == 0:  # the others do not call it, and nobody waits
                with pytest.raises(UsageError, match="runs on the CPU only"):
                    call()
        made.barrier()
        assert made.stats()["operations"] == 1

    run_ranks(2, body)


def test_a_result_that_numpy_cannot_hold_needs_out(alone: Communicator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    with pytest.raises(UsageError, match="pass out="):
        alone.all_gather(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="is not a multiple of 2 ranks; pass out="):
        run_ranks(2, lambda made: made.reduce_scatter(np.ones(3, np.float32)))


def test_reduce_and_broadcast() -> None:
    def body(made: Communicator) -> Any:
        mine = np.full(3, made.rank + 1.0)
        result = made.reduce(mine, root=1)
        mine_after = mine.copy()
        out = np.full(3, -1.0)
        made.reduce(np.ones(3), root=0, out=out)
        word = np.array([made.rank * 10], np.int64)
        made.broadcast(word, root=2)
        made.barrier()
        return result.tolist(), mine_after.tolist(), out.tolist(), word.tolist()

    results = run_ranks(3, body)
    assert [each[1] for each in results] == [[1] * 3, [6] * 3, [3] * 3]
    assert [each[2] for each in results] == [[3] * 3, [-1] * 3, [-1] * 3]
    assert [each[3] for each in results] == [[20]] * 3


def test_stats_count() -> None:
    def body(made: Communicator) -> Any:
        before = made.stats()
        made.all_reduce(np.ones(1000, np.float32), algorithm="one_shot")
        made.barrier()
        return before, made.stats()

    for before, after in run_ranks(3, body):
        assert before.pop("collectives") == {}
        assert set(before.values()) == {0}
        assert after["operations"] == 2
        assert after["bytes"] == 4000
        assert after["wire_bytes"] == 2 * 4000  # to each of two others
        assert after["wait_ns"] >= 0


# --- messages between two ranks -------------------------------------------------------------------


def test_send_and_recv() -> None:
    def body(made: Communicator) -> Any:
        if made.rank > 0:
            array = np.full(5, made.rank, np.int16)
            array.flags.writeable = False
            assert made.send(array, 0, 3) is None
            return [made.stats()["messages"], made.stats()["bytes"]]
        got = np.zeros((3, 5), np.int16)
        work = made.recv(got[0], tag=3, async_op=True)
        sources = [work.wait(timeout=20), made.recv(got[1], tag=3)]
        assert work.source() == sources[0]
        return [sources, got.tolist(), made.stats()["messages"]]

    (sources, got, messages), *others = run_ranks(3, body)
    assert sorted(sources) == [1, 2]
    assert got == [[sources[0]] * 5, [sources[1]] * 5, [0] * 5]
    assert messages == 2
    assert others == [[1, 10], [1, 10]]


def test_arguments_of_messages() -> None:
    def body(made: Communicator) -> None:
        array = np.zeros(4)
        frozen = np.zeros(4)
        frozen.flags.writeable = False
        for call in (
            lambda: made.send(array, made.rank),
            lambda: made.send(array, 2),
            lambda: made.recv(array, -1),
            lambda: made.send(array, 1 - made.rank, -1),
            lambda: made.send(array, 1 - made.rank, 1 << 32),
            lambda: made.recv(frozen, 1 - made.rank),
            lambda: made.recv(np.zeros((4, 4)).T[:2], 1 - made.rank),
            lambda: made.send([1, 2], 1 - made.rank),
        ):
            with pytest.raises(UsageError):
                call()
        made.barrier()
        big = np.zeros(1 << 16)
        work = made.send(big, 1, async_op=True) if made.rank == 0 else None
        with pytest.raises(UsageError, match=r"rank 0 .*524288 bytes .*rank 1 .* 32 bytes"):
            work.wait() if work is not None else made.recv(array)
        with pytest.raises(UsageError, match="524288 bytes"):
            made.barrier()

    run_ranks(2, body)


# --- handles and lives ----------------------------------------------------------------------------


def test_work_returns_the_result() -> None:
    def body(made: Communicator) -> Any:
        mine = np.ones(1000, np.float32)
        work = made.all_reduce(mine, async_op=True)
        assert work.wait() is mine
        assert work.done()
        assert work.wait(timeout=1) is mine  # again
        gathered = made.all_gather(np.ones(2), async_op=True).wait()
        assert gathered.shape == (2, 2)
        return float(mine[0])

    assert run_ranks(2, body) == [2.0, 2.0]


def test_a_work_and_its_array_may_be_dropped() -> None:
    """The operation keeps what it needs, whatever the caller forgets."""

    def body(made: Communicator) -> Any:
        gone = []
        for number in range(20):
            mine = np.full(50_000, number, np.float32)
            gone.append(weakref.ref(mine))
            made.all_reduce(mine, async_op=True)
            del mine
        gc.collect()
        last = np.ones(1, np.float32)
        made.all_reduce(last)
        gc.collect()
        return float(last[0])

    assert run_ranks(3, body) == [3.0] * 3


def test_the_array_lives_as_long_as_the_operation() -> None:
    gate = threading.Event()

    def body(made: Communicator) -> Any:
        if made.rank == 1:
            gate.wait(20)
            made.all_reduce(np.ones(1000, np.float32))
            return None
        mine = np.ones(1000, np.float32)
        alive = weakref.ref(mine)
        work = made.all_reduce(mine, async_op=True)
        del mine
        gc.collect()
        assert alive() is not None
        gate.set()
        result = work.wait()
        assert float(result[0]) == 2
        del work, result
        gc.collect()
        made.close()
        assert alive() is None
        return None

    run_ranks(2, body)


def test_a_wait_with_a_limit_goes_on() -> None:
    gate = threading.Event()

    def body(made: Communicator) -> Any:
        mine = np.ones(10)
        if made.rank == 1:
            gate.wait(20)
            made.all_reduce(mine)
            return True
        work = made.all_reduce(mine, async_op=True)
        with pytest.raises(TimeoutError, match="was not complete"):
            work.wait(timeout=0.05)
        assert not work.done()
        gate.set()
        work.wait()
        return bool((mine == 2).all())

    assert run_ranks(2, body) == [True, True]


def test_threads_share_a_communicator() -> None:
    def body(made: Communicator) -> Any:
        sums: list[float] = []

        def work() -> None:
            for _ in range(20):
                sums.append(float(made.all_reduce(np.ones(100, np.float32))[7]))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sums

    assert run_ranks(2, body) == [[2.0] * 80] * 2


def test_a_closed_communicator() -> None:
    made = Communicator(0, 1)
    with made as entered:
        assert entered is made
        pending = made.all_reduce(np.ones(3), async_op=True)
        pending.wait()
    made.close()
    for call in (
        lambda: made.all_reduce(np.ones(3)),
        lambda: made.all_reduce(np.ones(3), async_op=True),
        lambda: made.barrier(),
    ):
        with pytest.raises(UsageError, match="the communicator is closed"):
            call()
    assert made.stats()["operations"] == 1
    made.abort()


def test_an_abort_ends_a_wait_with_its_reason() -> None:
    began = threading.Event()

    def body(made: Communicator) -> Any:
        if made.rank == 1:
            began.wait(20)
            made.abort("enough")
            return None
        made.all_reduce(np.ones(1), async_op=True)
        began.set()
        with pytest.raises(PeerError, match="rank 1: enough"):
            made.barrier()
        with pytest.raises(PeerError, match="rank 1: enough"):
            made.barrier()
        return None

    run_ranks(2, body)


def test_an_exception_leaves_the_context_and_closes() -> None:
    with pytest.raises(ZeroDivisionError), Communicator(0, 1) as made:
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="closed"):
        made.barrier()


def test_a_communicator_that_is_dropped_leaves_nothing(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def once(number: int) -> None:
        made = Communicator(0, 1, f"file://{tmp_path}/{number}", transport="shm")
        made.all_reduce(np.ones(10), async_op=True).wait()

    once(0)
    gc.collect()
    before, threads = descriptors(), threading.active_count()
    tasks = len(os.listdir("/proc/self/task"))
    for number in range(1, 6):
        once(number)
        gc.collect()
    assert descriptors() == before
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/task")) <= tasks


def test_the_module_gives_what_it_promises() -> None:
    assert dpcomm.Communicator is Communicator
    for name in dpcomm.__all__:
        assert getattr(dpcomm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = dpcomm.missing
