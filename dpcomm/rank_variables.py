"""Who am I? What torchrun, MPI and SLURM tell a process by environment variables. Pure functions.

Three families are known, and asked in this order, as one that starts another one leaves its own
variables behind:

1. torch's own, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: torchrun, Ray, DeepSpeed,
   Accelerate, dpcomm.launch. A complete set is believed whatever else is there.
2. MPI: Open MPI, MVAPICH, and what MPICH, Intel MPI and Cray set for PMI; PMIx alone.
3. SLURM's steps (srun).

Without any of them the process is alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from itertools import islice

from dpcomm.errors import UsageError

__all__ = ["Found", "expand_hosts", "find", "port_of_job"]

DEFAULT_PORT = 29400
_PORTS = range(16000, 32000)  # below those that systems hand out by themselves
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True)
class Family:
    """The variables of one launcher; of each tuple the first that is set counts."""

    name: str
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]
    job: tuple[str, ...]  # together they name the job: the same on all its ranks


_TORCH = Family("torchrun", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",), ())
_MPI = (
    Family(
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE"),
    ),
    Family(
        "MVAPICH",
        ("MV2_COMM_WORLD_RANK", "MVP_COMM_WORLD_RANK"),
        ("MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE"),
        ("MV2_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_RANK"),
        ("MV2_COMM_WORLD_LOCAL_SIZE", "MVP_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_JOBID",),
    ),
    Family(
        "MPI (PMI)",
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE"),
        ("PMI_JOBID", "PALS_APID", "I_MPI_HYDRA_UUID"),
    ),
)
_SLURM = Family(
    "SLURM",
    ("SLURM_PROCID",),
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    ("SLURM_LOCALID",),
    (),
    ("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_STEP_ID", "SLURM_STEPID"),
)
# Only the rank: the other figures come from SLURM or from the user.
_PMIX = Family("PMIx", ("PMIX_RANK",), (), ("PMIX_LOCAL_RANK",), (), ("PMIX_NAMESPACE",))
_NODES = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")


@dataclasses.dataclass(frozen=True)
class Found:
    """What the environment says.

    Attributes:
        launcher: name of the family, or "single" for a process that is alone.
        rank, world_size, local_rank: this process.
        master_addr, master_port: where rank 0's store is; empty and 0 for a process that is alone.
        whence: where address and port come from, for error messages.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    master_addr: str = ""
    master_port: int = 0
    whence: str = ""


def find(env: Mapping[str, str]) -> Found:
    """Reads `env`, such as os.environ. An empty value counts as not set.

    Raises:
        UsageError: variables that are missing, malformed or contradict each other; names them.
    """
    if _is_set(env, "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        return _found(env, _TORCH)
    native = next((family for family in (*_MPI, _SLURM) if _first(env, family.rank)), None)
    if native is None and _first(env, _PMIX.rank):
        native = _PMIX
    if native is None:
        if not (env.get("RANK") or env.get("WORLD_SIZE")):
            _check_leftovers(env)
            return Found("single", 0, 1, 0)
        return _found(env, _TORCH)
    if native is _SLURM:
        _check_srun(env)
    _check_agreement(env, native)
    return _found(env, native)


def _found(env: Mapping[str, str], family: Family) -> Found:
    rank_name, rank = _number(env, family, "rank", _TORCH.rank)
    size_name, world_size = _number(env, family, "world_size", _TORCH.world_size)
    if world_size < 1 or rank >= world_size:
        raise UsageError(f"{rank_name}={rank} and {size_name}={world_size} contradict each other")
    address, port, whence = "", 0, ""
    if world_size > 1:
        address, whence = _address(env, family, world_size)
        port, whence_port = _port(env, family)
        whence = f"{whence}, {whence_port}"
    local_rank = _local_rank(env, family, rank, world_size, address)
    return Found(family.name, rank, world_size, local_rank, address, port, whence)


def _local_rank(
    env: Mapping[str, str], family: Family, rank: int, world_size: int, address: str
) -> int:
    names = family.local_rank + _TORCH.local_rank
    name = _first(env, names)
    if name is None:
        if world_size == 1:
            return 0
        if address in _LOOPBACK:
            return rank  # all ranks are on this host
        raise UsageError(f"{' or '.join(dict.fromkeys(names))} is not set ({family.name})")
    local_rank = _integer(env, name)
    size_name = _first(env, family.local_world_size)
    if local_rank >= world_size:
        raise UsageError(f"{name}={local_rank} contradicts a world of {world_size} ranks")
    if size_name is not None and local_rank >= _integer(env, size_name):
        raise UsageError(f"{name}={local_rank} and {size_name}={env[size_name]} contradict")
    return local_rank


def _address(env: Mapping[str, str], family: Family, world_size: int) -> tuple[str, str]:
    """Rank 0's host, and where that was read."""
    if env.get("MASTER_ADDR"):
        return env["MASTER_ADDR"], "MASTER_ADDR"
    if family is _TORCH:
        raise UsageError("RANK and WORLD_SIZE are set, but MASTER_ADDR is not")
    local_size = _first(env, family.local_world_size)
    if local_size is not None and _integer(env, local_size) == world_size:
        return "127.0.0.1", f"this host, as {local_size}={world_size}"
    nodes = _first(env, _NODES)
    if nodes is None:
        wanted = "MASTER_ADDR or SLURM_NODELIST" if family is _SLURM else "MASTER_ADDR"
        raise UsageError(f"{wanted} is not set: {family.name} does not say on which host rank 0 is")
    # The first two are enough to know whether there is more than one.
    hosts = list(islice(expand_hosts(env[nodes], nodes), 2))
    if len(hosts) == 1:
        return "127.0.0.1", f"this host, the only one of {nodes}"
    return hosts[0], f"first of {nodes}"


def _port(env: Mapping[str, str], family: Family) -> tuple[int, str]:
    """The port of rank 0's store, and where that was read."""
    if env.get("MASTER_PORT"):
        port = _integer(env, "MASTER_PORT")
        if not 0 < port < 65536:
            raise UsageError(f"MASTER_PORT={port} is no port")
        return port, "MASTER_PORT"
    if family is _TORCH:
        raise UsageError("RANK and WORLD_SIZE are set, but MASTER_PORT is not")
    names = [name for name in family.job + _SLURM.job if env.get(name)]
    if not names:
        return DEFAULT_PORT, f"the default port, as {family.name} names no job"
    names = list(dict.fromkeys(names))
    return port_of_job(*(env[name] for name in names)), f"made from {', '.join(names)}"


def port_of_job(*names: str) -> int:
    """A port in 16000..31999 that follows from what names a job, on all its ranks alike.

    Two jobs get the same port with a probability of 1/16000.
    """
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    return _PORTS[int.from_bytes(digest[:8], "big") % len(_PORTS)]


def expand_hosts(text: str, name: str = "the list") -> Iterator[str]:
    """The hosts of a list as SLURM writes it: "a[1-3,07-08],b" is a1 a2 a3 a07 a08 b. Lazy.

    A host may have several brackets. Leading zeros give the width.

    Args:
        text: the list.
        name: of the variable, for the error message.

    Raises:
        UsageError: a list that is malformed.
    """
    item = r"(?:[^\[\],\s]|\[[^\[\]]*\])+"
    if not re.fullmatch(rf"\s*{item}(?:\s*,\s*{item})*\s*", text):
        raise UsageError(f"{name}={text!r} is no list of hosts")
    for host in re.findall(item, text):
        yield from _expand_host(host, name, text)


def _expand_host(host: str, name: str, text: str) -> Iterator[str]:
    head, bracket, rest = host.partition("[")
    if not bracket:
        yield head
        return
    inside, _, tail = rest.partition("]")
    for part in inside.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise UsageError(f"{name}={text!r} is no list of hosts: [{inside}]")
        for number in range(int(first), int(last) + 1):
            for end in _expand_host(tail, name, text):
                yield f"{head}{number:0{len(first)}d}{end}"


def _check_srun(env: Mapping[str, str]) -> None:
    """A batch script runs once, whatever the number of its tasks."""
    if env.get("ENVIRONMENT") != "BATCH" or _first(env, ("SLURM_STEP_ID", "SLURM_STEPID")):
        return
    size = _first(env, _SLURM.world_size)
    if size is not None and _integer(env, size) > 1:
        raise UsageError(
            f"{size}={env[size]}, but SLURM_STEP_ID is not set: the batch script itself started "
            "this process, once; start it by srun (or torchrun)"
        )


def _check_agreement(env: Mapping[str, str], native: Family) -> None:
    """RANK and the like, where they are set in part, must be what MPI or SLURM says."""
    for names, own in (
        (native.rank, "RANK"),
        (native.world_size, "WORLD_SIZE"),
        (native.local_rank, "LOCAL_RANK"),
    ):
        name = _first(env, names)
        if name is not None and env.get(own) and _integer(env, own) != _integer(env, name):
            raise UsageError(
                f"{own}={env[own]} and {name}={env[name]} contradict each other; unset {own}, or "
                "set all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )


def _check_leftovers(env: Mapping[str, str]) -> None:
    """A world size without a rank means that the rank was lost on the way."""
    for family in _MPI:
        name = _first(env, family.world_size)
        if name is not None and _integer(env, name) > 1:
            raise UsageError(f"{name}={env[name]}, but {' or '.join(family.rank)} is not set")
    if env.get("LOCAL_RANK"):
        raise UsageError("LOCAL_RANK is set, but RANK and WORLD_SIZE are not")


def _number(
    env: Mapping[str, str], family: Family, field: str, otherwise: tuple[str, ...]
) -> tuple[str, int]:
    names: tuple[str, ...] = getattr(family, field)
    if family is _PMIX and field == "world_size":
        names = ("PMIX_SIZE", *_SLURM.world_size)
    name = _first(env, names + otherwise)
    if name is None:
        wanted = " or ".join(dict.fromkeys(names + otherwise))
        there = next(name for names in (family.rank, family.world_size) for name in names
                     if env.get(name))  # fmt: skip
        raise UsageError(f"{there} is set ({family.name}), but {wanted} is not")
    return name, _integer(env, name)


def _integer(env: Mapping[str, str], name: str) -> int:
    value = env[name].strip()
    if not re.fullmatch(r"[0-9]+", value):
        raise UsageError(f"{name}={env[name]!r} is not a number")
    return int(value)


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if env.get(name)), None)


def _is_set(env: Mapping[str, str], *names: str) -> bool:
    return all(env.get(name) for name in names)
