"""The short way of Communicator's methods gives what the full one gives, errors included.

Whether a call took the short way shows in that no Python code of the method ran.
"""

from __future__ import annotations

import array as python_array
import gc
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from inproc_ranks import run_ranks

import dpcomm
from dpcomm import Communicator
from dpcomm.errors import PeerError, UsageError

METHODS = ["all_reduce", "reduce", "broadcast", "all_gather", "reduce_scatter", "barrier"]


@pytest.fixture
def alone() -> Any:
    with Communicator(0, 1) as made:
        yield made


def outcome(call: Callable[[], Any]) -> tuple[Any, str]:
    """What a call gives: the result, or the class and text (without addresses) of its error."""
    try:
        return call(), ""
    except Exception as error:
        return type(error), re.sub("0x[0-9a-f]+", "0x", str(error))


def is_short(name: str, call: Callable[[], Any]) -> tuple[bool, Any, str]:
    """Whether the call of a method ran none of its Python code, and its outcome."""
    seen: list[str] = []

    def look(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_name == name and "communicator.py" in code.co_filename:
            seen.append(name)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        result, text = outcome(call)
    finally:
        sys.setprofile(before)
    return not seen, result, text


def compare(
    name: str, communicator: Communicator, *given: Any, short: bool, **named: Any
) -> tuple[Any, str]:
    """Calls a method as a user does and in full; both have to end alike. Returns how."""
    full = getattr(Communicator, name).__wrapped__
    wanted, wanted_text = outcome(lambda: full(communicator, *given, **named))
    was_short, result, text = is_short(name, lambda: getattr(communicator, name)(*given, **named))
    if result is not TypeError:  # which comes before any Python code
        assert was_short is short, (name, given, named)
    assert text == wanted_text
    assert type(result) is type(wanted)
    if text:
        assert result is wanted
    for each in (*given, *named.values()):
        if wanted is each:
            assert result is each
    return result, text


# --- which arrays, and what comes of the others ---------------------------------------------------


class Sub(np.ndarray):
    pass


def read_only(made: np.ndarray) -> np.ndarray:
    made.flags.writeable = False
    return made


NUMPY: dict[str, tuple[Callable[[], Any], bool, str]] = {
    # name: (what makes it, takes the short way, the error)
    **{
        dtype: (lambda dtype=dtype: np.ones(3, dtype), True, "")
        for dtype in ["f4", "f8", "f2", "i1", "u1", "i2", "i4", "i8", "?", "longlong"]
    },
    "empty": (lambda: np.empty(0, "f4"), True, ""),
    "no elements, odd strides": (lambda: np.empty((4, 0, 3), "f4")[::2], True, ""),
    "no dimensions": (lambda: np.array(2.0, "f4"), True, ""),
    "two dimensions": (lambda: np.ones((3, 4), "f4"), True, ""),
    "a part": (lambda: np.ones(9, "f4")[2:5], True, ""),
    "one row": (lambda: np.ones((3, 4), "f4")[1:2], True, ""),
    "steps": (lambda: np.ones(9, "f4")[::2], False, "not C-contiguous"),
    "backwards": (lambda: np.ones(9, "f4")[::-1], False, "not C-contiguous"),
    "Fortran's order": (lambda: np.ones((3, 4), "f4", order="F"), False, "not C-contiguous"),
    "transposed": (lambda: np.ones((3, 4), "f4").T, False, "not C-contiguous"),
    "broadcast": (lambda: np.broadcast_to(np.ones(1, "f4"), (5,)), False, "not C-contiguous"),
    "read-only": (lambda: read_only(np.ones(3, "f4")), False, "read-only"),
    "another order of bytes": (lambda: np.ones(3, ">f4"), False, "is not supported"),
    "own order of bytes, said": (lambda: np.ones(3, "<f4"), True, ""),
    "unsigned": (lambda: np.ones(3, "u4"), False, "is not supported"),
    "complex": (lambda: np.ones(3, "c8"), False, "is not supported"),
    "long double": (lambda: np.ones(3, np.longdouble), False, "is not supported"),
    "records": (lambda: np.zeros(3, "f4,i4"), False, "is not supported"),
    "objects": (lambda: np.array([None]), False, ""),
    "text": (lambda: np.array(["a"]), False, ""),
    "times": (lambda: np.zeros(3, "M8[s]"), False, ""),
    "a subclass": (lambda: np.ones(3, "f4").view(Sub), False, "none"),
    "a matrix": (lambda: np.asmatrix(np.ones((2, 2), "f4")), False, "none"),
    "a mask": (lambda: np.ma.masked_array(np.ones(3, "f4")), False, "none"),
    "a scalar": (lambda: np.float32(1), False, "read-only"),
    "array.array": (lambda: python_array.array("f", [1, 2]), False, "none"),
    "bytearray": (lambda: bytearray(4), False, "none"),
    "bytes": (lambda: b"1234", False, "read-only"),
    "memoryview": (lambda: memoryview(np.ones(3, "f4")), False, "none"),
    "list": (lambda: [1.0], False, "is not an array"),
    "None": (lambda: None, False, "None is not an array"),
}


@pytest.mark.parametrize("name", NUMPY)
def test_arrays(alone: Communicator, name: str) -> None:
    make, short, error = NUMPY[name]
    _, text = compare("all_reduce", alone, make(), short=short)
    assert (error in text and text) or error in ("", "none")
    if short or error == "none":
        assert text == ""
    # As the result, the other one being a good one of the same size and dtype.
    given = make()
    if isinstance(given, np.ndarray):
        compare("all_reduce", alone, np.ones(given.shape, given.dtype), out=given, short=short)


def test_a_read_only_input_takes_the_short_way(alone: Communicator) -> None:
    out = np.full(3, np.nan, "f4")
    result, _ = compare("all_reduce", alone, read_only(np.ones(3, "f4")), out=out, short=True)
    assert result is out
    assert out.tolist() == [1, 1, 1]


def torch_cases(torch: Any) -> dict[str, tuple[Any, bool]]:
    class Own(torch.Tensor):
        pass

    ones = torch.ones
    dtypes = [
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int8",
        "uint8",
        "int16",
        "int32",
        "int64",
        "bool",
    ]
    return {
        **{dtype: (ones(3, dtype=getattr(torch, dtype)), True) for dtype in dtypes},
        "empty": (ones(0), True),
        "no dimensions": (torch.tensor(2.0), True),
        "a part": (ones(9)[2:5], True),
        "steps": (ones(9)[::2], False),
        "transposed": (ones(3, 4).T, False),
        "expanded": (ones(1).expand(4), False),
        "channels last": (ones(1, 2, 3, 4).to(memory_format=torch.channels_last), False),
        "wants a gradient": (ones(3, requires_grad=True), False),
        "has a history": (ones(3, requires_grad=True) * 2, False),
        "a parameter": (torch.nn.Parameter(ones(3)), False),
        "a frozen parameter": (torch.nn.Parameter(ones(3), requires_grad=False), False),
        "a subclass": (ones(3).as_subclass(Own), False),
        "complex": (ones(3, dtype=torch.complex64), False),
        "unsigned": (ones(3, dtype=torch.uint16), False),
        "meta": (torch.empty(3, device="meta"), False),
        "sparse": (ones(3).to_sparse(), False),
    }


def test_tensors(alone: Communicator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for name, (tensor, short) in torch_cases(torch).items():
        result, text = compare("all_reduce", alone, tensor, short=short)
        assert not short or (result is tensor and text == ""), name
        compare("broadcast", alone, tensor, short=short)
    with torch.inference_mode():
        compare("all_reduce", alone, torch.ones(3), short=True)
    with torch.no_grad():  # such a tensor's own library refuses to give it away all the same
        compare("all_reduce", alone, torch.ones(3, requires_grad=True), short=False)


def test_tensors_of_a_transform_take_the_full_way(alone: Communicator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    seen = []

    def look(tensor: Any) -> Any:
        assert type(tensor) is torch.Tensor
        seen.append(compare("all_reduce", alone, tensor, short=False))
        return tensor

    torch.func.vmap(look)(torch.ones(2, 3))
    assert len(seen) == 1
    assert seen[0][1] != ""


def test_both_libraries_in_one_call(alone: Communicator) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    out = torch.zeros(3)
    result, _ = compare("all_reduce", alone, np.arange(3, dtype="f4"), out=out, short=True)
    assert result is out
    assert out.tolist() == [0, 1, 2]


# --- which arguments ------------------------------------------------------------------------------


def test_arguments(alone: Communicator) -> None:
    def ones(count: int = 4, dtype: str = "f4") -> np.ndarray:
        return np.ones(count, dtype)

    a, out = ones(), ones()
    yes: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("all_reduce", (a,), {}),
        ("all_reduce", (a, "max"), {}),
        ("all_reduce", (a,), {"op": "avg"}),
        ("all_reduce", (a,), {"op": "premul_sum"}),
        ("all_reduce", (), {"op": "min", "out": out, "array": a}),
        ("all_reduce", (a,), {"out": None}),
        ("all_reduce", (a,), {"out": a}),
        ("reduce", (a,), {}),
        ("reduce", (a, 0, "max"), {}),
        ("reduce", (a,), {"root": 0, "op": "max", "out": out}),
        ("reduce", (a, 7), {}),  # no rank: the short way says so, as the full one does
        ("reduce", (a, -1), {}),
        ("broadcast", (a,), {}),
        ("broadcast", (a, 0), {}),
        ("broadcast", (a,), {"root": 3}),
        ("all_gather", (a,), {"out": out}),
        ("reduce_scatter", (a,), {"out": out}),
        ("reduce_scatter", (a, "max"), {"out": a}),
        ("barrier", (), {}),
        ("all_reduce", (ones(3, "?"), "band"), {}),
        ("all_reduce", (a, "band"), {}),  # not of float32
    ]
    for name, given, named in yes:
        compare(name, alone, *given, **named, short=True)
    whole = np.ones(10, "f4")
    no: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("all_reduce", (), {}),
        ("all_reduce", (a, "summ"), {}),
        ("all_reduce", (a, 3), {}),
        ("all_reduce", (a, None), {}),
        ("all_reduce", (a, "sum", a), {}),
        ("all_reduce", (a,), {"array": a}),
        ("all_reduce", (a,), {"root": 0}),
        ("all_reduce", (a,), {"nonsense": 0}),
        ("all_reduce", (a,), {"factor": 1.0}),
        ("all_reduce", (a,), {"wire": "native"}),
        ("all_reduce", (a,), {"wire": "nonsense"}),
        ("all_reduce", (a,), {"algorithm": "ring"}),
        ("all_reduce", (a,), {"timeout": 1.0}),
        ("all_reduce", (a,), {"timeout": -1.0}),
        ("all_reduce", (a,), {"stream": 0}),
        ("all_reduce", (a,), {"out": ones(3)}),
        ("all_reduce", (a,), {"out": ones(4, "i4")}),
        ("all_reduce", (a,), {"out": [1.0]}),
        ("reduce", (a, True), {}),
        ("reduce", (a, np.int64(0)), {}),
        ("reduce", (a, 1 << 40), {}),
        ("reduce", (a, None), {}),
        ("reduce", (a, "max"), {}),
        ("broadcast", (a,), {"op": "sum"}),
        ("broadcast", (a,), {"out": a}),
        ("all_gather", (a,), {"out": ones(5)}),
        ("all_gather", (a,), {"out": a, "counts": [4]}),
        ("reduce_scatter", (a,), {"out": ones(5)}),
        ("barrier", (1.0,), {}),
        ("barrier", (), {"timeout": None}),
    ]
    for name, given, named in no:
        compare(name, alone, *given, **named, short=False)
    for name in ("all_gather", "reduce_scatter"):  # which make an array of their own
        short, result, _ = is_short(name, lambda name=name: getattr(alone, name)(a))
        assert not short
        assert result is not a
    overlap = compare("all_reduce", alone, whole[:6], out=whole[2:8], short=True)
    assert overlap == (UsageError, "all_reduce: input and output overlap in part")
    op = "".join(["m", "ax"])  # a string of its own, not the one that is known
    assert is_short("all_reduce", lambda: alone.all_reduce(a, op))[1] is a
    work = alone.all_reduce(a, async_op=True)
    assert work.wait() is a


@pytest.mark.parametrize("world", [2, 3])
def test_results_of_several_ranks(world: int) -> None:
    total = sum(range(1, world + 1))

    def body(communicator: Communicator) -> None:
        rank = communicator.rank
        own = np.full(6, rank + 1, "f4")
        out = np.full(6, np.nan, "f4")

        def short(name: str, *given: Any, **named: Any) -> Any:
            was_short, result, text = is_short(
                name, lambda: getattr(communicator, name)(*given, **named)
            )
            assert text == ""
            assert was_short, name
            return result

        assert short("all_reduce", own, out=out) is out
        assert out.tolist() == [total] * 6
        assert own.tolist() == [rank + 1] * 6
        out[:] = np.nan
        # Elsewhere than at the root `out` is not looked at, and a read-only array will do.
        given = own if rank == 1 else read_only(own.copy())
        result = short("reduce", given, root=1, op="max", out=out if rank == 1 else "nothing")
        assert result is (out if rank == 1 else given)
        assert out.tolist() == ([world] * 6 if rank == 1 else pytest.approx([np.nan] * 6, nan_ok=1))
        moved = own.copy()
        assert short("broadcast", moved, world - 1) is moved
        assert moved.tolist() == [world] * 6
        gathered = np.full((world, 6), np.nan, "f4")
        assert short("all_gather", own, out=gathered) is gathered
        assert gathered.tolist() == [[r + 1] * 6 for r in range(world)]
        block = np.full(6, np.nan, "f4")
        assert short("reduce_scatter", gathered, "sum", out=block) is block
        assert block.tolist() == [world * (rank + 1)] * 6
        short("barrier")

    run_ranks(world, body)


def test_an_error_of_a_peer_comes_as_it_does_in_full() -> None:
    def body(communicator: Communicator) -> tuple[Any, str]:
        if communicator.rank == 1:
            communicator.abort("enough")
        _, result, text = is_short("all_reduce", lambda: communicator.all_reduce(np.ones(2, "f4")))
        record = dpcomm.flight_record(communicator)[-1]
        assert "enough" in record["error"]
        if communicator.rank == 1:  # it had failed before
            assert (record["state"], record["started_ns"]) == ("scheduled", None)
        return result, text

    for result, text in run_ranks(2, body):
        assert result is PeerError
        assert "enough" in text


# --- lives ----------------------------------------------------------------------------------------


def test_a_closed_communicator() -> None:
    communicator = Communicator(0, 1)
    communicator.close()
    for name in METHODS:
        given = () if name == "barrier" else (np.ones(2, "f4"),)
        named = {"out": np.ones(2, "f4")} if name in ("all_gather", "reduce_scatter") else {}
        result = compare(name, communicator, *given, **named, short=True)
        assert result == (UsageError, "the communicator is closed")


def test_a_forked_child(alone: Communicator) -> None:
    given = np.ones(2, "f4")
    child = os.fork()
    if child == 0:
        try:
            result = compare("all_reduce", alone, given, short=True)
            right = result[0] is UsageError and "made before a fork" in result[1]
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


def test_what_is_no_communicator() -> None:
    class Half(Communicator):
        def __init__(self) -> None:
            pass

    given = np.ones(2, "f4")
    for wrong in (Half(), object(), Communicator.__new__(Communicator)):
        with pytest.raises(AttributeError, match="_core"):
            Communicator.all_reduce(wrong, given)
    fake = Half()
    fake._core = object()  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="all_reduce"):
        fake.all_reduce(given)
    with pytest.raises(TypeError):
        Communicator.all_reduce()  # type: ignore[call-arg]


def test_subclasses_and_bound_methods() -> None:
    class Counting(Communicator):
        calls = 0

        def all_reduce(self, *given: Any, **named: Any) -> Any:
            self.calls += 1
            return super().all_reduce(*given, **named)

    given = np.ones(2, "f4")
    with Counting(0, 1) as made:
        assert made.all_reduce(given) is given
        assert made.calls == 1
        bound = made.barrier
        assert bound() is None
        assert bound.__self__ is made
        assert Communicator.all_reduce(made, given, op="max") is given


def test_methods_look_like_methods() -> None:
    for name in METHODS:
        method = getattr(Communicator, name)
        assert method.__name__ == name
        assert method.__qualname__ == f"Communicator.{name}"
        assert method.__module__ == "dpcomm.communicator"
        assert method.__doc__ == method.__wrapped__.__doc__
        assert inspect.signature(method) == inspect.signature(method.__wrapped__)
        assert inspect.isroutine(method)
    with pytest.raises(UsageError, match="no method named close"):
        dpcomm._core._with_short_call(Communicator.close)


def test_nothing_is_held(alone: Communicator) -> None:
    given, out = np.ones(2, "f4"), np.ones(2, "f4")
    small = np.ones(3, "f4")
    objects = [given, out, small, alone, alone._core, None, alone.__dict__]
    gc.collect()
    before = [sys.getrefcount(each) for each in objects]
    for _ in range(1000):
        alone.all_reduce(given, out=out)
        alone.broadcast(given, root=0)
        alone.barrier()
        for wrong in (
            lambda: alone.all_reduce(given, out=small),
            lambda: alone.reduce(given, 5),
            lambda: alone.all_reduce(given[::-1]),
        ):
            with pytest.raises(UsageError):
                wrong()
    gc.collect()
    after = [sys.getrefcount(each) for each in objects]
    assert all(abs(new - old) < 100 for new, old in zip(after, before, strict=True)), after
