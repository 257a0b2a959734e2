"""What the variables of launchers are read as; pure."""

from __future__ import annotations

import itertools
import random

import pytest

from dpcomm import UsageError
from dpcomm.rank_variables import expand_hosts, find, port_of_job

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODELIST": "gpu[07-09,12]",
    "SLURM_JOB_ID": "4711",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_ess_base_jobid": "577961985",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "2",
    "MV2_COMM_WORLD_SIZE": "3",
    "MV2_COMM_WORLD_LOCAL_RANK": "2",
    "MV2_COMM_WORLD_LOCAL_SIZE": "3",
    "PMI_RANK": "2",
}
LOCAL = "127.0.0.1"

READ = [
    ({}, ("single", 0, 1, 0, "", 0)),
    ({"RANK": "", "SLURM_PROCID": ""}, ("single", 0, 1, 0, "", 0)),
    ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, ("single", 0, 1, 0, "", 0)),  # salloc's shell
    (TORCHRUN, ("torchrun", 5, 8, 1, "node7", 29500)),
    ({"RANK": "0", "WORLD_SIZE": "1"}, ("torchrun", 0, 1, 0, "", 0)),
    (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"},
        ("torchrun", 1, 2, 1, "localhost", 1234),
    ),
    # A launcher that was started by another one: its complete set counts.
    (TORCHRUN | SLURM | OPEN_MPI, ("torchrun", 5, 8, 1, "node7", 29500)),
    (SLURM, ("SLURM", 3, 4, 1, "gpu07", port_of_job("4711"))),
    (
        SLURM | {"SLURM_STEP_NODELIST": "gpu12,gpu[07-09]", "SLURM_STEP_ID": "0"},
        ("SLURM", 3, 4, 1, "gpu12", port_of_job("4711", "0")),
    ),
    (SLURM | {"SLURM_STEP_NUM_TASKS": "5"}, ("SLURM", 3, 5, 1, "gpu07", port_of_job("4711"))),
    (SLURM | {"SLURM_NODELIST": "here"}, ("SLURM", 3, 4, 1, LOCAL, port_of_job("4711"))),
    (SLURM | {"MASTER_ADDR": "m", "MASTER_PORT": "77"}, ("SLURM", 3, 4, 1, "m", 77)),
    (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "ENVIRONMENT": "BATCH"},
        ("SLURM", 0, 1, 0, "", 0),
    ),
    (OPEN_MPI, ("Open MPI", 1, 2, 1, LOCAL, port_of_job("577961985"))),
    # mpirun in a batch script, whose own task 0 all ranks inherit.
    (
        OPEN_MPI | SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        ("Open MPI", 1, 2, 1, LOCAL, port_of_job("577961985", "4711")),
    ),
    (
        OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"} | SLURM,
        ("Open MPI", 1, 2, 0, "gpu07", port_of_job("577961985", "4711")),
    ),
    (MPICH, ("MPI (PMI)", 1, 3, 1, LOCAL, 29400)),
    (MPICH | {"PMI_JOBID": "kvs_9"}, ("MPI (PMI)", 1, 3, 1, LOCAL, port_of_job("kvs_9"))),
    (MVAPICH, ("MVAPICH", 2, 3, 2, LOCAL, 29400)),
    (
        {"PMIX_RANK": "1", "PMIX_NAMESPACE": "n@1", "WORLD_SIZE": "2", "MASTER_ADDR": "::1"},
        ("PMIx", 1, 2, 1, "::1", port_of_job("n@1")),
    ),
]


@pytest.mark.parametrize(("env", "expected"), READ)
def test_what_launchers_set(env: dict[str, str], expected: tuple[object, ...]) -> None:
    found = find(env)
    place = (found.launcher, found.rank, found.world_size, found.local_rank)
    assert (*place, found.master_addr, found.master_port) == expected


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


BAD = [
    (without(TORCHRUN, "RANK"), ["WORLD_SIZE is set", "RANK is not"]),
    (without(TORCHRUN, "WORLD_SIZE"), ["RANK is set", "WORLD_SIZE is not"]),
    (without(TORCHRUN, "MASTER_ADDR"), ["MASTER_ADDR is not"]),
    (without(TORCHRUN, "MASTER_PORT"), ["MASTER_PORT is not"]),
    (without(TORCHRUN, "LOCAL_RANK"), ["LOCAL_RANK is not set"]),
    (without(TORCHRUN, "RANK", "WORLD_SIZE"), ["LOCAL_RANK is set", "RANK and WORLD_SIZE are not"]),
    (TORCHRUN | {"RANK": "8"}, ["RANK=8", "WORLD_SIZE=8"]),
    (TORCHRUN | {"RANK": "-1"}, ["RANK='-1'"]),
    (TORCHRUN | {"WORLD_SIZE": "two"}, ["WORLD_SIZE='two'"]),
    (TORCHRUN | {"LOCAL_RANK": "4"}, ["LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4"]),
    (TORCHRUN | {"MASTER_PORT": "70000"}, ["MASTER_PORT=70000"]),
    (without(SLURM, "SLURM_NTASKS"), ["SLURM_PROCID is set", "SLURM_NTASKS"]),
    (without(SLURM, "SLURM_LOCALID"), ["SLURM_LOCALID"]),
    (without(SLURM, "SLURM_NODELIST"), ["SLURM_NODELIST", "MASTER_ADDR"]),
    (SLURM | {"SLURM_PROCID": "4"}, ["SLURM_PROCID=4", "SLURM_NTASKS=4"]),
    (SLURM | {"SLURM_NODELIST": "gpu[3-1]"}, ["SLURM_NODELIST='gpu[3-1]'"]),
    (SLURM | {"ENVIRONMENT": "BATCH"}, ["SLURM_NTASKS=4", "SLURM_STEP_ID", "srun"]),
    (SLURM | {"RANK": "0"}, ["RANK=0", "SLURM_PROCID=3"]),
    (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK", "PMIX_RANK"), ["OMPI_COMM_WORLD_RANK is not"]),
    (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), ["OMPI_COMM_WORLD_SIZE"]),
    (without(OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"), ["MASTER_ADDR", "Open MPI"]),
    # A forgotten export in the shell would make worlds of one.
    (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, ["RANK=0", "OMPI_COMM_WORLD_RANK=1"]),
    (OPEN_MPI | {"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "OMPI_COMM_WORLD_SIZE=2"]),
    (OPEN_MPI | {"LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "OMPI_COMM_WORLD_LOCAL_RANK=1"]),
    ({"PMI_SIZE": "2"}, ["PMI_SIZE=2", "PMI_RANK"]),
    ({"PMIX_RANK": "0"}, ["PMIX_RANK", "WORLD_SIZE"]),
]


@pytest.mark.parametrize(("env", "parts"), BAD)
def test_errors_name_the_variables(env: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        find(env)
    for part in parts:
        assert part in str(caught.value)


HOSTS = [
    ("a", ["a"]),
    ("a,b", ["a", "b"]),
    ("host[1-3,5]", ["host1", "host2", "host3", "host5"]),
    ("n[08-11]", ["n08", "n09", "n10", "n11"]),
    ("n[098-101],x", ["n098", "n099", "n100", "n101", "x"]),
    ("r[1-2]n[0-1]-ib", ["r1n0-ib", "r1n1-ib", "r2n0-ib", "r2n1-ib"]),
    ("a[7],b-c.d[2,1]", ["a7", "b-c.d2", "b-c.d1"]),
    (" a , b[1]", ["a", "b1"]),
]


@pytest.mark.parametrize(("text", "hosts"), HOSTS)
def test_lists_of_hosts(text: str, hosts: list[str]) -> None:
    assert list(expand_hosts(text)) == hosts


@pytest.mark.parametrize(
    "text", ["", ",", "a,,b", "a[1-", "a]1[", "a[]", "a[x]", "a[1-2-3]", "a b"]
)
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="no list of hosts"):
        list(expand_hosts(text, "X"))


def test_long_lists_are_not_made() -> None:
    assert list(itertools.islice(expand_hosts("n[0-999999999999]"), 2)) == ["n0", "n1"]


def test_drawn_lists() -> None:
    draw = random.Random()
    for _ in range(200):
        text, hosts = [], []
        for _ in range(draw.randint(1, 4)):
            prefix, width = draw.choice(["n", "gpu-", "a.b"]), draw.randint(1, 4)
            first = draw.randrange(10**width)
            last = first + draw.randrange(5)
            text.append(f"{prefix}[{first:0{width}}-{last}]")
            hosts += [f"{prefix}{number:0{width}}" for number in range(first, last + 1)]
        assert list(expand_hosts(",".join(text))) == hosts, text


def test_ports_of_jobs() -> None:
    ports = [port_of_job(str(job)) for job in range(2000)]
    assert min(ports) >= 16000
    assert max(ports) < 32000
    assert len(set(ports)) > 1800
    assert port_of_job("12", "3") != port_of_job("1", "23")
