"""Functional collectives, their gradients, objects; what gloo gives, to the bit."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.distributed.nn.functional as with_gradient
from both import Refused, is_gloo

N = 5


def mine(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Whole numbers, other ones on each rank; sums and products of a few are exact."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) + 1 + 3 * dist.get_rank()).to(dtype).view(shape)


def functional() -> list[torch.Tensor]:
    group, world = dist.group.WORLD, dist.get_world_size()
    x = mine(2 * world, N)
    results = [funcol.all_reduce(x, op, group) for op in ("sum", "product", "min", "max")]
    results += [funcol.broadcast(x, 1, group)]
    results += [funcol.all_gather_tensor(x, dim, group) for dim in (0, 1)]
    results += [funcol.reduce_scatter_tensor(x, "sum", 0, group)]
    results += [funcol.reduce_scatter_tensor(mine(2, world * 2), "max", 1, group)]
    several = [mine(3), mine(2, 2), mine(4, dtype=torch.int64)]
    results += funcol.all_reduce_coalesced(several[:2], "sum", group)
    results += funcol.all_gather_into_tensor_coalesced(several, group)
    two = [mine(world), mine(2 * world, 2)]
    results += funcol.reduce_scatter_tensor_coalesced(two, "sum", [0, 0], group)
    assert results[0].max() == sum(2 * world * N + 3 * r for r in range(world))
    return [funcol.wait_tensor(result) for result in results]


def functional_average() -> Any:
    if is_gloo():
        return Refused("gloo does not average")
    world = dist.get_world_size()
    wanted = sum((mine(2 * world) - 3 * dist.get_rank() + 3 * r) for r in range(world)) / world
    assert torch.equal(funcol.all_reduce(mine(2 * world), "avg", dist.group.WORLD), wanted)
    part = funcol.reduce_scatter_tensor(mine(2 * world), "avg", 0, dist.group.WORLD)
    assert torch.equal(part, wanted.chunk(world)[dist.get_rank()])
    return None


def functional_all_to_all() -> list[torch.Tensor]:
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    even = funcol.all_to_all_single(mine(world * 2, 3), None, None, group)
    sends = [(rank + peer) % 3 for peer in range(world)]
    receives = [(rank + peer) % 3 for peer in range(world)]
    uneven = funcol.all_to_all_single(mine(sum(sends), 2), receives, sends, group)
    x = mine(world * 2).requires_grad_()
    moved = funcol.all_to_all_single_autograd(x, None, None, group)
    (moved * mine(world * 2)).sum().backward()
    return [funcol.wait_tensor(t) for t in (even, uneven)] + [moved.detach(), x.grad]


def functional_gradients() -> list[torch.Tensor]:
    group, world = dist.group.WORLD, dist.get_world_size()
    x, y = mine(4).requires_grad_(), mine(2 * world).requires_grad_()
    gathered = funcol.all_gather_tensor_autograd(x, 0, group)
    scattered = funcol.reduce_scatter_tensor_autograd(y, "sum", 0, group)
    (gathered * mine(4 * world)).sum().backward()
    (scattered * mine(2)).sum().backward()
    return [gathered.detach(), scattered.detach(), x.grad, y.grad]


def gradients(call: Any, *shape: int) -> list[torch.Tensor]:
    """Result and gradient of a call of torch.distributed.nn.functional."""
    x = mine(*shape).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # old, but in use
        result = call(x)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        sum((each * mine(*each.shape)).sum() for each in results).backward()
    return [each.detach().clone() for each in results] + [x.grad]


def nn_functional() -> list[Any]:
    results = [
        gradients(lambda x: with_gradient.all_reduce(x), 4),
        gradients(lambda x: with_gradient.all_reduce(x, op=dist.ReduceOp.MAX), 4),
        gradients(lambda x: with_gradient.broadcast(x, 1), 4),
        gradients(lambda x: with_gradient.reduce(x, 2), 4),
    ]
    # What reduce() leaves on the other ranks is not defined.
    if dist.get_rank() != 2:
        results[-1] = results[-1][1:]
    return results


def nn_functional_all_gather() -> list[Any]:
    return [gradients(lambda x: with_gradient.all_gather(x), 2, 3)]


def nn_functional_gather_and_scatter() -> list[Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    gathered = gradients(lambda x: with_gradient.gather(x, 1), 3)
    return [
        gathered if rank == 1 else gathered[-1],
        gradients(lambda x: with_gradient.scatter(list(x.chunk(world)), 1), 2 * world),
    ]


def nn_functional_reduce_scatter() -> list[Any]:
    world = dist.get_world_size()

    def call(x: torch.Tensor) -> Any:
        return with_gradient.reduce_scatter(torch.empty(2), list(x.chunk(world)))

    return [gradients(call, 2 * world)]


def nn_functional_all_to_all() -> list[Any]:
    world = dist.get_world_size()
    return [
        gradients(
            lambda x: with_gradient.all_to_all(
                [torch.empty(2) for _ in range(world)], list(x.chunk(world))
            ),
            2 * world,
        ),
        gradients(lambda x: with_gradient.all_to_all_single(torch.empty_like(x), x), 2 * world),
    ]


def thing(rank: int) -> dict[str, Any]:
    """Pickles of another length on each rank."""
    return {"rank": rank, "text": "x" * (1000 * rank), "tensor": torch.arange(rank), "none": None}


def objects() -> list[Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, thing(rank))
    two = [thing(rank), rank] if rank == 1 else [None, None]
    dist.broadcast_object_list(two, src=1)
    assert [each["rank"] for each in everyone] == list(range(world))
    return [everyone, two]


def objects_gathered_and_scattered() -> list[Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    at_two: list[Any] | None = [None] * world if rank == 2 else None
    dist.gather_object(thing(rank), at_two, dst=2)
    part: list[Any] = [None]
    dist.scatter_object_list(part, [thing(r) for r in range(world)] if rank == 1 else None, src=1)
    assert part[0]["rank"] == rank
    return [at_two, part]


def objects_sent() -> list[Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    got: list[Any] = [None, None]
    if rank == 0:
        dist.recv_object_list(got, src=world - 1)
    elif rank == world - 1:
        dist.send_object_list([thing(rank), "second"], dst=0)
    return got


CHECKS = [
    functional,
    functional_average,
    functional_all_to_all,
    functional_gradients,
    nn_functional,
    nn_functional_all_gather,
    nn_functional_gather_and_scatter,
    nn_functional_reduce_scatter,
    nn_functional_all_to_all,
    objects,
    objects_gathered_and_scattered,
    objects_sent,
]
