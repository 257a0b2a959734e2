"""Ray Train on dpcomm: TorchConfig(backend="dpcomm"). Nothing in the loop imports dpcomm.

python examples/ray_digits.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any


def train_loop(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.utils.data import DataLoader
    from train_digits import datasets, network

    train, held_out = datasets()
    torch.manual_seed(1)
    model = ray.train.torch.prepare_model(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    batches = ray.train.torch.prepare_data_loader(DataLoader(train, 32, shuffle=True))
    for epoch in range(config["epochs"]):
        batches.sampler.set_epoch(epoch)
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    model.eval()
    images, labels = held_out.tensors
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean()
    dist.all_reduce(right, op=dist.ReduceOp.AVG)
    ray.train.report({"accuracy": float(right), "ranks": dist.get_world_size()})
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["answer"]).write_text(
            f"{dist.get_backend()}, {dist.get_world_size()} ranks: accuracy {float(right):.1%}"
        )


def main() -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with tempfile.TemporaryDirectory() as folder:
        here = str(Path(__file__).resolve().parent)  # for train_digits
        ray.init(
            num_cpus=3,
            include_dashboard=False,
            object_store_memory=100 << 20,
            runtime_env={"env_vars": {"PYTHONPATH": here}},
        )
        answer = Path(folder) / "answer"
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"epochs": 6, "answer": str(answer)},
            torch_config=TorchConfig(backend="dpcomm"),
            scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
            run_config=RunConfig(storage_path=folder, name="digits"),
        )
        trainer.fit()
        print(answer.read_text())
        ray.shutdown()


if __name__ == "__main__":
    main()
