"""Lightning on dpcomm: one word in DDPStrategy.

python examples/lightning_digits.py
"""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader
from train_digits import datasets, network


class Digits(lightning.LightningModule):
    """The network of train_digits.py."""

    def __init__(self) -> None:
        super().__init__()
        self.network = network()

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        images, labels = batch
        right = (self.network(images).argmax(1) == labels).float().mean()
        self.log("accuracy", right, sync_dist=True)  # the mean over the ranks: an all-reduce

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main() -> None:
    lightning.seed_everything(1)
    train, held_out = datasets()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        max_epochs=6,
        strategy=DDPStrategy(process_group_backend="dpcomm"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Digits(), DataLoader(train, 32, shuffle=True), DataLoader(held_out, 60))
    accuracy = float(trainer.callback_metrics["accuracy"])
    if trainer.is_global_zero:
        backend = torch.distributed.get_backend()
        print(f"{backend}, {trainer.world_size} ranks: accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
