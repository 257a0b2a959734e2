"""``dpcomm.init()``: makes the default process group from what the launcher says."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from typing import Any

from dpcomm import rank_variables
from dpcomm.backend import NAME, register
from dpcomm.errors import TimeoutError, UsageError
from dpcomm.options import Options, milliseconds

__all__ = ["Place", "init"]


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's place in the run.

    Attributes:
        rank: of this process among all, from 0.
        world_size: number of all.
        local_rank: of this process among those of its host, from 0; chooses the device.
        launcher: whose variables were read: "torchrun" (and all that set the same ones),
            "Open MPI", "MVAPICH", "MPI (PMI)", "PMIx", "SLURM", or "single".
    """

    rank: int
    world_size: int
    local_rank: int
    launcher: str


_made: Place | None = None  # by the last init(), which exports variables that look like torchrun's

_stores: dict[tuple[int, str, int], list[Any]] = {}  # (pid, host, port) -> [store, generation]


def init(pg_options: Options | None = None, timeout: float | timedelta | None = None) -> Place:
    """Makes torch's default process group on dpcomm, whoever started this process.

    Understands torchrun and all that sets its variables, Open MPI, MPICH, Intel MPI, MVAPICH, PMIx
    and SLURM's srun; a process that nobody started as a rank is a world of one. Every rank calls
    it, in its main thread as a rule, and it returns when all have come.

    Under SLURM the master is the first host of SLURM_STEP_NODELIST (or SLURM_NODELIST), under MPI
    this host if all ranks are on it. MASTER_ADDR and MASTER_PORT count where they are set. A port
    that is not set is made from the job's id, the same on all ranks (16000..31999); MPICH names no
    job, and gets port 29400.

    In a world of more than one rank it sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT in os.environ where they are not set, as frameworks such as Accelerate ask for them.

    Where the default group is there already and runs on dpcomm, nothing is done, and `pg_options`
    and `timeout` have no effect.

    Args:
        pg_options: of the group; the same on all ranks.
        timeout: of the start and of each operation, in seconds or as a timedelta; torch's 30 min
            where it is None, unless DPCOMM_TIMEOUT is set.

    Returns:
        Rank, world size, local rank and launcher.

    Raises:
        UsageError: variables that are missing, malformed or contradict each other (names them); a
            default group of another backend; a port that another process has.
        TimeoutError: ranks that did not come, or a store that nobody keeps.
        ImportError: torch is missing or another than the one built for.

    Cost: imports torch; one rendezvous through torch's TCPStore, and dpcomm's own start (own).
    """
    if pg_options is not None and not isinstance(pg_options, Options):
        raise UsageError(f"pg_options={pg_options!r} is not a dpcomm.Options")
    if timeout is not None:
        timeout = timedelta(milliseconds=milliseconds(timeout))
    import torch.distributed as dist

    register()
    if dist.is_initialized():
        return _existing(dist)
    found = rank_variables.find(os.environ)
    if found.world_size > 1:
        _export(found)
    _create(dist, found, pg_options, timeout)
    global _made
    _made = Place(found.rank, found.world_size, found.local_rank, found.launcher)
    return _made


def _existing(dist: Any) -> Place:
    backends = dist.get_backend_config()  # such as "cpu:dpcomm,cuda:dpcomm"
    if NAME not in {entry.rpartition(":")[2] for entry in backends.split(",")}:
        raise UsageError(
            f"the default process group is there already, on {backends}: call dpcomm.init() before "
            "whatever makes it, or torch.distributed.destroy_process_group() first"
        )
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if _made is not None and (_made.rank, _made.world_size) == (rank, world_size):
        return _made
    try:
        found = rank_variables.find(os.environ)
    except UsageError:  # the group was made without them
        return Place(rank, world_size, rank, NAME)
    if (found.rank, found.world_size) != (rank, world_size):
        return Place(rank, world_size, rank, NAME)
    return Place(rank, world_size, found.local_rank, found.launcher)


def _export(found: rank_variables.Found) -> None:
    for name in ("rank", "world_size", "local_rank", "master_addr", "master_port"):
        if not os.environ.get(name.upper()):
            os.environ[name.upper()] = str(getattr(found, name))


def _create(
    dist: Any, found: rank_variables.Found, pg_options: Options | None, timeout: timedelta | None
) -> None:
    try:
        store = _store(dist, found, timeout)
    except dist.DistNetworkError as error:
        where = f"{found.master_addr}:{found.master_port} ({found.whence})"
        if "already in use" in str(error) or "EADDRINUSE" in str(error):
            raise UsageError(
                f"another process listens at {where}; set MASTER_PORT to a free one"
            ) from error
        raise TimeoutError(f"rank {found.rank} found no store of rank 0 at {where}") from error
    dist.init_process_group(
        NAME,
        store=store,
        rank=found.rank,
        world_size=found.world_size,
        pg_options=pg_options,
        timeout=timeout,
    )


def _store(dist: Any, found: rank_variables.Found, timeout: timedelta | None) -> Any:
    """torch's store at the found address: kept by rank 0, or by the agent of torchrun.

    It is kept as long as this process lives, and each init() has a part of its own in it: rank 1
    may ask for the next group while rank 0 still lets go of the last one.
    """
    if found.world_size == 1:
        return dist.HashStore()
    key = (os.getpid(), found.master_addr, found.master_port)
    if key not in _stores:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        more = {} if timeout is None else {"timeout": timeout}
        _stores[key] = [
            dist.TCPStore(
                found.master_addr,
                found.master_port,
                found.world_size,
                is_master=found.rank == 0 and not agent,
                wait_for_workers=False,
                multi_tenant=True,
                **more,
            ),
            0,
        ]
    _stores[key][1] += 1
    store, generation = _stores[key]
    return dist.PrefixStore(f"dpcomm.init/{generation}", store)
