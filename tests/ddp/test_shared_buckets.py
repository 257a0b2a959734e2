"""DDP's gradient buckets in memory that ranks share: where they lie; nothing else changes."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import dpcomm
from dpcomm import _core

MIB = 1 << 20
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
    "view": {"gradient_as_bucket_view": True},
    "static view": {"static_graph": True, "gradient_as_bucket_view": True},
}


class Net(nn.Module):
    """Four layers of 1.4 MB, and one that unused() leaves out; 1 MiB and less a bucket is small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(600, 600) for _ in range(4))
        self.sometimes = nn.Linear(600, 600)
        self.small = nn.Linear(600, 3)

    def forward(self, x: torch.Tensor, all_layers: bool = True) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.small(self.sometimes(x) if all_layers else x)


class Places:
    """A hook that averages and notes which buckets are shared, by step."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.seen: list[tuple[int, bool]] = []

    def hook(self, _, bucket):  # type: ignore[no-untyped-def]  # torch reads annotations
        buffer = bucket.buffer()
        self.seen.append((buffer.numel() * buffer.itemsize, dpcomm.is_shared(buffer)))
        buffer.div_(dist.get_world_size(self.group))
        future = dist.all_reduce(buffer, group=self.group, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])


def wrapped(group: dist.ProcessGroup, mode: str) -> DistributedDataParallel:
    torch.manual_seed(5)
    return DistributedDataParallel(Net(), process_group=group, bucket_cap_mb=2, **MODES[mode])


def train(model: DistributedDataParallel, mode: str) -> list[torch.Tensor]:
    """Parameters after some steps, with one that is not synchronised."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs = torch.Generator().manual_seed(7 + dist.get_rank())
    for step in range(4):
        silent = step == 2 and "static" not in mode
        with model.no_sync() if silent else contextlib.nullcontext():
            x = torch.randn(4, 600, generator=inputs)
            model(x, mode != "unused" or step % 2 == 0).square().sum().backward()
        if not silent:
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Whatever is shared inside is given back at the end."""
    before = _core.shared_bytes()
    yield
    gc.collect()
    assert _core.shared_bytes() == before, (_core.shared_bytes(), before)


def modes(rank: int, world: int) -> None:
    before = torch.empty(4 * MIB)  # from torch's own allocator, freed at the end
    dist.init_process_group("dpcomm")
    shared = dist.group.WORLD
    assert shared is not None
    private = dist.new_group(backend="dpcomm", pg_options=dpcomm.Options(shared_buckets=False))
    other = dist.new_group(backend="gloo")
    for mode in MODES:
        results = []
        for group in (shared, private, other):
            with nothing_kept():
                model = wrapped(group, mode)
                places = Places(group)
                model.register_comm_hook(None, places.hook)
                results.append(train(model, mode))
                check_places(places.seen, group is shared)
                assert (_core.shared_bytes() > 5 * MIB) == (group is shared)
                del model
        for ours, without in zip(results[0], results[1], strict=True):
            assert torch.equal(ours, without), mode
        assert not dpcomm.is_shared(torch.empty(4 * MIB))  # off again
    without_hook(shared, private)
    again(shared)
    assert not dpcomm.is_shared(before)
    dist.destroy_process_group()


def check_places(seen: list[tuple[int, bool]], shares: bool) -> None:
    """Buckets of all steps, those after the rebuild too."""
    assert len(seen) >= 6
    assert sum(size >= MIB for size, _ in seen) >= 6
    for size, is_shared in seen:
        assert is_shared == (shares and size >= MIB), (size, is_shared)


def without_hook(shared: dist.ProcessGroup, private: dist.ProcessGroup) -> None:
    """As users train: the C++ way to the backend. Gradients are views of buckets."""
    with nothing_kept():
        results = []
        for group in (shared, private):
            model = wrapped(group, "view")
            results.append(train(model, "view"))
            model(torch.ones(1, 600)).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.numel() > MIB // 4]
            assert len(gradients) == 5
            assert all(dpcomm.is_shared(g) == (group is shared) for g in gradients)
            del model, gradients
        for ours, without in zip(*results, strict=True):
            assert torch.equal(ours, without)


def again(group: dist.ProcessGroup) -> None:
    """A copy of a model makes buckets of its own; those of the first live as long as gradients."""
    with nothing_kept():
        model = wrapped(group, "view")
        train(model, "view")
        twin = copy.deepcopy(model) if group is dist.group.WORLD else model
        before = _core.shared_bytes()
        train(twin, "view")
        assert _core.shared_bytes() >= before
        del twin
        model(torch.ones(1, 600)).sum().backward()
        gradient = model.module.layers[0].weight.grad
        assert gradient is not None
        wanted = gradient.clone()
        del model
        gc.collect()
        assert dpcomm.is_shared(gradient)
        assert torch.equal(gradient, wanted)
        del gradient


class Samples(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((600,), index / 32)


def forks(rank: int, world: int) -> None:
    """Children of every kind; the parent trains on as if there were none."""
    dist.init_process_group("dpcomm")
    results = []
    for with_children in (False, True):
        torch.manual_seed(5)
        model = DistributedDataParallel(Net(), gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        workers = 2 if with_children else 0
        loader = DataLoader(Samples(), 8, num_workers=workers, persistent_workers=workers > 0)
        for epoch in range(2):
            for step, batch in enumerate(loader):
                model(batch).square().sum().backward()
                if with_children and step == epoch:
                    child_uses_memory(model)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        results.append([p.detach().clone() for p in model.parameters()])
        del model, optimizer
        gc.collect()
        assert _core.shared_bytes() == 0
    for ours, alone in zip(*results, strict=True):
        assert torch.equal(ours, alone)
    dist.destroy_process_group()


def child_uses_memory(model: DistributedDataParallel) -> None:
    gradient = model.module.layers[0].weight.grad
    assert gradient is not None
    assert dpcomm.is_shared(gradient)
    total = gradient.sum()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert torch.equal(gradient.sum(), total)
            assert not dpcomm.is_shared(gradient)
            own = dpcomm.empty(MIB)
            assert own.abs().sum() == 0
            own.fill_(3)
            assert dpcomm.is_shared(own)
            with dpcomm.shared_memory():
                assert dpcomm.is_shared(torch.ones(MIB))
            del gradient
            for parameter in model.parameters():
                parameter.grad = None
            del model, own  # frees the parent's, too: without effect
            gc.collect()
            assert _core.shared_bytes() == 0
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(gradient.sum(), total)


def no_room(rank: int, world: int) -> None:
    """Where no shared memory can be had, DDP trains in ordinary memory."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, resource.RLIM_INFINITY))
    dist.init_process_group("dpcomm")
    assert dist.group.WORLD is not None
    model = wrapped(dist.group.WORLD, "plain")
    train(model, "plain")
    assert _core.shared_bytes() == 0
    with pytest.raises(dpcomm.UsageError, match="ulimit -f"):
        dpcomm.empty(3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert dpcomm.is_shared(dpcomm.empty(3))  # no bar for later
    dist.destroy_process_group()


def test_buckets_are_shared_and_nothing_else_changes() -> None:
    launch(modes, 2)


def test_buckets_are_shared_in_debug_mode() -> None:
    launch(debug, 2, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL", "DPCOMM_SHARED_BUCKETS": "1"})


def debug(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm")
    assert dist.group.WORLD is not None
    model = wrapped(dist.group.WORLD, "plain")
    assert _core.shared_bytes() > 5 * MIB
    train(model, "plain")
    dist.destroy_process_group()


def off(rank: int, world: int) -> None:
    dist.init_process_group("dpcomm")
    assert dist.group.WORLD is not None
    train(wrapped(dist.group.WORLD, "plain"), "plain")
    assert _core.shared_bytes() == 0
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options.shared_buckets is False
    assert copy.deepcopy(backend.options).shared_buckets is False
    dist.destroy_process_group()


def test_buckets_are_private_on_demand() -> None:
    launch(off, 1, env={"DPCOMM_SHARED_BUCKETS": "0"})


def test_forks() -> None:
    launch(forks, 2)


def test_no_room() -> None:
    ranks = launch(no_room, 2)
    for output in ranks.output:
        assert output.count("ulimit -f); ordinary memory is used instead") == 1, output
