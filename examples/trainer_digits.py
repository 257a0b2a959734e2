"""The Trainer of Hugging Face transformers on dpcomm: dpcomm.init() before TrainingArguments.

torchrun --standalone --nproc-per-node 2 examples/trainer_digits.py
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from train_digits import datasets, network
from transformers import EvalPrediction, Trainer, TrainingArguments

import dpcomm


class Digits(Dataset[dict[str, torch.Tensor]]):
    """Images and labels by name, as the Trainer wants them."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image, label = self.data[index]
        return {"images": image, "labels": label}


class Model(nn.Module):
    """The network of train_digits.py with its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    right = np.argmax(prediction.predictions, axis=1) == prediction.label_ids
    return {"accuracy": float(right.mean()), "seen": len(right)}


def main() -> None:
    dpcomm.init()  # the Trainer takes a group that is there already
    train, held_out = datasets()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            num_train_epochs=6,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=50,
            learning_rate=2e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=1,
        )
        trainer = Trainer(
            Model(),
            arguments,
            train_dataset=Digits(train),
            eval_dataset=Digits(held_out),
            compute_metrics=accuracy,
        )
        trainer.train()
        found = trainer.evaluate()
    if dist.get_rank() == 0:
        print(
            f"{dist.get_backend()}, {arguments.world_size} ranks: "
            f"{found['eval_seen']} held-out digits, accuracy {found['eval_accuracy']:.1%}"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
