"""CPU time of communication per DDP step of a 27-million-parameter transformer, as JSON.

    torchrun --standalone --nproc-per-node 2 bench/ddp_step.py
    torchrun --standalone --nproc-per-node 2 bench/ddp_step.py --backends dpcomm,gloo --pairs 15

A replica for each backend in the same processes, measured in turn (dpcomm.bench.ddp).
dpcomm-private is dpcomm with DDP's buckets in ordinary memory (shared_buckets=False).

synchronisation_cpu_ms  CPU time of a synchronised pass minus that of the same pass under no_sync
ddp_cpu_ms              the same with a hook that communicates nothing: DDP's own copies
communication_cpu_ms    the difference of the two: what the backend takes; its standard error is
                        communication_cpu_error_ms
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dpcomm.bench.backends import BackendSpec, TorchBackend, create_backend, expand
from dpcomm.bench.ddp import Replica, silent, step_costs
from dpcomm.bench.progress import Progress
from dpcomm.bench.units import BenchError

PRIVATE = "dpcomm-private"
VOCABULARY, WIDTH, LAYERS = 4096, 512, 8


class Transformer(nn.Module):
    """An encoder that predicts a token at each position: 27.3 million parameters, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length) int64 -> (batch, length, vocabulary); input and output embedding tied."""
        return self.encoder(self.embedding(tokens)) @ self.embedding.weight.T


def backward(model: nn.Module, tokens: torch.Tensor) -> None:
    """One forward and backward pass."""
    logits = model(tokens[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def asked_for(names: list[str], wire: str) -> list[BackendSpec]:
    """What to make for each name of --backends."""
    specs: list[BackendSpec] = []
    for name in names:
        [spec] = expand(["dpcomm" if name == PRIVATE else name], [wire], ["auto"])
        if name == PRIVATE:
            spec = dataclasses.replace(spec, label=PRIVATE, shared_buckets=False)
        specs.append(spec)
    if len({spec.label for spec in specs}) < len(specs):
        raise BenchError("--backends has a name twice")
    return specs


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs all backends; returns the JSON."""
    specs = asked_for(arguments.backends.split(","), arguments.wire)
    replicas: list[Replica] = []
    tokens = torch.randint(0, VOCABULARY, (arguments.batch, 65))
    for spec in specs:
        backend = create_backend(spec, arguments.wire_links, timeout_s=120)
        if not isinstance(backend, TorchBackend):
            raise BenchError(f"{spec.name} is no backend of torch.distributed")
        torch.manual_seed(1)
        model = DistributedDataParallel(Transformer(), process_group=backend.group)
        replicas.append(Replica(model, functools.partial(backward, model, tokens)))
    torch.manual_seed(1)
    alone = silent(Transformer())
    replicas.append(Replica(alone, functools.partial(backward, alone, tokens)))
    for replica in replicas:  # DDP rebuilds its buckets after the first step
        for _ in range(2):
            replica.backward()
    progress = Progress(arguments.pairs * len(replicas), on=dist.get_rank() == 0)
    progress.describe("DDP steps")
    *costs, ddp = step_costs(replicas, arguments.pairs, progress.tick)
    progress.close()
    parameters = sum(p.numel() for p in replicas[0].model.parameters())
    return {
        "world_size": dist.get_world_size(),
        "torch": torch.__version__,
        "parameters": parameters,
        "pairs": arguments.pairs,
        "reference": specs[-1].label,
        "ddp_cpu_ms": round(ddp.cpu_ms, 3),
        "backends": {
            spec.label: {
                "synchronisation_cpu_ms": round(cost.cpu_ms, 3),
                "synchronisation_ratio": round(cost.cpu_ms / costs[-1].cpu_ms, 4),
                "communication_cpu_ms": round(cost.cpu_ms - ddp.cpu_ms, 3),
                "communication_cpu_error_ms": round(
                    math.hypot(cost.cpu_error_ms, ddp.cpu_error_ms), 3
                ),
                "communication_ratio": round(
                    (cost.cpu_ms - ddp.cpu_ms) / (costs[-1].cpu_ms - ddp.cpu_ms), 4
                ),
                "step_ms": round(cost.synchronised_ms, 3),
                "step_cpu_ms": round(cost.synchronised_cpu_ms, 3),
                "compute_ms": round(cost.alone_ms, 3),
                "cpu_pairs_ms": [round(value, 3) for value in cost.cpu_pairs_ms],
            }
            for spec, cost in zip(specs, costs, strict=True)
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backends", default=f"dpcomm,{PRIVATE},gloo", help="the last is the reference"
    )
    parser.add_argument("--pairs", type=int, default=15, help="steps with and without sync (15)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 64 tokens a rank (4)")
    parser.add_argument("--wire", default="native", help="dpcomm's wire format")
    parser.add_argument("--wire-links", default="network", choices=("network", "all"))
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --standalone --nproc-per-node 2 bench/ddp_step.py")
    dist.init_process_group("gloo")
    try:
        result = measure(arguments)
        if dist.get_rank() == 0:
            print(json.dumps(result, indent=1))
    except BenchError as error:
        print(f"ddp_step: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
