"""bench/peers.py: the form of its figures, that it sees wrong results and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpcomm

HOME = Path(dpcomm.__file__).parents[1]
BENCH = Path(__file__).parents[2] / "bench"
DEADLINE_S = 60
SHARED_MEMORY = Path("/dev/shm")

# Ranks with faults: kinds of calls made of dpcomm's, all of which leave a file in /dev/shm.
FAULTY_RANK = """
import mmap
import os
import sys
sys.path.insert(0, {bench!r})
import peer_calls
import peer_rank

class Littering(peer_calls.Dpcomm):
    def start(self, place):
        super().start(place)
        with open(f"/dev/shm/peers-test-{{os.getpid()}}", "w+b") as file:
            file.truncate(4096)
            self.mapped = mmap.mmap(file.fileno(), 4096)

class WrongAlways(Littering):
    def loop(self, prepared):
        super().loop(prepared)
        if self.place.rank == 1:
            for array in prepared:
                array[-1] += 1

class WrongLater(Littering):
    done = 0
    def loop(self, prepared):
        super().loop(prepared)
        self.done += len(prepared)
        if self.done > 3:
            prepared[0][len(prepared[0]) // 2] *= 3

class Dying(WrongLater):
    def loop(self, prepared):
        if self.done > 3:
            os._exit(7)
        peer_calls.Dpcomm.loop(self, prepared)
        self.done += len(prepared)

peer_rank.main({{"always": WrongAlways, "later": WrongLater, "dying": Dying}})
"""
DRIVER = """
import json
import sys
from pathlib import Path
sys.path.insert(0, {bench!r})
from peer_groups import PEERS, Peer
from peers import Plan, benchmark

program = Path("faulty_rank.py").resolve()
faulty = [Peer(name, name, program=program) for name in ("always", "later", "dying")]
peers = [PEERS[0], *faulty]
plan = Plan([4000], rounds=3, batch_s=0.002)
record, well = benchmark(peers, [2], plan, Path("."), limit_s=50)
print(json.dumps([record, well]))
"""


class Watched:
    """Starts programs that all carry a mark of this test in their environment."""

    def __init__(self, folder: Path) -> None:
        self._mark = f"PEERS_TEST={uuid.uuid4().hex}"
        self._folder = folder
        name, value = self._mark.split("=")
        kept = {k: v for k, v in os.environ.items() if not k.startswith("DPCOMM_")}
        paths = os.pathsep.join([str(HOME), str(BENCH)])
        self._variables = {**kept, name: value, "TMPDIR": str(folder), "PYTHONPATH": paths}
        self._shared_before = set(SHARED_MEMORY.iterdir())

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self._folder,
            env=self._variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str) -> tuple[int, str, str]:
        process = self.start(*command)
        try:
            output, errors = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
            process.wait()
        return process.returncode, output, errors

    def processes(self) -> list[int]:
        """Everything that was started, directly or not, and still is there."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self._mark.encode() in (
                    (entry / "environ").read_bytes().split(b"\0")
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def left_over(self, files: bool = True) -> list[str]:
        """Processes, files in /dev/shm and, with `files`, temporary ones; waits for their end."""
        end = time.monotonic() + 10
        while True:
            left = [f"process {pid}" for pid in self.processes()]
            left += [str(path) for path in set(SHARED_MEMORY.iterdir()) - self._shared_before]
            left += [str(p) for p in self._folder.glob("dpcomm-peers-*")] if files else []
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.05)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    yield watched
    for pid in watched.processes():
        os.kill(pid, signal.SIGKILL)


def test_figures_of_dpcomm_and_gloo(tmp_path: Path, watched: Watched) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    status, output, errors = watched.run(
        str(BENCH / "peers.py"), "--ranks", "2", "--sizes", "8,100K", "--rounds", "3",
        "--batch-ms", "2", "--peers", "dpcomm; gloo, dist; no-op, dist; copy; openmpi",
        "--environments", str(tmp_path / "none"), "--json", "x.json", "--plot", "x.png",
    )  # fmt: skip
    assert status == 0, errors
    assert watched.left_over() == []
    record = json.loads((tmp_path / "x.json").read_text())
    (run,) = record["runs"]
    assert run["skipped"] == [{"peer": "openmpi", "reason": "not installed (make peers)"}]
    assert [peer["peer"] for peer in run["peers"]] == [
        "dpcomm", "gloo, dist", "no-op, dist", "copy",
    ]  # fmt: skip
    assert all(peer["version"] for peer in run["peers"] if peer["peer"] != "copy")
    rows = {(row["peer"], row["size_bytes"]): row for row in run["rows"]}
    assert len(rows) == len(run["rows"]) == 7  # no copies of 8 bytes
    for (peer, size), row in rows.items():
        assert row["wrong"] == 0
        assert len(row["rounds_us"]) == 3
        assert row["calls"] >= 2
        assert row["others_load"] is None or 0 <= row["others_load"] <= 1
        assert row["min_us"] == min(row["rounds_us"]) <= row["time_us"]
        assert row["time_us"] == sorted(row["rounds_us"])[1]
        assert row["busbw_gbps"] == pytest.approx(size / row["time_us"] / 1e3, rel=0.01, abs=2e-6)
        own = rows["dpcomm", size]["time_us"]
        assert row["ratio"] == pytest.approx(row["time_us"] / own, rel=0.01, abs=1e-3)
        assert (row["roofline"] is None) == (size == 8 or peer in ("copy", "no-op, dist"))
    # 2 ranks move 4 S through memory, at the bandwidth of copies, which read and write S each.
    least = run["roofline_us"]["102400"]
    assert run["copy_gbps"] * least * 1e3 == pytest.approx(4 * 102400, rel=0.01)
    assert least == pytest.approx(rows["copy", 102400]["min_us"], rel=0.01)
    for name in ("dpcomm", "gloo, dist", "openmpi", "roofline"):
        assert name in output + errors
    assert (tmp_path / "x.png").stat().st_size > 10000


def test_faulty_peers_are_found_and_do_not_hinder_others(tmp_path: Path, watched: Watched) -> None:
    (tmp_path / "faulty_rank.py").write_text(FAULTY_RANK.format(bench=str(BENCH)))
    (tmp_path / "driver.py").write_text(DRIVER.format(bench=str(BENCH)))
    status, output, errors = watched.run("driver.py")
    assert status == 0, errors
    assert watched.left_over() == []
    record, well = json.loads(output)
    assert not well
    (run,) = record["runs"]
    rows = {row["peer"]: row for row in run["rows"]}
    assert set(rows) == {"dpcomm", "always", "later"}
    assert rows["dpcomm"]["wrong"] == 0
    assert len(rows["dpcomm"]["rounds_us"]) == 3
    for name in ("always", "later"):
        assert rows[name]["wrong"] > 0, name
        assert rows[name]["time_us"] is None
        assert f"wrong: {name}" in errors
    (skipped,) = run["skipped"]
    assert skipped["peer"] == "dying"
    assert "a rank ended" in skipped["reason"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_an_interrupted_run(
    tmp_path: Path, watched: Watched, number: signal.Signals
) -> None:
    driver = watched.start(
        str(BENCH / "peers.py"), "--ranks", "2", "--sizes", "1M", "--rounds", "100000",
        "--peers", "dpcomm; copy",
    )  # fmt: skip
    end = time.monotonic() + 30
    while len(watched.processes()) < 5:  # the driver and two groups of two
        assert driver.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    driver.send_signal(number)
    _, errors = driver.communicate(timeout=30)
    assert driver.returncode != 0
    assert "Traceback" not in errors
    assert watched.left_over(files=number != signal.SIGKILL) == []
