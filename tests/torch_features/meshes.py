"""Four ranks: HSDP, data x tensor parallel, redistribution of DTensors, against gloo."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist
from both import tolerance
from digits import digits
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

STEPS = 3
BATCH = 8


class Block(nn.Module):
    """What a transformer's block has: a norm, an up and a down projection, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    """The rows of an image are a sequence of 8 tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList([Block(16), Block(16)])
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


def batch(step: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = digits()
    rows = slice((step * parts + part) * BATCH, (step * parts + part + 1) * BATCH)
    return images[rows, 0], labels[rows]


def whole(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return value.detach().clone()


def train(model: nn.Module, part: int, parts: int) -> list[torch.Tensor]:
    """The parameters, whole, after some steps on this part of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        images, labels = batch(step, part, parts)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return [whole(p) for p in model.parameters()]


def close_to_one_process(parameters: list[torch.Tensor], parts: int) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            images, labels = batch(step, part, parts)
            (nn.functional.cross_entropy(model(images), labels) / parts).backward()
        optimizer.step()
    for mine, wanted in zip(parameters, model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted.detach(), rtol=1e-4, atol=1e-5)


def shard(model: Net, mesh: DeviceMesh, **kw: Any) -> Net:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **kw)
    fully_shard(model, mesh=mesh, **kw)
    return model


@tolerance(1e-5)
def fsdp2_four_ranks() -> list[torch.Tensor]:
    """Blocks of unequal size too: 10 rows over 4 ranks."""
    parameters = train(shard(Net(), init_device_mesh("cpu", (4,))), dist.get_rank(), 4)
    close_to_one_process(parameters, 4)
    return parameters


@tolerance(1e-5)
def hsdp() -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    parameters = train(shard(Net(), mesh), dist.get_rank(), 4)
    close_to_one_process(parameters, 4)
    return parameters


@tolerance(2e-2)  # bfloat16 has 8 bits
def hsdp_mixed_precision() -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(Net(), mesh, mp_policy=policy, reshard_after_forward=False)
    return train(model, dist.get_rank(), 4)


def tensor_parallel(model: Net, mesh: DeviceMesh, sequence: bool) -> Net:
    for block in model.blocks:
        plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if sequence:
            plan = {
                "norm": SequenceParallel(),
                "up": ColwiseParallel(input_layouts=Shard(1)),
                "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            }
        parallelize_module(block, mesh, plan)
        if sequence:
            parallelize_module(
                block,
                mesh,
                PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),)),
            )
            parallelize_module(
                block,
                mesh,
                PrepareModuleOutput(
                    output_layouts=(Shard(1),), desired_output_layouts=(Replicate(),)
                ),
            )
    return model


@tolerance(1e-5)
def tensor_parallel_alone() -> list[torch.Tensor]:
    model = tensor_parallel(Net(), init_device_mesh("cpu", (4,)), sequence=False)
    parameters = train(model, 0, 1)
    close_to_one_process(parameters, 1)
    return parameters


@tolerance(1e-5)
def sequence_parallel() -> list[torch.Tensor]:
    model = tensor_parallel(Net(), init_device_mesh("cpu", (4,)), sequence=True)
    parameters = train(model, 0, 1)
    close_to_one_process(parameters, 1)
    return parameters


@tolerance(1e-5)
def data_and_tensor_parallel() -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = tensor_parallel(Net(), mesh["tensor"], sequence=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    parameters = train(model, mesh["data"].get_local_rank(), 2)
    close_to_one_process(parameters, 2)
    return parameters


SHAPES = [(8, 12), (7, 5), (3, 2), (1, 9)]


def full(shape: tuple[int, ...]) -> torch.Tensor:
    """Whole numbers, so that sums are exact in any order."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) - 7


def ways(dims: int, ends: list[Placement]) -> list[tuple[Placement, ...]]:
    return list(itertools.product(ends, repeat=dims))


def begin(shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    """A DTensor whose full value is `full(shape)`, without communication."""
    value = full(shape)
    for dim, placement in enumerate(placements):
        place, count = mesh.get_coordinate()[dim], mesh.size(dim)
        if isinstance(placement, Shard):
            chunks = value.chunk(count, placement.dim)
            empty = value.narrow(placement.dim, 0, 0)
            value = chunks[place] if place < len(chunks) else empty
        elif isinstance(placement, Partial):
            # Every rank has a part that only the reduction makes right.
            if placement.reduce_op == "sum":
                rest = place if place < count - 1 else -sum(range(count - 1))
                value = (value if place == 0 else torch.zeros_like(value)) + rest
            elif placement.reduce_op == "avg":
                value = value + 4 * (place if place < count - 1 else -sum(range(count - 1)))
            elif placement.reduce_op == "max":
                value = value - (place + 1) % count
            else:
                value = value + (place + 1) % count
    strides = full(shape).stride()
    return DTensor.from_local(
        value.contiguous(),
        mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def redistribute(
    mesh: DeviceMesh, starts: list[Placement], shapes: list[tuple[int, ...]]
) -> list[torch.Tensor]:
    results = []
    ends: list[Placement] = [Replicate(), Shard(0), Shard(1)]
    for shape in shapes:
        for source in ways(mesh.ndim, starts):
            for target in ways(mesh.ndim, ends):
                tensor = begin(shape, mesh, source)
                moved = tensor.redistribute(placements=target)
                # What lies in the memory, not what full_tensor() makes of it.
                assert torch.equal(moved.to_local(), begin(shape, mesh, target).to_local()), (
                    shape,
                    source,
                    target,
                )
                results.append(moved.to_local().clone())
                assert torch.equal(moved.full_tensor(), full(shape)), (shape, source, target)
    return results


def dtensor_redistribution() -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (4,))
    partial: list[Placement] = [Partial(op) for op in ("sum", "avg", "max", "min")]
    return redistribute(mesh, [Replicate(), Shard(0), Shard(1), *partial], SHAPES)


def dtensor_redistribution_two_dimensions() -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    return redistribute(mesh, [Replicate(), Shard(0), Shard(1), Partial()], [(7, 5)])


def dtensor_operations() -> list[torch.Tensor]:
    """Products of sharded matrices, and their gradients."""
    mesh = init_device_mesh("cpu", (2, 2))
    results = []
    for left, right in itertools.product(ways(2, [Replicate(), Shard(0), Shard(1)]), repeat=2):
        a = begin((6, 5), mesh, left).requires_grad_()
        b = begin((5, 7), mesh, right).requires_grad_()
        product = a @ b
        assert torch.equal(product.full_tensor(), full((6, 5)) @ full((5, 7))), (left, right)
        product.sum().full_tensor().backward()
        assert torch.equal(a.grad.full_tensor(), torch.ones(6, 7) @ full((5, 7)).T), (left, right)
        results += [product.to_local(), a.grad.to_local(), b.grad.to_local()]
    return results


CHECKS = [
    fsdp2_four_ranks,
    hsdp,
    hsdp_mixed_precision,
    tensor_parallel_alone,
    sequence_parallel,
    data_and_tensor_parallel,
    dtensor_redistribution,
    dtensor_redistribution_two_dimensions,
    dtensor_operations,
]
