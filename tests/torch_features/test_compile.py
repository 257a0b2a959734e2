"""torch.compile: collectives in a traced graph, DDP and FSDP2, against gloo and against eager."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from both import report, run, tolerance
from digits import digits
from harness import launch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

COMPILER = "DPCOMM_TEST_COMPILER"


def compiled(what: Any, **kw: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(what, backend=os.environ[COMPILER], **kw)


def communicate(x: torch.Tensor) -> list[torch.Tensor]:
    group = dist.group.WORLD
    y = funcol.all_reduce(x * 2, "sum", group) + 1
    gathered = funcol.all_gather_tensor(y[:1], 0, group)
    scattered = funcol.reduce_scatter_tensor(gathered * y, "sum", 0, group)
    several = funcol.all_reduce_coalesced([x + 1, y - 1], "max", group)
    return [y, gathered, scattered, *several]


def exchange(x: torch.Tensor) -> torch.Tensor:
    return funcol.all_to_all_single(x * 3, None, None, dist.group.WORLD) + 1


def functional() -> list[torch.Tensor]:
    x = torch.arange(8.0).view(2, 4) + dist.get_rank()
    results = [t.clone() for t in compiled(communicate, fullgraph=True)(x)]
    for mine, eager in zip(results, communicate(x), strict=True):
        assert torch.equal(mine, eager.clone())
    return results


def all_to_all() -> torch.Tensor:
    x = torch.arange(8.0).view(2, 4) + dist.get_rank()
    result = compiled(exchange, fullgraph=True)(x).clone()
    assert torch.equal(result, exchange(x).clone())
    return result


def calls_of_distributed() -> torch.Tensor:
    """torch.distributed's own names, which the compiler turns into functional ones."""

    def body(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y)
        whole = torch.empty(2 * dist.get_world_size(), 4)
        dist.all_gather_into_tensor(whole, y)
        return whole + 1

    x = torch.arange(8.0).view(2, 4) + dist.get_rank()
    result = compiled(body, fullgraph=True)(x).clone()
    assert torch.equal(result, body(x))
    return result


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def train(model: Any, steps: int = 3) -> list[torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for step in range(steps):
        rows = slice((step * world + rank) * 16, (step * world + rank + 1) * 16)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    values = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [value.detach().clone() for value in values]


def like_eager(mine: list[torch.Tensor], eager: list[torch.Tensor]) -> list[torch.Tensor]:
    for a, b in zip(mine, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return mine


@tolerance(1e-5)
def ddp() -> list[torch.Tensor]:
    eager = train(DistributedDataParallel(network()))
    return like_eager(train(compiled(DistributedDataParallel(network()))), eager)


@tolerance(1e-5)
def fsdp2() -> list[torch.Tensor]:
    def model() -> nn.Module:
        its = network()
        fully_shard(its[1])
        fully_shard(its)
        return its

    return like_eager(train(compiled(model())), train(model()))


@tolerance(1e-5)
def tensor_parallel() -> list[torch.Tensor]:
    def model() -> nn.Module:
        plan = {"1": ColwiseParallel(), "3": RowwiseParallel()}
        return parallelize_module(network(), init_device_mesh("cpu", (2,)), plan)

    return like_eager(train(compiled(model())), train(model()))


CHECKS = [functional, all_to_all, calls_of_distributed, ddp, fsdp2, tensor_parallel]


def scenario(rank: int, world: int) -> dict[str, str]:
    warnings.simplefilter("ignore", FutureWarning)
    return run(CHECKS)


@pytest.fixture(scope="module")
def traced() -> list[dict[str, str]]:
    return launch(scenario, 2, env={COMPILER: "aot_eager"}).results


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_compile(check: str, traced: list[dict[str, str]]) -> None:
    report(traced, check)


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_compile_with_inductor(tmp_path: Path) -> None:
    env = {COMPILER: "inductor", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    outcomes = launch(scenario, 2, env=env, deadline_s=500).results
    for check in CHECKS:
        report(outcomes, check.__name__)
