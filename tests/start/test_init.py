"""dpcomm.init() in real processes, with the variables that launchers set."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
import torch.distributed as dist

import dpcomm

HOME = str(Path(dpcomm.__file__).parents[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def only(env: dict[str, str]) -> None:
    """Leaves of the launcher's variables only these."""
    starts = ("OMPI_", "PMI", "SLURM_", "MV2_", "TORCHELASTIC_", "MASTER_")
    for name in list(os.environ):
        if name.startswith(starts) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            del os.environ[name]
    os.environ.update(env)


def total(place: dpcomm.Place) -> float:
    x = torch.full((3,), float(place.rank + 1))
    dist.all_reduce(x)
    return float(x[2])


@pytest.mark.parametrize("launcher", ["SLURM", "Open MPI", "MPI (PMI)", "torchrun"])
def test_ranks_meet(launcher: str) -> None:
    job, port = str(time.time_ns()), str(free_port())

    def variables(rank: str) -> dict[str, str]:
        return {
            "SLURM": {
                "SLURM_PROCID": rank,
                "SLURM_NTASKS": "2",
                "SLURM_LOCALID": rank,
                "SLURM_NODELIST": "no-such-host[3]",
                "SLURM_JOB_ID": job,
            },
            "Open MPI": {
                "OMPI_COMM_WORLD_RANK": rank,
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": rank,
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
                "OMPI_MCA_ess_base_jobid": job,
            },
            "MPI (PMI)": {
                "PMI_RANK": rank,
                "PMI_SIZE": "2",
                "MPI_LOCALRANKID": rank,
                "MPI_LOCALNRANKS": "2",
                "MASTER_PORT": port,
            },
            "torchrun": {
                "RANK": rank,
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            },
        }[launcher]

    def rank_of() -> tuple[dpcomm.Place, float, str, str]:
        only(variables(os.environ["RANK"]))
        place = dpcomm.init(dpcomm.Options(algorithm="ring"), timeout=30)
        assert dpcomm.init() is place  # the second time does nothing
        assert dist.get_backend() == "dpcomm"
        first = total(place)
        dist.destroy_process_group()
        again = dpcomm.init(timeout=30)
        assert (again.rank, again.world_size, again.local_rank) == (place.rank, 2, place.rank)
        second = total(again)
        assert first == second
        return place, first, os.environ["LOCAL_RANK"], os.environ["MASTER_PORT"]

    for rank, got in enumerate(dpcomm.launch(rank_of, 2, timeout=60)):
        assert got[0] == dpcomm.Place(rank, 2, rank, launcher)
        assert got[1:3] == (3.0, str(rank))
        assert 1024 < int(got[3]) < 65536


def test_alone_and_what_is_refused() -> None:
    def scenario() -> None:
        only({})
        with pytest.raises(dpcomm.UsageError, match="pg_options"):
            dpcomm.init({"wire": "fp16"})  # type: ignore[arg-type]
        with pytest.raises(dpcomm.UsageError, match="timeout"):
            dpcomm.init(timeout=-1)
        assert dpcomm.init() == dpcomm.Place(0, 1, 0, "single")
        assert total(dpcomm.init()) == 1.0
        assert "RANK" not in os.environ
        dist.destroy_process_group()

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        with pytest.raises(dpcomm.UsageError, match="already"):
            dpcomm.init()
        dist.destroy_process_group()

        # One that somebody else made is as good, also for one device of several.
        for backend in ("dpcomm", "cpu:dpcomm,cuda:gloo"):
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
            assert dpcomm.init().world_size == 1
            dist.destroy_process_group()

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            only({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
            with pytest.raises(dpcomm.UsageError, match=rf"{port} \(MASTER_ADDR, MASTER_PORT\)"):
                dpcomm.init(timeout=2)
        os.environ["RANK"] = "1"
        with pytest.raises(dpcomm.TimeoutError, match=rf"rank 1 found no store .*{port}"):
            dpcomm.init(timeout=1)
        assert not dist.is_initialized()

    dpcomm.launch(scenario, 1, timeout=60)


def test_a_missing_rank_is_named() -> None:
    def scenario() -> None:
        if os.environ["RANK"] == "1":
            return
        began = time.monotonic()
        with pytest.raises(dpcomm.TimeoutError, match="rank"):
            dpcomm.init(timeout=1)
        assert time.monotonic() - began < 5

    dpcomm.launch(scenario, 2, timeout=60)


def test_a_start_by_the_shell(tmp_path: Path) -> None:
    """A process of its own with a plain command, which nobody prepared."""
    script = tmp_path / "alone.py"
    script.write_text("import dpcomm\nprint(dpcomm.init())\n")
    env = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**env, "PYTHONPATH": HOME},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "Place(rank=0, world_size=1, local_rank=0, launcher='single')\n", done
