"""DeepSpeed ZeRO-1 on dpcomm: dist_backend="dpcomm". Each rank keeps its part of Adam's state.

DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 examples/deepspeed_digits.py
"""

from __future__ import annotations

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from train_digits import datasets, network

CONFIG = {
    "train_micro_batch_size_per_gpu": 32,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 1},
}


def main() -> None:
    # A helper of DeepSpeed's own for inference, which it would compile first; ZeRO does not use it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="dpcomm", verbose=False)
    torch.manual_seed(1)
    train, held_out = datasets()
    model = network()
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=torch.optim.Adam(model.parameters(), lr=1e-3), config=CONFIG
    )
    sampler: DistributedSampler[list[torch.Tensor]] = DistributedSampler(train, seed=1)
    for epoch in range(6):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(train, 32, sampler=sampler):
            loss = nn.functional.cross_entropy(engine(images), labels)
            engine.backward(loss)
            engine.step()

    engine.eval()
    images, labels = held_out.tensors
    with torch.no_grad():
        right = (engine(images).argmax(1) == labels).float().mean()
    dist.all_reduce(right, op=dist.ReduceOp.AVG)
    kept = sum(part.numel() for part in optimizer.single_partition_of_fp32_groups)
    everything = sum(parameter.numel() for parameter in model.parameters())
    if dist.get_rank() == 0:
        print(
            f"{dist.get_backend()}, {dist.get_world_size()} ranks: accuracy {float(right):.1%}; "
            f"a rank keeps Adam's state of {kept} of {everything} parameters"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
