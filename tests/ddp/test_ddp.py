"""DistributedDataParallel on dpcomm: the parameters that gloo gives, in every mode of DDP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from digits import digits
from harness import launch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import dpcomm
import dpcomm.backend

STEPS = 4
Parameters = dict[str, torch.Tensor]


class Net(nn.Module):
    """A small convolutional network with BatchNorm and a branch that some steps leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)
        )
        self.hidden = nn.Linear(8 * 16, 128)
        self.extra = nn.Linear(128, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor, extra: bool = True) -> torch.Tensor:
        x = self.hidden(self.features(x).flatten(1)).relu()
        return self.head(self.extra(x).relu() + x if extra else x)


def train(
    group: dist.ProcessGroup | None,
    data: tuple[torch.Tensor, torch.Tensor],
    *,
    hook: Callable[[DistributedDataParallel, Any], None] | None = None,
    unused: bool = False,
    no_sync: bool = False,
    seed: int = 0,
    **kw: Any,
) -> Parameters:
    """Parameters and buffers after a few steps; each rank has its own start and its own data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed + 100 * rank)  # DDP has to give all ranks rank 0's start
    model = DistributedDataParallel(Net(), process_group=group, **kw)
    if hook is not None:
        hook(model, group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels = data
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    for step in range(STEPS):
        batch = order[(step * world + rank) * 16 :][:16]
        accumulate = no_sync and step % 2 == 0
        with model.no_sync() if accumulate else contextlib.nullcontext():
            output = model(images[batch], extra=not (unused and step % 2))
            nn.functional.cross_entropy(output, labels[batch]).backward()
        if not accumulate:
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def equal_on_all_ranks(parameters: Parameters) -> bool:
    """Parameters (not BatchNorm's averages of the last step) have the same bits everywhere."""
    for name, value in parameters.items():
        if "running" in name or "num_batches" in name:
            continue
        copies = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(copies, value)
        if not all(torch.equal(copy, value) for copy in copies):
            return False
    return True


def differences(mine: Parameters, theirs: Parameters) -> dict[str, float]:
    assert mine.keys() == theirs.keys()
    return {
        name: float((mine[name].double() - theirs[name].double()).abs().max())
        for name in mine
        if not torch.equal(mine[name], theirs[name])
    }


def fp16(model: DistributedDataParallel, group: Any) -> None:
    model.register_comm_hook(group, default_hooks.fp16_compress_hook)


def bf16(model: DistributedDataParallel, group: Any) -> None:
    # torch refuses this hook by its name where there is no GPU.
    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return default_hooks.bf16_compress_hook(state, bucket)

    # This file's annotations are texts, and torch looks at them.
    hook.__annotations__ = {
        "bucket": dist.GradBucket,
        "return": torch.futures.Future[torch.Tensor],
    }
    model.register_comm_hook(group, hook)


def power_sgd(model: DistributedDataParallel, group: Any) -> None:
    state = powerSGD_hook.PowerSGDState(
        group, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def half_power_sgd(model: DistributedDataParallel, group: Any) -> None:
    state = powerSGD_hook.PowerSGDState(
        group, matrix_approximation_rank=2, start_powerSGD_iter=2, min_compression_rate=1
    )
    hook = default_hooks.fp16_compress_wrapper(powerSGD_hook.powerSGD_hook)
    model.register_comm_hook(state, hook)


MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "small buckets": {"bucket_cap_mb": 0.02},
    "static_graph": {"static_graph": True},
    "find_unused_parameters": {"find_unused_parameters": True, "unused": True},
    "skip_all_reduce_unused_params": {
        "find_unused_parameters": True,
        "skip_all_reduce_unused_params": True,
        "unused": True,
    },
    "gradient_as_bucket_view": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.02},
    "no_sync": {"no_sync": True},
    "no_sync and bucket views": {
        "no_sync": True,
        "gradient_as_bucket_view": True,
    },
    "no broadcast of buffers": {"broadcast_buffers": False},
    "fp16_compress_hook": {"hook": fp16, "bucket_cap_mb": 0.02},
    "bf16_compress_hook": {"hook": bf16, "bucket_cap_mb": 0.02},
    # One bucket: with more, the order in which this hook's callbacks call differs between ranks.
    "PowerSGD": {"hook": power_sgd, "bucket_cap_mb": 100},
    "PowerSGD in fp16": {"hook": half_power_sgd, "bucket_cap_mb": 100},
}


def modes(rank: int, world: int) -> list[str]:
    """Every mode against gloo: to the bit for two ranks, close for more."""
    dist.init_process_group("dpcomm")
    gloo = dist.new_group(backend="gloo")
    data = digits()
    for name, mode in MODES.items():
        mine = train(None, data, **mode)
        theirs = train(gloo, data, **mode)
        assert equal_on_all_ranks(mine), name
        for parameter, difference in differences(mine, theirs).items():
            assert world > 2, (name, parameter, difference)
            assert difference < (5e-3 if "hook" in mode else 1e-5), (name, parameter, difference)
    before = dpcomm.backend.binding().stats(dist.group.WORLD._get_backend(torch.device("cpu")))
    assert before["operations"] > STEPS * len(MODES)
    dist.destroy_process_group()
    return list(MODES)


def lossy_wires(rank: int, world: int) -> dict[str, float]:
    """Training goes on under lossy wires; what DDP broadcasts is exact to the bit (law 8)."""
    dist.init_process_group("dpcomm")
    data = digits()
    exact = train(None, data)
    furthest = {}
    for wire in ("native", "fp16", "bf16", "int8"):
        group = dist.new_group(pg_options=dpcomm.Options(wire=wire, wire_links="all"))
        broadcasts_are_exact(group, rank)
        mine = train(group, data)
        assert equal_on_all_ranks(mine), wire
        change = differences(mine, exact)
        furthest[wire] = max((v for k, v in change.items() if "num" not in k), default=0.0)
        with dpcomm.wire(wire):  # and for the calls of this thread, on a group that is exact
            everywhere = dist.new_group(pg_options=dpcomm.Options(wire_links="all"))
            assert not differences(train(everywhere, data), mine), wire
    dist.destroy_process_group()
    return furthest


def broadcasts_are_exact(group: dist.ProcessGroup, rank: int) -> None:
    """Parameters and buffers with bits that no lossy wire carries, large enough to go lossy."""
    module = nn.Linear(200, 200)
    generator = torch.Generator().manual_seed(99)
    wanted = torch.randn(200, 200, generator=generator) * 10.0 ** torch.randint(
        -30, 30, (200, 200), generator=generator
    )
    half = wanted.to(torch.float16)
    module.register_buffer("small", half.clone() if rank == 0 else torch.zeros_like(half))
    with torch.no_grad():
        module.weight.copy_(wanted if rank == 0 else torch.zeros_like(wanted))
    model = DistributedDataParallel(module, process_group=group)
    assert torch.equal(model.module.weight.view(torch.int32), wanted.view(torch.int32))
    assert torch.equal(model.module.small.view(torch.int16), half.view(torch.int16))
    if rank == 0:
        model.module.small += 1
    model(torch.ones(1, 200))  # broadcasts the buffers
    assert torch.equal(model.module.small, half + 1)


@pytest.mark.parametrize("world", [2, 3])
def test_every_mode_gives_the_parameters_of_gloo(world: int) -> None:
    launch(modes, world)


def test_lossy_wires_touch_gradients_only() -> None:
    furthest = launch(lossy_wires, 2).results
    assert furthest[0] == furthest[1]
    assert furthest[0]["native"] == 0
    # The larger the error of the wire, the further the parameters; none is far.
    assert 0 < furthest[0]["fp16"] < furthest[0]["bf16"] < furthest[0]["int8"] < 0.1
