"""Trains a small convolutional network on handwritten digits with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/train_digits.py --backend dpcomm

Everything but the name of the backend is plain PyTorch. The images are scikit-learn's digits (8 x 8
pixels, 1797 of them); the last 360 of a fixed shuffle are held out. Two runs with the same backend
and number of ranks give the same numbers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import dpcomm

HELD_OUT = 360
BATCH_SIZE = 32  # per rank


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out images (N, 1, 8, 8) in 0..1 with their labels; the same everywhere."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:-HELD_OUT], order[-HELD_OUT:]
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[held_out], labels[held_out]),
    )


def network() -> nn.Module:
    """Two convolutions and two linear layers: 1.6 million parameters, most of them linear."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 1536),
        nn.ReLU(),
        nn.Linear(1536, 10),
    )


def batches(data: TensorDataset, epoch: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """This rank's batches of an epoch, each moved by up to one pixel."""
    sampler = DistributedSampler(data, seed=seed, drop_last=True)
    sampler.set_epoch(epoch)
    shifts = torch.Generator().manual_seed(seed + 1000 * epoch + dist.get_rank())
    for images, labels in DataLoader(data, BATCH_SIZE, sampler=sampler, drop_last=True):
        down, right = torch.randint(-1, 2, (2,), generator=shifts).tolist()
        yield images.roll((down, right), (2, 3)), labels


class Trainer:
    """A replica of the network with its optimizer."""

    def __init__(self, seed: int, group: dist.ProcessGroup | None = None) -> None:
        torch.manual_seed(seed)
        self.model = DistributedDataParallel(network(), process_group=group)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.02, momentum=0.9)

    def backward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Adds the gradients of one batch, averaged over the ranks; returns this rank's loss."""
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        return loss.detach()

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Trains on one batch."""
        self.optimizer.zero_grad()
        loss = self.backward(images, labels)
        self.optimizer.step()
        return float(loss)

    @torch.no_grad()
    def evaluate(self, data: TensorDataset) -> tuple[float, float]:
        """Accuracy and mean loss on all of `data`, which every rank computes for itself."""
        images, labels = data.tensors
        self.model.eval()
        outputs = self.model.module(images)
        self.model.train()
        loss = nn.functional.cross_entropy(outputs, labels)
        return float((outputs.argmax(1) == labels).float().mean()), float(loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="dpcomm", help="dpcomm (default), gloo, ...")
    parser.add_argument("--wire", help="dpcomm's wire format: native, fp16, bf16, int8")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    options = None
    if arguments.wire:  # on one host a wire format saves nothing; "all" uses it nevertheless
        options = dpcomm.Options(wire=arguments.wire, wire_links="all")
    dist.init_process_group(arguments.backend, pg_options=options)
    torch.use_deterministic_algorithms(True)
    train, held_out = datasets()
    trainer = Trainer(arguments.seed)
    start = time.perf_counter()
    for epoch in range(arguments.epochs):
        losses = [trainer.step(*batch) for batch in batches(train, epoch, arguments.seed)]
        if dist.get_rank() == 0 and (epoch + 1) % 5 == 0:
            print(f"epoch {epoch + 1:3}: training loss {sum(losses) / len(losses):.4f}", flush=True)
    accuracy, loss = trainer.evaluate(held_out)
    if dist.get_rank() == 0:
        seconds = time.perf_counter() - start
        print(f"held out: accuracy {accuracy:.1%}, loss {loss:.4f}; {seconds:.1f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
