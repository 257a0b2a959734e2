"""Pipelines on two ranks and data x pipeline on four: what gloo and one process give."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from digits import digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
)
from torch.distributed.tensor import DTensor

STEPS = 3
BATCH = 16
MICROBATCHES = 4
PARTS = 4


def part(index: int) -> nn.Sequential:
    """One of the four parts of the model."""
    torch.manual_seed(30 + index)
    width = 48
    if index == 0:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
    if index == PARTS - 1:
        return nn.Sequential(nn.Linear(width, 10))
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


def batch(step: int, replica: int, replicas: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = digits()
    rows = slice((step * replicas + replica) * BATCH, (step * replicas + replica + 1) * BATCH)
    return images[rows], labels[rows]


def one_process(replicas: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses of the microbatches of replica 0, and the parameters."""
    model = nn.Sequential(*[part(index) for index in range(PARTS)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for replica in range(replicas):
            images, labels = batch(step, replica, replicas)
            pairs = zip(images.chunk(MICROBATCHES), labels.chunk(MICROBATCHES), strict=True)
            for x, y in pairs:
                loss = nn.functional.cross_entropy(model(x), y)
                (loss / MICROBATCHES / replicas).backward()
                losses += [loss.detach()] if replica == 0 else []
        optimizer.step()
    return losses, [p.detach() for p in model.parameters()]


def pipeline(
    schedule: Any,
    rank: int,
    size: int,
    group: Any,
    replica: int = 0,
    replicas: int = 1,
    mesh: Any = None,
) -> list[torch.Tensor]:
    """Trains; returns the parameters of this rank's parts and the losses where they are known."""
    several = schedule not in (ScheduleGPipe, Schedule1F1B)
    if several:
        indices = list(range(rank, PARTS, size))
        modules = {index: part(index) for index in indices}
        stages = PARTS
    else:
        mine = range(rank * PARTS // size, (rank + 1) * PARTS // size)
        modules = {rank: nn.Sequential(*[part(index) for index in mine])}
        stages = size
    if mesh is not None:
        for module in modules.values():
            fully_shard(module, mesh=mesh)
    its = [
        PipelineStage(module, index, stages, torch.device("cpu"), group=group)
        for index, module in modules.items()
    ]
    run = schedule(
        its if several else its[0], n_microbatches=MICROBATCHES, loss_fn=nn.functional.cross_entropy
    )
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    losses: list[torch.Tensor] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        images, labels = batch(step, replica, replicas)
        inputs = (images,) if rank == 0 else ()
        if rank == size - 1:
            run.step(*inputs, target=labels, losses=losses, return_outputs=False)
        else:
            run.step(*inputs)
        optimizer.step()
    values = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    check_against_one_process(modules, values, losses, replica, replicas, several)
    return [value.detach().clone() for value in values] + [loss.detach() for loss in losses]


def check_against_one_process(
    modules: dict[int, nn.Module],
    values: list[torch.Tensor],
    losses: list[torch.Tensor],
    replica: int,
    replicas: int,
    several: bool,
) -> None:
    wanted_losses, wanted = one_process(replicas)
    offset = {index: 2 * index for index in range(PARTS)}
    mine = [
        parameter
        for index in modules
        for parameter in (
            wanted[offset[index] : offset[index] + 2]
            if several
            else wanted[index * len(values) : (index + 1) * len(values)]
        )
    ]
    for value, want in zip(values, mine, strict=True):
        torch.testing.assert_close(value.detach(), want, rtol=1e-4, atol=1e-5)
    if losses and replica == 0:
        torch.testing.assert_close(
            torch.stack(losses[-MICROBATCHES:]).detach(),
            torch.stack(wanted_losses[-MICROBATCHES:]),
            rtol=1e-4,
            atol=1e-5,
        )


def alone(schedule: Any) -> list[torch.Tensor]:
    return pipeline(schedule, dist.get_rank(), dist.get_world_size(), None)


def gpipe() -> list[torch.Tensor]:
    return alone(ScheduleGPipe)


def one_forward_one_backward() -> list[torch.Tensor]:
    return alone(Schedule1F1B)


def interleaved() -> list[torch.Tensor]:
    return alone(ScheduleInterleaved1F1B)


def looped_breadth_first() -> list[torch.Tensor]:
    return alone(ScheduleLoopedBFS)


def interleaved_zero_bubble() -> list[torch.Tensor]:
    return alone(ScheduleInterleavedZeroBubble)


def data_and_pipeline(schedule: Any) -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipe"))
    place = mesh["pipe"].get_local_rank()
    replica = mesh["data"].get_local_rank()
    group = mesh.get_group("pipe")
    return pipeline(schedule, place, 2, group, replica, 2, mesh["data"])


def data_and_gpipe() -> list[torch.Tensor]:
    return data_and_pipeline(ScheduleGPipe)


def data_and_interleaved() -> list[torch.Tensor]:
    return data_and_pipeline(ScheduleInterleaved1F1B)


TWO = [
    gpipe,
    one_forward_one_backward,
    interleaved,
    looped_breadth_first,
    interleaved_zero_bubble,
]
FOUR = [gpipe, data_and_gpipe, data_and_interleaved]
