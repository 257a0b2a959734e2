"""Starts its own ranks: no torchrun, just ``python examples/launch_digits.py``.

In a notebook the same two lines do: define `train` in a cell, then ``dpcomm.launch(train, 2)``.
"""

from __future__ import annotations

from train_digits import Trainer, batches, datasets

import dpcomm


def train(epochs: int) -> tuple[int, float]:
    """Trains on this rank's share of the digits; its rank, and accuracy on held-out ones."""
    place = dpcomm.init()
    data, held_out = datasets()
    trainer = Trainer(seed=1)
    for epoch in range(epochs):
        for batch in batches(data, epoch, seed=1):
            trainer.step(*batch)
    return place.rank, trainer.evaluate(held_out)[0]


if __name__ == "__main__":
    for rank, accuracy in dpcomm.launch(train, 2, (3,)):
        print(f"rank {rank}: {accuracy:.1%} of the held-out digits are right")
