"""Training that survives the death of a rank: torchrun starts all anew, from the last checkpoint.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/elastic_restart.py

In epoch 2 of the first start the last rank kills itself, as the kernel does when memory runs out.
The others get a dpcomm.PeerError that names it, all end, torchrun starts them again, and they go on
from the checkpoint. The result is that of a run without the accident (--crash-epoch -1),
bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from train_digits import Trainer, batches, datasets

import dpcomm


def save(trainer: Trainer, epoch: int, path: Path) -> None:
    """The whole state, by rank 0; never half a file."""
    if dist.get_rank() == 0:
        state = {
            "epoch": epoch,
            "model": trainer.model.module.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
        }
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    dist.barrier()


def load(trainer: Trainer, path: Path) -> int:
    """Restores the state, if there is one; the number of epochs that are done."""
    if not path.exists():
        return 0
    state = torch.load(path)
    trainer.model.module.load_state_dict(state["model"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


def digest(model: torch.nn.Module) -> str:
    """A hash of the bits of all parameters."""
    bits = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha256(bits).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--crash-epoch", type=int, default=2, help="-1: none")
    run = os.environ.get("TORCHELASTIC_RUN_ID", "alone")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / f"digits-{run}.pt"
    )
    arguments = parser.parse_args()

    place = dpcomm.init(timeout=60)
    torch.use_deterministic_algorithms(True)
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    train, held_out = datasets()
    trainer = Trainer(seed=1)
    done = load(trainer, arguments.checkpoint)
    if place.rank == 0:
        print(f"start {start}: {done} epochs are done", flush=True)
    try:
        for epoch in range(done, arguments.epochs):
            for number, batch in enumerate(batches(train, epoch, seed=1)):
                crash = start == 0 and epoch == arguments.crash_epoch and number == 5
                if crash and place.rank == place.world_size - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                trainer.step(*batch)
            save(trainer, epoch + 1, arguments.checkpoint)
    except dpcomm.PeerError as error:
        print(f"rank {place.rank} goes down: {error}", file=sys.stderr, flush=True)
        raise
    accuracy, _ = trainer.evaluate(held_out)
    if place.rank == 0:
        print(f"held out: accuracy {accuracy:.1%}; parameters {digest(trainer.model.module)}")
        arguments.checkpoint.unlink(missing_ok=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
