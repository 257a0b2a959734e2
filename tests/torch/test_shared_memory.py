"""Tensors and arrays in shared memory: dpcomm.empty, empty_array, is_shared, shared_memory."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

import dpcomm
from dpcomm import _core

MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """OpenMP's threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    before = _core.shared_bytes()
    yield
    gc.collect()
    assert _core.shared_bytes() == before


def in_child(body: Callable[[], None]) -> None:
    """Runs `body` in a forked process, which has to come to its end."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    ("size", "shape"),
    [((3, 5), (3, 5)), (((3, 5),), (3, 5)), (([7],), (7,)), ((), ()), ((torch.Size([2]),), (2,))],
)
def test_sizes(size: Any, shape: tuple[int, ...]) -> None:
    tensor = dpcomm.empty(*size)
    assert tensor.shape == shape
    assert tensor.dtype == torch.get_default_dtype()
    assert tensor.is_contiguous()
    assert dpcomm.is_shared(tensor)
    assert torch.equal(tensor, torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes(dtype: torch.dtype) -> None:
    assert dpcomm.empty(100, dtype=dtype).dtype == dtype


def test_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert dpcomm.empty(2).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_memory_goes_back_with_the_last_view() -> None:
    before = _core.shared_bytes()
    tensor = dpcomm.empty(4 * MIB, dtype=torch.uint8)
    assert _core.shared_bytes() == before + 4 * MIB
    view = tensor[5:9]
    del tensor
    assert dpcomm.is_shared(view)
    assert _core.shared_bytes() == before + 4 * MIB
    del view
    assert _core.shared_bytes() == before


def test_resized_tensors_stay() -> None:
    tensor = dpcomm.empty(10).fill_(2)
    tensor.resize_(3 * MIB)
    assert dpcomm.is_shared(tensor)
    assert tensor[:10].tolist() == [2] * 10


def test_what_is_not_shared() -> None:
    for other in (torch.ones(3), dpcomm.empty(0), np.ones(3), torch.ones(3, device="meta")):
        assert not dpcomm.is_shared(other)
    with pytest.raises(dpcomm.UsageError, match="neither a tensor"):
        dpcomm.is_shared([1])


def test_wrong_arguments() -> None:
    with pytest.raises(dpcomm.UsageError, match="MiB of memory"):
        dpcomm.empty(1 << 50)
    with pytest.raises(dpcomm.UsageError, match=r"no torch\.dtype"):
        dpcomm.empty(3, dtype=np.float32)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="negative dimension"):
        dpcomm.empty(-1)
    with pytest.raises(TypeError):
        dpcomm.empty("3")  # type: ignore[arg-type]
    with pytest.raises(dpcomm.UsageError, match="negative dimension"):
        dpcomm.empty_array((2, -1))
    with pytest.raises(dpcomm.UsageError, match="Python objects"):
        dpcomm.empty_array(3, object)
    with pytest.raises(dpcomm.UsageError, match="MiB of memory"):
        dpcomm.empty_array(1 << 50)


def test_arrays() -> None:
    before = _core.shared_bytes()
    array = dpcomm.empty_array((300, 7), np.int16)
    assert array.shape == (300, 7)
    assert array.dtype == np.int16
    assert array.flags.c_contiguous
    assert array.flags.writeable
    assert not array.any()
    assert dpcomm.is_shared(array)
    view = array[1:, 2]
    tensor = torch.from_numpy(array)
    assert dpcomm.is_shared(tensor)
    del array, tensor
    gc.collect()
    view[:] = 3
    assert _core.shared_bytes() > before
    del view
    gc.collect()
    assert _core.shared_bytes() == before
    assert dpcomm.empty_array(5).dtype == np.float32
    assert dpcomm.empty_array((0, 4)).shape == (0, 4)
    assert dpcomm.empty_array(()).shape == ()


def test_copies_are_of_values_and_private() -> None:
    tensor, array = dpcomm.empty(500).uniform_(), dpcomm.empty_array(500)
    array[:] = tensor.numpy()
    stored = io.BytesIO()
    torch.save(tensor, stored)
    stored.seek(0)
    for made in (pickle.loads(pickle.dumps(tensor)), copy.deepcopy(tensor), torch.load(stored)):
        assert torch.equal(made, tensor)
        assert not dpcomm.is_shared(made)
        made.zero_()
    for other in (pickle.loads(pickle.dumps(array)), copy.deepcopy(array)):
        assert np.array_equal(other, array)
        assert not dpcomm.is_shared(other)
        other[:] = 0
    assert tensor.sum() > 0
    assert array.sum() > 0


def receive(inbox: Any, outbox: Any) -> None:
    tensor = inbox.get(timeout=60)
    outbox.put(tensor.sum().item())
    tensor.fill_(2)
    outbox.put("written")
    inbox.get(timeout=60)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_sending_through_torch_multiprocessing(start: str) -> None:
    context = torch.multiprocessing.get_context(start)
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=receive, args=(inbox, outbox))
    process.start()
    tensor = dpcomm.empty(1000).fill_(1)
    inbox.put(tensor)
    assert outbox.get(timeout=60) == 1000
    assert outbox.get(timeout=60) == "written"
    assert tensor.tolist() == [2] * 1000  # one memory, as with every tensor that is sent
    assert not dpcomm.is_shared(tensor)  # torch's
    inbox.put(None)
    process.join(60)
    assert process.exitcode == 0


def test_forked_processes_see_the_same_memory() -> None:
    ours = dpcomm.empty(MIB).fill_(1)
    theirs = torch.ones(MIB).share_memory_()
    array = dpcomm.empty_array(10)

    def child() -> None:
        for tensor in (ours, theirs):
            assert tensor.sum() == MIB
            tensor[0] = 5
        array[3] = 5

    in_child(child)
    assert ours[0] == theirs[0] == array[3] == 5


def test_forked_processes_have_memory_of_their_own() -> None:
    ours = dpcomm.empty(MIB).fill_(1)
    kept = [dpcomm.empty(MIB).fill_(2), dpcomm.empty_array(MIB)]
    held = _core.shared_bytes()

    def child() -> None:
        assert not dpcomm.is_shared(ours)
        assert _core.shared_bytes() == 0
        kept.clear()
        gc.collect()
        own = dpcomm.empty(MIB)
        assert not own.any()
        own.fill_(9)
        assert dpcomm.is_shared(own)
        assert own.data_ptr() != ours.data_ptr()
        in_child(lambda: in_child(lambda: None if own.sum() == 9 * MIB else os._exit(3)))

    in_child(child)
    assert _core.shared_bytes() == held
    assert ours.sum() == MIB
    assert kept[0].sum() == 2 * MIB


def test_the_switch_is_of_a_thread_and_of_large_blocks() -> None:
    assert not dpcomm.is_shared(torch.empty(MIB))
    seen: list[bool] = []

    def look() -> None:
        seen.append(dpcomm.is_shared(torch.empty(MIB)))

    with dpcomm.shared_memory():
        large = torch.empty(MIB // 4)
        assert dpcomm.is_shared(large)
        assert not dpcomm.is_shared(torch.empty(MIB // 4 - 1))
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        with dpcomm.shared_memory():
            pass
        assert dpcomm.is_shared(torch.ones(MIB) + 1)
        grown = torch.empty(3)
        grown.resize_(MIB)
        assert dpcomm.is_shared(grown)
    assert seen == [False]
    assert not dpcomm.is_shared(torch.empty(MIB))
    assert not dpcomm.is_shared(torch.empty_like(large))
    with pytest.raises(ZeroDivisionError), dpcomm.shared_memory():
        raise ZeroDivisionError
    assert not dpcomm.is_shared(torch.empty(MIB))


def test_results_of_operators_in_shared_memory() -> None:
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Flatten())
    x = torch.randn(16, 3, 64, 64)
    wanted = net(x)
    with dpcomm.shared_memory():
        output = net(x)
        output.square().sum().backward()
    assert dpcomm.is_shared(output)
    assert torch.equal(output, wanted)


def test_profiler_sees_the_memory() -> None:
    with torch.profiler.profile(profile_memory=True) as profile:
        tensor = dpcomm.empty(MIB)
        del tensor
    sizes = [event.cpu_memory_usage for event in profile.events() if event.name == "[memory]"]
    assert sorted(sizes) == [-4 * MIB, 4 * MIB]
