"""torchft on dpcomm: a peer dies, and the survivors go on, three ranks becoming two.

    python examples/torchft_digits.py

The script starts torchft's lighthouse and three replicas of itself. After 20 steps the last replica
kills itself. The others get a dpcomm.PeerError in that step, agree on a quorum of two, make a new
group on dpcomm and go on. Nothing is started again and no checkpoint is read.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchft import Manager, Optimizer
from torchft.coordination import LighthouseServer
from torchft.process_group import ProcessGroupWrapper
from train_digits import datasets, network

import dpcomm.backend

REPLICAS = 3
STEPS = 60
DEATH_STEP = 20
PATIENCE = timedelta(seconds=30)


class ProcessGroupDpcomm(ProcessGroupWrapper):
    """torchft's process group, made anew on dpcomm for each quorum."""

    def _create_pg(self, store: Any, rank: int, world_size: int) -> dist.ProcessGroup:
        how = dist.distributed_c10d._DistributedBackendOptions()
        how.store, how.group_rank, how.group_size = store, rank, world_size
        how.timeout, how.group_id = self._timeout, f"torchft_{self._quorum_id}"
        how.global_ranks_in_group = list(range(world_size))
        dpcomm.backend.register()
        backend = dist.Backend._plugins["DPCOMM"].creator_fn(how, None)
        group = dist.ProcessGroup(store, rank, world_size)
        custom = dist.ProcessGroup.BackendType.CUSTOM
        group._set_default_backend(custom)
        group._register_backend(torch.device("cpu"), custom, backend)
        return group

    def getBackendName(self) -> str:  # noqa: N802  torch's name
        return "torchft-dpcomm"


def say(text: str) -> None:
    """Prints a line in one piece, as other replicas print too."""
    print(f"{text}\n", end="", flush=True)


def train(replica: int) -> None:
    """One replica, which is a world of its own to torch."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.manual_seed(1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    manager = Manager(
        pg=ProcessGroupDpcomm(timeout=PATIENCE),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=2,
        replica_id=f"replica_{replica}",
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        hostname="127.0.0.1",
        timeout=PATIENCE,
        use_async_quorum=False,
    )
    data, held_out = datasets()
    managed = Optimizer(manager, optimizer)
    draw = torch.Generator().manual_seed(replica)
    sizes: list[int] = []
    while manager.current_step() < STEPS:
        step = manager.current_step()
        chosen = torch.randint(len(data), (32,), generator=draw)
        images, labels = data[chosen]
        managed.zero_grad()  # asks for a quorum
        if replica == REPLICAS - 1 and step == DEATH_STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        nn.functional.cross_entropy(model(images), labels).backward()
        # torchft's own DistributedDataParallel stumbles over errors that wait() raises.
        works = [manager.allreduce(parameter.grad) for parameter in model.parameters()]
        for work in works:
            work.wait()  # an error is kept by the manager
        error = manager.errored()
        managed.step()  # only if all of the quorum had no error
        size = manager.num_participants()
        if sizes[-1:] != [size]:
            sizes.append(size)
            say(f"replica {replica}, step {step}: {size} ranks")
        if error is not None:
            text = str(error.original_exception).splitlines()[0]
            say(f"replica {replica}, step {step}: {text}")
    model.eval()
    images, labels = held_out.tensors
    right = (model(images).argmax(1) == labels).float().mean()
    say(f"replica {replica}, step {STEPS}: accuracy {float(right):.1%}")
    manager.shutdown(wait=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replica", type=int)
    replica = parser.parse_args().replica
    if replica is not None:
        train(replica)
        return 0
    lighthouse = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=3000, heartbeat_timeout_ms=1000
    )
    variables = {**os.environ, "TORCHFT_LIGHTHOUSE": lighthouse.address()}
    replicas = [
        subprocess.Popen([sys.executable, __file__, "--replica", str(number)], env=variables)
        for number in range(REPLICAS)
    ]
    try:
        codes = [process.wait(timeout=300) for process in replicas]
    finally:
        for process in replicas:
            process.kill()
        lighthouse.shutdown()
    return 0 if codes == [0, 0, -signal.SIGKILL] else 1


if __name__ == "__main__":
    sys.exit(main())
