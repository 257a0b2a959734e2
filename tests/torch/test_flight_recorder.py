"""torch's own reader, torchfrtrace, on dumps of dpcomm's flight recorder."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from harness import launch


def read(folder: Path) -> tuple[Any, str]:
    """What torchfrtrace makes of the dumps: its database, and what it prints."""
    from torch.distributed.flight_recorder.components.builder import build_db
    from torch.distributed.flight_recorder.components.config_manager import JobConfig
    from torch.distributed.flight_recorder.components.fr_logger import FlightRecorderLogger
    from torch.distributed.flight_recorder.components.loader import read_dir

    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logger = FlightRecorderLogger().logger
    logger.addHandler(handler)
    try:
        arguments = JobConfig().parse_args([str(folder), "--prefix", "rank_"])
        details, version = read_dir(arguments)
        return build_db(details, arguments, version), text.getvalue()
    finally:
        logger.removeHandler(handler)


def misses_one(rank: int, world: int) -> str:
    """Rank 1 leaves out an all-reduce and goes on with the barrier behind it."""
    import time

    import torch
    import torch.distributed as dist

    import dpcomm

    dist.init_process_group("dpcomm", timeout=timedelta(seconds=1))
    for _ in range(3):
        dist.all_reduce(torch.ones(100))
    pair = dist.new_group([0, 2], timeout=timedelta(seconds=20))
    if rank != 1:
        dist.all_reduce(torch.ones(5), group=pair, async_op=True).wait()
    try:
        if rank == 1:
            time.sleep(1.5)  # the others have given up
        else:
            dist.all_reduce(torch.ones(200))
        dist.barrier()
    except dpcomm.TimeoutError as error:
        dist.destroy_process_group()
        return str(error)
    raise AssertionError("no error")


def test_the_culprit_is_named(tmp_path: Path) -> None:
    variables = {"DPCOMM_FLIGHT_RECORDER_DUMP": f"{tmp_path}/rank_"}
    texts = launch(misses_one, 3, env=variables).results
    assert len(set(texts)) == 1
    command = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "Collective sequence number: 4 has errors" in said
    assert "Culprit rank 1; Error type: COLLECTIVE_TYPE_MISMATCH" in said
    database, _ = read(tmp_path)
    assert sum(collective.pass_check for collective in database.collectives) == 4
    assert {group.size for group in database.groups} == {2, 3}


PROGRAM = """
import sys, threading
import numpy as np
import dpcomm

def run(rank):
    with dpcomm.Communicator(rank, 3, transport="inproc") as made:
        ones = np.ones(6, np.float32)
        try:
            {body}
        except dpcomm.DpcommError:
            pass
        done.wait()

done = threading.Barrier(3)
threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
dpcomm.dump_flight_record(sys.argv[1] + "/rank_")
"""


def dumped(body: str, folder: Path) -> tuple[Any, str]:
    """What the reader makes of three ranks that did `body`."""
    import dpcomm

    program = PROGRAM.format(body="\n            ".join(body.splitlines()))
    package = str(Path(dpcomm.__file__).resolve().parents[1])
    subprocess.run(
        [sys.executable, "-c", program, str(folder)],
        env={"PYTHONPATH": package},
        check=True,
        timeout=60,
    )
    return read(folder)


def test_a_rank_that_lacks_the_operation_is_missing(tmp_path: Path) -> None:
    body = "made.barrier()\nif rank != 2: made.all_reduce(ones, timeout=0.3)"
    _, said = dumped(body, tmp_path)
    assert "Not all ranks joining collective, sequence number: 2" in said
    assert "missing ranks: {2}" in said


def test_a_mismatch_names_both_sizes(tmp_path: Path) -> None:
    _, said = dumped("made.all_reduce(ones if rank != 1 else ones[:4])", tmp_path)
    assert "SIZE_OR_SYNTAX_MISMATCH, Expected input sizes: '[[6]]'" in said
    assert "'[[4]]'" in said


def test_a_message_without_a_receive_names_who_lacks_it(tmp_path: Path) -> None:
    body = """
if rank == 2: made.send(ones, 1, tag=5)
if rank == 2: made.send(ones, 1, tag=5, async_op=True)
if rank == 1: made.recv(ones.copy(), tag=5)
made.all_reduce(ones)"""
    database, said = dumped(body, tmp_path)
    assert "Not all ranks joining collective, sequence number: 2" in said
    assert "group info: default 2->1 tag 5" in said
    assert "collective: gloo:send 1->0" in said  # by position among ranks 1 and 2
    assert "missing ranks: {1}" in said
    assert len(database.collectives) == 3


COLLECTIVES = [
    "made.all_reduce(ones)",
    "made.reduce(ones, root=1)",
    "made.broadcast(ones, root=2)",
    "made.all_gather(ones)",
    "made.reduce_scatter(ones)",
    "made.barrier()",
    "made.gather(ones, root=1)",
    "made.scatter(ones if rank == 2 else None, root=2, out=ones[:2].copy())",
    "made.all_to_all(ones)",
    "made.all_gather(ones[:rank], counts=[0, 1, 2])",
    "made.reduce_scatter(ones, counts=[0, 4, 2])",
    "made.gather(ones[:rank], root=0, counts=[0, 1, 2])",
    "made.scatter(ones[:3] if rank == 0 else None, root=0, counts=[0, 1, 2],"
    " out=ones[:rank].copy())",
    "made.all_to_all(ones[:3], counts=[1, 1, 1] if rank else [1, 2, 0],"
    " recv_counts=[[1, 1, 1], [2, 1, 1], [0, 1, 1]][rank])",
]


def test_every_collective_is_understood(tmp_path: Path) -> None:
    database, said = dumped("\n".join(COLLECTIVES), tmp_path)
    assert len(database.collectives) == len(COLLECTIVES)
    assert all(collective.pass_check for collective in database.collectives), said
    assert all(len(collective.expected_ranks) == 3 for collective in database.collectives)
