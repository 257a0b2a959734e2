"""What a process says of its operations: flight record, counts, lines of DPCOMM_DEBUG."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import dpcomm

# Ranks as threads of one process: `everywhere(n, f)` runs f(communicator, rank) on each.
HEAD = """
import json, os, sys, threading, time
import numpy as np
import dpcomm

def everywhere(world, body, **options):
    failures = [None] * world
    def run(rank):
        made = dpcomm.Communicator(rank, world, transport="inproc", **options)
        try:
            body(made, rank)
        except Exception as error:
            failures[rank] = f"{type(error).__name__}: {error}"
        finally:
            made.close()
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return failures

def ones(n): return np.ones(n, np.float32)
"""


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a program of its own: the recorder of a process is made once."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + textwrap.dedent(program)],
        env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_record_says_what_was_called_and_how_it_went() -> None:
    program = """
        def body(made, rank):
            made.all_reduce(ones(1000), "max")
            made.all_gather(ones(5), async_op=True).wait()
            made.broadcast(ones(7), root=1)
            made.barrier()
        assert everywhere(2, body, name="one") == [None, None]
        alone = dpcomm.Communicator(0, 1, name="alone")
        alone.all_reduce(ones(3))
        assert [e["group"] for e in dpcomm.flight_record(alone)] == ["alone"]
        print(json.dumps(dpcomm.flight_record()))
    """
    entries = json.loads(run(program).stdout)
    ranks = [[entry for entry in entries if entry["rank"] == rank] for rank in (0, 1)]
    for mine in ranks:
        ours = [entry for entry in mine if entry["group"] == "one"]
        assert [entry["name"] for entry in ours] == [
            "all_reduce",
            "all_gather",
            "broadcast",
            "barrier",
        ]
        assert [entry["sequence"] for entry in ours] == [1, 2, 3, 4]
        assert [entry["async_op"] for entry in ours] == [False, True, False, False]
        reduce, gather, broadcast, barrier = ours
        assert (reduce["input_elems"], reduce["output_elems"]) == (1000, 1000)
        assert (reduce["op"], reduce["dtype"], reduce["algorithm"]) == (
            "max",
            "float32",
            "one_shot",
        )
        assert (gather["input_elems"], gather["output_elems"], gather["op"]) == (5, 10, None)
        assert broadcast["peer"] == 1
        assert barrier["input_elems"] == 0
    assert ranks[0][-1]["group"] == "alone"
    for entry in entries:
        assert entry["state"] == "completed"
        assert entry["error"] is None
        assert entry["created_ns"] <= entry["started_ns"] <= entry["completed_ns"]
        assert 1.7e18 < entry["created_ns"] < 4e18


def test_messages_are_recorded() -> None:
    program = """
        def body(made, rank):
            if rank == 0:
                made.send(ones(3), 1, tag=7)
                made.send(ones(5000), 1, tag=7)
            else:
                made.recv(ones(3), tag=7)  # from anybody
                made.recv(ones(5000), 0, tag=7)
            made.barrier()
        assert everywhere(2, body) == [None, None]
        print(json.dumps(dpcomm.flight_record()))
    """
    entries = json.loads(run(program).stdout)
    messages = [entry for entry in entries if entry["name"] in ("send", "recv")]
    seen = [
        (e["rank"], e["name"], e["peer"], e["tag"], e["sequence"], e["input_elems"], e["state"])
        for e in messages
    ]
    assert seen == [
        (0, "send", 1, 7, 1, 12, "completed"),
        (0, "send", 1, 7, 2, 20000, "completed"),
        (1, "recv", 0, 7, 1, 12, "completed"),
        (1, "recv", 0, 7, 2, 20000, "completed"),
    ]
    assert [entry["sequence"] for entry in entries if entry["name"] == "barrier"] == [1, 1]


def test_the_ring_keeps_the_last_ones_and_may_be_none() -> None:
    program = """
        made = dpcomm.Communicator(0, 1)
        for n in range(20): made.all_reduce(ones(n))
        print(json.dumps([[e["id"], e["input_elems"]] for e in dpcomm.flight_record()]))
    """
    kept = json.loads(run(program, DPCOMM_FLIGHT_RECORDER_SIZE="8").stdout)
    assert kept == [[n + 1, n] for n in range(12, 20)]
    assert json.loads(run(program, DPCOMM_FLIGHT_RECORDER_SIZE="0").stdout) == []


def test_a_forked_child_has_a_record_of_its_own() -> None:
    program = """
        made = dpcomm.Communicator(0, 1)
        made.all_reduce(ones(4))
        child = os.fork()
        if child == 0:
            assert dpcomm.flight_record() == []
            dpcomm.Communicator(0, 1).all_reduce(ones(9))
            os._exit([e["input_elems"] for e in dpcomm.flight_record()] != [9])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [e["input_elems"] for e in dpcomm.flight_record()] == [4]
    """
    run(program)


MISSING = """
    failed = threading.Barrier(3)
    def body(made, rank):
        made.all_reduce(ones(10))
        try:
            if rank != 1: made.all_reduce(ones(20), timeout=0.5)
        finally:
            failed.wait()
    failures = everywhere(3, body)
    assert failures[1] is None and "rank 1" in failures[0]
"""


def test_a_failure_is_dumped_by_every_rank(tmp_path: Path) -> None:
    run(MISSING, DPCOMM_FLIGHT_RECORDER_DUMP=f"{tmp_path}/rank_")
    dumps: list[dict[str, Any]] = []
    for rank in range(3):
        dumps.append(pickle.loads((tmp_path / f"rank_{rank}").read_bytes()))
    assert sorted(os.listdir(tmp_path)) == ["rank_0", "rank_1", "rank_2"]
    assert [len(dump["entries"]) for dump in dumps] == [2, 1, 2]  # rank 1 did it when it closed
    last = dumps[0]["entries"][-1]
    assert last["state"] == "started"
    assert last["profiling_name"] == "gloo:all_reduce"
    assert last["dpcomm_name"] == "dpcomm:all_reduce"
    assert last["input_sizes"] == [[20]]
    assert "has not called it" in last["error"]
    assert last["time_discovered_completed_ns"] is None
    assert dumps[0]["entries"][0]["duration_ms"] > 0
    assert dumps[0]["pg_config"]["default"]["ranks"] == "[0, 1, 2]"


def test_a_dump_that_cannot_be_written_is_a_warning_and_an_error_on_demand(tmp_path: Path) -> None:
    done = run(MISSING, DPCOMM_FLIGHT_RECORDER_DUMP=f"{tmp_path}/no/rank_")
    assert f"cannot write the flight record {tmp_path}/no/rank_0: No such file" in done.stderr
    with dpcomm.Communicator(0, 1), pytest.raises(dpcomm.UsageError, match="No such file"):
        dpcomm.dump_flight_record(f"{tmp_path}/no/rank_")


def test_lines_of_info() -> None:
    program = "everywhere(3, lambda made, rank: made.barrier(), name='blue', timeout=7)"
    lines = run(program, DPCOMM_DEBUG="INFO").stderr.splitlines()
    assert len(lines) == 1
    (line,) = lines
    for part in (
        f"version {dpcomm.__version__}, group 'blue': 3 ranks on 1 host (",
        "transport inproc",
        "wire native between hosts, algorithm auto (all_reduce: one_shot up to 16384 B, then",
        "two_shot; broadcast: direct; reduce: direct; all_gather: direct; reduce_scatter: direct",
        "timeout 7 s",
    ):
        assert part in line
    assert run(program).stderr == ""
    chosen = run(program, DPCOMM_DEBUG="INFO", DPCOMM_ALGO="ring").stderr
    assert "algorithm ring (all_reduce: ring; broadcast: ring;" in chosen


def test_lines_of_trace() -> None:
    program = "everywhere(2, lambda made, rank: made.all_reduce(ones(9), async_op=True).wait())"
    lines = run(program, DPCOMM_DEBUG="TRACE").stderr.splitlines()
    what = r"all_reduce #1 \(9 x float32, sum, one_shot\)"
    for rank in range(2):
        mine = [line for line in lines if f"rank {rank} of 'default': " in line]
        assert len(mine) == 2
        assert re.search(what + " starts$", mine[0])
        assert re.search(what + r" ends after \d+(\.\d+)? ms$", mine[1])
    failed = run(MISSING, DPCOMM_DEBUG="TRACE").stderr
    assert re.search(r"rank 2 of 'default': failed: all_reduce #2 .* was not complete", failed)


def test_counts() -> None:
    program = """
        def body(made, rank):
            if rank == 1: time.sleep(0.3)
            made.all_reduce(ones(1000))  # rank 0 stands still
            before = dpcomm.stats(made)
            if rank == 1: time.sleep(0.3)
            work = made.all_reduce(ones(1 << 16), async_op=True)
            time.sleep(0.4)  # rank 0 does something else
            work.wait()
            made.broadcast(np.ones(3, np.int64))
            after = dpcomm.stats(made)
            if rank == 0:
                assert before.exposed_wait_ns > 0.2e9, before
                assert after.wait_ns - before.wait_ns > 0.2e9, after
                assert after.exposed_wait_ns - before.exposed_wait_ns < 0.15e9, after
            assert (after.operations, after.messages) == (3, 0)
            assert after.bytes == 4000 + 4 * 65536 + 24
            assert set(after.collectives) == {"all_reduce", "broadcast"}
            reduce = after.collectives["all_reduce"]
            assert (reduce.operations, reduce.bytes) == (2, 4000 + 4 * 65536)
            assert after.wire_bytes == sum(c.wire_bytes for c in after.collectives.values()) > 0
            assert reduce.busy_ns > 0
        assert everywhere(2, body) == [None, None]
    """
    run(program)


def test_counts_of_what_is_no_group() -> None:
    code = """
        for nothing in (None, 5):
            try:
                dpcomm.stats(nothing)
            except (dpcomm.UsageError, ImportError):
                continue
            raise SystemExit(1)
    """
    run(code)
