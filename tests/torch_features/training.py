"""FSDP2, ZeRO, Join and local SGD on two ranks; two, so that sums are those of gloo to the bit."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from both import Refused, is_gloo
from digits import digits
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import (
    ddp_zero_hook,
    default_hooks,
    post_localSGD_hook,
)
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging import averagers, hierarchical_model_averager
from torch.distributed.algorithms.model_averaging import utils as averaging_utils
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

STEPS = 4
BATCH = 16


def network() -> nn.Sequential:
    """The same start everywhere; one layer has an odd number of rows."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 33), nn.ReLU(), nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def batches(step: int, rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = digits()
    rows = slice((step * world + rank) * BATCH, (step * world + rank + 1) * BATCH)
    return images[rows], labels[rows]


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    images, labels = batches(step, dist.get_rank(), dist.get_world_size())
    return nn.functional.cross_entropy(model(images), labels)


def alone(optimizer: type[torch.optim.Optimizer], steps: int = STEPS, **kw: Any) -> list[Any]:
    """The parameters of a process that sees all ranks' batches."""
    model, world = network(), dist.get_world_size()
    its = optimizer(model.parameters(), **kw)
    for step in range(steps):
        its.zero_grad()
        for rank in range(world):
            images, labels = batches(step, rank, world)
            (nn.functional.cross_entropy(model(images), labels) / world).backward()
        its.step()
    return [p.detach() for p in model.parameters()]


def close(mine: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def sharded(accumulate: bool = False, **kw: Any) -> list[torch.Tensor]:
    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **kw)
    fully_shard(model, **kw)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(STEPS):
        last = not accumulate or step % 2 == 1
        model.set_requires_gradient_sync(last)
        loss_of(model, step).backward()
        if last:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return [p.full_tensor().detach() for p in model.parameters()]


def fsdp2() -> list[torch.Tensor]:
    parameters = sharded()
    model = network()
    start = [p.detach().clone() for p in model.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(parameters, start, strict=True))
    return parameters


def fsdp2_plain_sgd() -> list[torch.Tensor]:
    model = network()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    parameters = [p.full_tensor().detach() for p in model.parameters()]
    close(parameters, alone(torch.optim.SGD, lr=0.1, momentum=0.9))
    return parameters


def fsdp2_keeps_parameters() -> list[torch.Tensor]:
    parameters = sharded(reshard_after_forward=False)
    assert all(torch.equal(a, b) for a, b in zip(parameters, sharded(), strict=True))
    return parameters


def fsdp2_mixed_precision() -> list[Any]:
    policies = [
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        MixedPrecisionPolicy(param_dtype=torch.float16, output_dtype=torch.float32),
    ]
    return [sharded(mp_policy=policy) for policy in policies]


def fsdp2_accumulates() -> list[torch.Tensor]:
    return sharded(accumulate=True)


def fsdp2_state_dict() -> Any:
    from torch.distributed.checkpoint import state_dict as states

    model = network()
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loss_of(model, 0).backward()
    optimizer.step()
    whole = states.StateDictOptions(full_state_dict=True)
    before = copy.deepcopy(states.get_state_dict(model, optimizer, options=whole))
    for _ in range(2):
        loss_of(model, 1).backward()
        optimizer.step()
    everywhere = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    mine = dict(before[0]) if dist.get_rank() == 0 else {}  # the call puts shards into it
    states.set_model_state_dict(model, mine, options=everywhere)
    states.set_optimizer_state_dict(model, optimizer, copy.deepcopy(before[1]), options=whole)
    after = states.get_state_dict(model, optimizer, options=whole)
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(before[1]["state"][name][key], after[1]["state"][name][key]), name
    return before


def zero(**kw: Any) -> list[torch.Tensor]:
    model = DistributedDataParallel(network(), bucket_cap_mb=0.01)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2, **kw)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    state = optimizer.state_dict()["state"] if dist.get_rank() == 0 else {}
    return [p.detach().clone() for p in model.parameters()] + [
        state[i]["exp_avg"].clone() for i in sorted(state)
    ]


def zero_redundancy() -> list[torch.Tensor]:
    parameters = zero()
    close(parameters[:6], alone(torch.optim.AdamW, lr=1e-2))
    return parameters


def zero_redundancy_bucket_view() -> list[torch.Tensor]:
    return zero(parameters_as_bucket_view=True)


def zero_overlapped(hook: Any, bucket_cap_mb: float) -> list[torch.Tensor]:
    model = DistributedDataParallel(
        network(), bucket_cap_mb=bucket_cap_mb, gradient_as_bucket_view=True
    )
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1
    )
    model.register_comm_hook(None, hook(default_hooks.allreduce_hook, model, optimizer))
    # The first two steps only learn the buckets and update nothing.
    for step in range(2 + STEPS):
        optimizer.zero_grad()
        loss_of(model, max(step - 2, 0)).backward()  # the hook makes the step
    parameters = [p.detach().clone() for p in model.parameters()]
    close(parameters, alone(torch.optim.SGD, lr=0.1))
    return parameters


def zero_overlapped_with_ddp() -> Any:
    if is_gloo():
        return Refused("torch: may hang with gloo")
    return zero_overlapped(ddp_zero_hook.hook_with_zero_step, 0.01)


def zero_overlapped_interleaved() -> Any:
    if is_gloo():
        return Refused("torch: may hang with gloo")
    return zero_overlapped(ddp_zero_hook.hook_with_zero_step_interleaved, 100)


def join_uneven(optimizer_too: bool = False) -> list[torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(network())
    joined: list[Any] = [model]
    if optimizer_too:
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        joined.append(optimizer)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Join(joined):
        for step in range(3 + 2 * rank):
            optimizer.zero_grad()
            images, labels = batches(step, rank, world)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def join_ddp() -> list[torch.Tensor]:
    parameters = join_uneven()
    copies = [torch.empty_like(parameters[0]) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, parameters[0])
    assert all(torch.equal(copy, parameters[0]) for copy in copies)
    return parameters


def join_ddp_and_zero() -> list[torch.Tensor]:
    return join_uneven(optimizer_too=True)


def join_raises_on_uneven() -> str:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(network())
    try:
        with Join([model], throw_on_early_termination=True):
            for step in range(2 + rank):
                images, labels = batches(step, rank, world)
                nn.functional.cross_entropy(model(images), labels).backward()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("no error for uneven inputs")


def post_local_sgd() -> list[torch.Tensor]:
    model = DistributedDataParallel(network())
    state = post_localSGD_hook.PostLocalSGDState(
        process_group=None,
        subgroup=dist.new_group([dist.get_rank()], use_local_synchronization=True),
        start_localSGD_iter=2,
    )
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    optimizer = PostLocalSGDOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        averagers.PeriodicModelAverager(period=2, warmup_steps=2),
    )
    trail = []
    for step in range(7):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        trail.append(next(iter(model.parameters())).detach().clone())
    return trail


def model_averaging() -> list[torch.Tensor]:
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p += dist.get_rank()
    averaging_utils.average_parameters(model.parameters(), dist.group.WORLD)
    once = [p.detach().clone() for p in model.parameters()]
    close(once, [p.detach() + (dist.get_world_size() - 1) / 2 for p in network().parameters()])
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + dist.get_rank()
    model(digits()[0][:8]).sum().backward()  # what has no gradient is not averaged
    averager = hierarchical_model_averager.HierarchicalModelAverager(
        period_group_size_dict={2: 1, 4: dist.get_world_size()}
        if dist.get_world_size() > 2
        else {2: dist.get_world_size()}
    )
    for _ in range(4):
        averager.average_parameters(list(model.parameters()))
    return once + [p.detach() for p in model.parameters()]


CHECKS = [
    fsdp2,
    fsdp2_plain_sgd,
    fsdp2_keeps_parameters,
    fsdp2_mixed_precision,
    fsdp2_accumulates,
    fsdp2_state_dict,
    zero_redundancy,
    zero_redundancy_bucket_view,
    zero_overlapped_with_ddp,
    zero_overlapped_interleaved,
    join_ddp,
    join_ddp_and_zero,
    join_raises_on_uneven,
    post_local_sgd,
    model_averaging,
]
