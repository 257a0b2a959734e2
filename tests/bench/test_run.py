"""The command under torchrun, two ranks, with a deadline; and one rank with a faulty backend."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402

import dpcomm  # noqa: E402
from dpcomm.bench.backends import BackendSpec, TorchBackend  # noqa: E402
from dpcomm.bench.cases import Case  # noqa: E402
from dpcomm.bench.runner import Plan, measure  # noqa: E402

DEADLINE_S = 60
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
WITH_DPCOMM = dist.is_backend_available("dpcomm") and hasattr(dpcomm, "Options")
BACKENDS = "communicator,dpcomm,gloo" if WITH_DPCOMM else "communicator,gloo"


def environment() -> dict[str, str]:
    """This one, with this dpcomm first on the path and no variable of a rank."""
    kept = {k: v for k, v in os.environ.items() if k not in PLACE}
    home = str(Path(dpcomm.__file__).parents[1])
    return {**kept, "PYTHONPATH": home, "OMP_NUM_THREADS": "1"}


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The benchmark as a user starts it, two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    return subprocess.run(
        [*command, "-m", "dpcomm.bench", *arguments],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def bench(folder: Path, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """The same without torchrun, which takes seconds to start. Returns rank 0's output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(max(ranks, 1)):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        place = {**place, "MASTER_PORT": port} if ranks else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "dpcomm.bench", *arguments],
                cwd=folder,
                env={**environment(), **place},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len({process.returncode for process in processes}) == 1, outputs
    first = processes[0]
    return subprocess.CompletedProcess(first.args, first.returncode, *outputs[0])


def table_lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if line and not line.startswith("#")]


def test_all_reduce_of_every_backend(tmp_path: Path) -> None:
    run = torchrun(
        tmp_path, "--sizes", "8,1000,70000", "--backends", BACKENDS, "-n", "3", "--rounds", "2",
        "-c", "2", "--cpu", "--min", "--output", "x.json",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    names = BACKENDS.split(",")
    lines = table_lines(run.stdout)
    assert [(int(line[0]), line[-1]) for line in lines] == [
        (size, name) for size in (8, 1000, 70000) for name in names
    ]
    assert "# Out of bounds values : 0 OK" in run.stdout
    assert "\x1b" not in run.stdout + run.stderr  # no progress bar where there is no terminal
    result = json.loads((tmp_path / "x.json").read_text())
    assert (result["world_size"], result["hosts"]) == (2, 1)
    assert len(result["rows"]) == 3 * (len(names) + 1)  # the communicator has both placements
    for row in result["rows"]:
        assert (row["wrong"], row["iterations"], len(row["rounds_us"])) == (0, 3, 2)
        assert 0 < row["min_us"] <= row["time_us"]
        assert row["cpu_us"] > 0
        assert row["busbw_gbps"] == row["algbw_gbps"]
        assert row["reference"] == "gloo"


def test_all_operations_and_types_note_what_is_skipped(tmp_path: Path) -> None:
    run = bench(
        tmp_path, "--sizes", "100", "-o", "all", "-d", "all", "--backends", BACKENDS, "-n", "1",
        "--rounds", "1", "-w", "0", "--output", "x.csv",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "# skipped: gloo, premul of float half" in run.stdout
    assert "# skipped: communicator, premul of int8" in run.stdout
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["wrong"] for row in rows} == {"0"}
    pairs = {(row["op"], row["dtype"]) for row in rows if row["backend"] == "communicator"}
    assert len(pairs) == 5 * 8 + 4  # premul: floating types


@pytest.mark.parametrize("collective", ["broadcast", "all_gather", "reduce_scatter"])
def test_other_collectives(tmp_path: Path, collective: str) -> None:
    run = bench(
        tmp_path, "--collective", collective, "-b", "8", "-e", "80000", "-f", "100", "-r", "1",
        "--backends", "communicator,gloo", "-n", "2", "--rounds", "1",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = table_lines(run.stdout)
    assert [line[0] for line in lines] == ["8", "8", "800", "800", "80000", "80000"]
    assert {line[4] for line in lines} == {"1" if collective == "broadcast" else "-1"}
    assert "# Out of bounds values : 0 OK" in run.stdout


def test_a_lossy_wire_keeps_its_bound(tmp_path: Path) -> None:
    name = "dpcomm" if WITH_DPCOMM else "communicator"
    run = bench(
        tmp_path, "--sizes", "100K", "--wire", "fp16,bf16", "--wire-links", "all", "-n", "2",
        "--rounds", "1", "-c", "2", "--backends", f"{name},gloo-fp16hook",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert [line[-1] for line in table_lines(run.stdout)] == [
        f"{name}/fp16",
        f"{name}/bf16",
        "gloo-fp16hook",
    ]
    assert "documented error bound" in run.stdout


@pytest.mark.parametrize(
    ("ranks", "arguments", "complaint"),
    [
        (0, ["-b", "8"], "torchrun --standalone --nproc-per-node 2 -m dpcomm.bench -b 8"),
        (1, ["--backends", "smoke"], "no backend 'smoke' is known"),
        (1, ["--backends", "gloo", "-r", "4"], "there are 1 ranks"),
        (0, ["-b", "8Q"], "'8Q' is not a size"),
        (0, ["-d", "float,quad"], "'quad' is none of"),
        (0, ["--output", "x.txt"], ".json or .csv"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, ranks: int, arguments: list[str], complaint: str
) -> None:
    run = bench(tmp_path, *arguments, ranks=ranks)
    assert run.returncode != 0
    assert complaint in run.stderr
    assert "dpcomm/bench" not in run.stderr  # no traceback of ours


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class FaultyBackend(TorchBackend):
    """gloo, but some elements of a result are wrong."""

    wrong_elems = 0

    def operation(self, case: Case):  # type: ignore[no-untyped-def]
        run = super().operation(case)

        def faulty(input: torch.Tensor, output: torch.Tensor) -> None:
            run(input, output)
            output[: self.wrong_elems] += 1

        return faulty


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrong_elems", [0, 1, 77])
def test_wrong_results_of_a_backend_are_counted(wrong_elems: int) -> None:
    backend = FaultyBackend(BackendSpec("faulty", label="faulty"), dist.group.WORLD)
    backend.wrong_elems = wrong_elems
    plan, ticks = Plan(iterations=2, rounds=3, checks=2), []
    case = Case("all_reduce", "float", "sum", 4000, 1)
    cells = measure(case, [backend], plan, lambda: ticks.append(1))
    assert [(cell.wrong, cell.iterations) for cell in cells] == [(2 * wrong_elems, 2)]
    assert len(cells[0].round_us) == len(ticks) == 3


class CountingBackend(TorchBackend):
    """gloo that writes down who was called."""

    calls: ClassVar[list[str]] = []

    def operation(self, case: Case):  # type: ignore[no-untyped-def]
        run = super().operation(case)

        def counted(input: torch.Tensor, output: torch.Tensor) -> None:
            self.calls.append(self.spec.label)
            run(input, output)

        return counted


@pytest.mark.usefixtures("one_rank")
def test_backends_take_turns_in_rotating_order() -> None:
    CountingBackend.calls = []
    backends = [CountingBackend(BackendSpec(n, label=n), dist.group.WORLD) for n in ("a", "b", "c")]
    plan = Plan(iterations=2, warmup=0, rounds=3, checks=0)
    measure(Case("all_reduce", "float", "sum", 64, 1), backends, plan)
    # Three calls a turn: one that lines the ranks up, two on the clock.
    turns = CountingBackend.calls[::3]
    assert len(CountingBackend.calls) == 3 * len(turns)
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
