"""Distributed checkpoints: what four ranks save, two load; also saved in the background."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from both import tolerance
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def network(seed: int) -> nn.Sequential:
    """10 and 33 rows divide neither by 4 nor by 2 alike."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 33), nn.ReLU(), nn.Linear(33, 10))


def trained(mesh: DeviceMesh, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network(seed)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(seed + dist.get_rank())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 12)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def shards(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    its_model, its_optimizer = states.get_state_dict(model, optimizer)
    return {"model": its_model, "optimizer": its_optimizer, "epoch": 7}


def whole(state: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors of a state, whole, in the order of their names."""
    found = []
    for name, value in sorted(state["model"].items()):
        moments = state["optimizer"]["state"][name]
        for tensor in (value, moments["exp_avg"], moments["exp_avg_sq"], moments["step"]):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found.append(full.detach().clone())
    return found


def folder() -> Path:
    """A folder that all ranks know."""
    names = [tempfile.mkdtemp(prefix="checkpoint-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names, src=0)
    return Path(str(names[0]))


def saved_and_loaded(where: Path, background: bool) -> list[torch.Tensor]:
    rank = dist.get_rank()
    four = DeviceMesh("cpu", [0, 1, 2, 3])
    # Every rank makes it, two are in it. First of all groups: torch remembers the name of a group
    # for all meshes of this form.
    pair = DeviceMesh("cpu", [0, 1])
    model, optimizer = trained(four, seed=1)
    state = shards(model, optimizer)
    wanted = whole(state)
    if background:
        # A thread makes calls of its own, so they need a group of their own, with gloo too.
        own = dist.new_group()
        pending = dcp.async_save(state, checkpoint_id=where, process_group=own)
        x = torch.ones(1000)
        for _ in range(20):
            dist.all_reduce(x)
            x /= dist.get_world_size()
        assert bool((x == 1).all())
        pending.result()
    else:
        dcp.save(state, checkpoint_id=where)
    if rank < 2:
        other_model, other_optimizer = trained(pair, seed=2)
        other = shards(other_model, other_optimizer)
        other["epoch"] = -1
        dcp.load(other, checkpoint_id=where, process_group=pair.get_group())
        assert other["epoch"] == 7
        for a, b in zip(whole(other), wanted, strict=True):
            assert torch.equal(a, b)
        states.set_state_dict(
            other_model,
            other_optimizer,
            model_state_dict=other["model"],
            optim_state_dict=other["optimizer"],
        )
        for p, name in zip(other_model.parameters(), state["model"], strict=True):
            assert torch.equal(p.full_tensor(), wanted[4 * sorted(state["model"]).index(name)])
    dist.barrier()
    return wanted


def checkpoint(background: bool) -> list[torch.Tensor]:
    where = folder()
    try:
        return saved_and_loaded(where, background)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(where, ignore_errors=True)


@tolerance(1e-3)  # four numbers are added in other orders
def saved_by_four_loaded_by_two() -> list[torch.Tensor]:
    return checkpoint(background=False)


@tolerance(1e-3)
def saved_in_the_background() -> list[torch.Tensor]:
    return checkpoint(background=True)


CHECKS = [saved_by_four_loaded_by_two, saved_in_the_background]
