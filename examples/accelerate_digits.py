"""Hugging Face Accelerate on dpcomm: dpcomm.init() before the Accelerator.

torchrun --standalone --nproc-per-node 2 examples/accelerate_digits.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from train_digits import datasets, network

import dpcomm


def main() -> None:
    dpcomm.init()  # Accelerate takes a group that is there already
    accelerator = Accelerator(cpu=True)
    set_seed(1)
    train, held_out = datasets()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model, optimizer, batches, tests = accelerator.prepare(
        model, optimizer, DataLoader(train, 32, shuffle=True), DataLoader(held_out, 60)
    )
    for _ in range(6):
        for images, labels in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()

    model.eval()
    right = seen = 0
    with torch.no_grad():
        for images, labels in tests:
            # All ranks' answers; what was doubled to fill the last batch is left out.
            answers, truth = accelerator.gather_for_metrics((model(images).argmax(1), labels))
            right += int((answers == truth).sum())
            seen += len(truth)
    accelerator.wait_for_everyone()
    accelerator.print(
        f"{dist.get_backend()}, {accelerator.num_processes} ranks: "
        f"{right} of {seen} held-out digits, accuracy {right / seen:.1%}"
    )
    accelerator.end_training()  # which also destroys the group


if __name__ == "__main__":
    main()
