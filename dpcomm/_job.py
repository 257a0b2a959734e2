"""The job that this process is a rank of, if any, for the tools: who else is there, and where."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpcomm.stores import Store, TcpStore, TorchStore

__all__ = ["Job", "exchange", "find_job", "leave", "whereabouts"]


@dataclass(frozen=True)
class Job:
    """What torchrun and its like say in the environment."""

    rank: int
    world_size: int
    address: str
    port: int
    agent_store: bool

    def open_store(self, timeout: float) -> Store:
        """A store that all ranks reach: the launcher's, or one that rank 0 keeps."""
        if self.agent_store:  # torchrun keeps a store of torch's at this port
            from datetime import timedelta

            from torch.distributed import TCPStore  # type: ignore[attr-defined, unused-ignore]

            limit = timedelta(seconds=timeout)
            return TorchStore(TCPStore(self.address, self.port, is_master=False, timeout=limit))
        return TcpStore(self.address, self.port, self.rank, timeout)


def find_job(environment: Mapping[str, str]) -> Job | None:
    """The job of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; None if one of them is missing."""
    numbers = [environment.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    address = environment.get("MASTER_ADDR", "")
    if not address or not all(number.isdigit() for number in numbers):
        return None
    rank, world_size, port = (int(number) for number in numbers)
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    return Job(rank, world_size, address, port, agent)


def whereabouts(rank: int) -> dict[str, Any]:
    """Where this rank runs, as JSON can hold it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "boot": boot,
        "pid": os.getpid(),
        "cores": len(os.sched_getaffinity(0)),
    }


def exchange(job: Job, store: Store, what: str, own: Any, timeout: float) -> list[Any]:
    """What every rank gave, by rank; None for those that did not come within `timeout` seconds."""
    store.set(f"dpcomm/tools/{what}/{job.rank}", json.dumps(own).encode())
    all_ranks = []
    for rank in range(job.world_size):
        value = store.get(f"dpcomm/tools/{what}/{rank}", timeout)
        all_ranks.append(None if value is None else json.loads(value))
    return all_ranks


def leave(job: Job, store: Store, timeout: float) -> None:
    """Waits until every rank has read what it wants: rank 0 may keep the store."""
    exchange(job, store, "leave", None, timeout)
    if job.rank == 0 and not job.agent_store:
        for rank in range(1, job.world_size):
            store.get(f"dpcomm/tools/left/{rank}", timeout)
    else:
        store.set(f"dpcomm/tools/left/{job.rank}", b"1")
    if hasattr(store, "close"):
        store.close()
