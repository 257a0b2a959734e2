"""TORCH_DISTRIBUTED_DEBUG=DETAIL: torch's checks around the backend, with gloo's own words."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import calls
import pipelines
import pytest
import torch
import torch.distributed as dist
import training
from both import Refused, is_gloo, report, run
from digits import digits
from harness import launch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def batch(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = digits()
    rows = slice((step * world + rank) * 16, (step * world + rank + 1) * 16)
    return images[rows], labels[rows]


def ddp() -> Any:
    """DDP, against one process that sees all batches."""
    rank, world = dist.get_rank(), dist.get_world_size()
    assert dist.get_debug_level() == dist.DebugLevel.DETAIL
    if is_gloo():
        return Refused("torch 2.13 ends with a segmentation fault in DDP's constructor")
    model, alone = DistributedDataParallel(network()), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    its = torch.optim.SGD(alone.parameters(), lr=0.5)
    for step in range(3):
        optimizer.zero_grad()
        its.zero_grad()
        images, labels = batch(step, rank, world)
        nn.functional.cross_entropy(model(images), labels).backward()
        for each in range(world):
            images, labels = batch(step, each, world)
            (nn.functional.cross_entropy(alone(images), labels) / world).backward()
        optimizer.step()
        its.step()
    for mine, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    return None


def collectives() -> list[torch.Tensor]:
    """Those of which gloo has the same."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x = torch.arange(6.0) + rank
    results = []
    for call in (lambda: dist.all_reduce(x), lambda: dist.broadcast(x, 1)):
        call()
        results.append(x.clone())
    parts = [torch.empty(6) for _ in range(world)]
    dist.all_gather(parts, x + rank)
    whole = torch.empty(6 * world)
    dist.all_gather_into_tensor(whole, x + rank)
    part = torch.empty(3)
    dist.reduce_scatter_tensor(part, torch.arange(3.0 * world))
    work = dist.all_reduce(x, async_op=True)
    work.wait()
    dist.barrier()
    pieces = [torch.empty(3) for _ in range(world)] if rank == 1 else None
    dist.gather(x[:3], pieces, dst=1)
    piece = torch.empty(3)
    dist.scatter(piece, list(torch.arange(3.0 * world).chunk(world)) if rank == 0 else None, src=0)
    moved = torch.empty(2 * world)
    dist.all_to_all_single(moved, torch.arange(2.0 * world) + rank)
    message = torch.full((4,), float(rank))
    if rank == 0:
        dist.send(message, 1, tag=3)
    elif rank == 1:
        dist.recv(message, 0, tag=3)
    return [*results, *parts, whole, part, x, *(pieces or []), piece, moved, message]


def complaint(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        # Without what names a line of torch's sources.
        return re.sub(r"\[/.*?\] ", "", str(error)).split("Exception raised")[0]
    raise AssertionError("no error")


def mismatches() -> list[str]:
    """Each rank hears both calls before anything is sent; the group goes on."""
    rank = dist.get_rank()
    said = [
        complaint(lambda: dist.all_reduce(torch.ones(4 + rank))),
        complaint(lambda: dist.all_reduce(torch.ones(4, dtype=[torch.float, torch.int][rank]))),
        complaint(
            lambda: dist.all_reduce(torch.ones(4)) if rank else dist.broadcast(torch.ones(4), 0)
        ),
    ]
    assert all("Detected mismatch between collectives on ranks" in text for text in said), said
    x = torch.ones(4)
    dist.all_reduce(x)
    assert x.tolist() == [dist.get_world_size()] * 4
    return said


CHECKS = [
    mismatches,  # first: the texts have sequence numbers
    collectives,
    ddp,
    training.fsdp2_plain_sgd,
    pipelines.gpipe,
    pipelines.interleaved,
    calls.objects_sent,
]


def scenario(rank: int, world: int) -> dict[str, str]:
    return run(CHECKS)


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, str]]:
    return launch(scenario, 2, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}).results


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_debug(check: str, outcomes: list[dict[str, str]]) -> None:
    report(outcomes, check)
