"""Strangers: what others write into the store, or offer as a segment, is refused with an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from ranks import Stage, expect_in_time

LIMIT = 1.0
KEYS = ["here/0", "here/1", "offer/0", "answer/0/1", "verdict/0"]
VALUES = {
    "garbage": bytes(range(256)),
    "cut": b"segment 1 2 3",
    "too long": b"segment " + b"1 " * 500_000,
    "numbers that wrap": b"segment 1 1 1 2 3 18446744073709551615 7 ",
    "another file": b"segment 1 1 1 2 3 262144 7 {file}",
}

STORE = """
from dpcomm.stores import FileStore
class Stranger:
    def __init__(self, path):
        self.store = FileStore(path)
    def set(self, key, value):
        self.store.set(key, bad if key.endswith("/" + target) else value)
    def get(self, key, timeout):
        return self.store.get(key, timeout)
puppet.comm = dpcomm.Communicator(rank, 2, Stranger(path), timeout=limit)
"""


@pytest.mark.parametrize("key", KEYS)
def test_values_of_the_store(stage: Stage, key: str, tmp_path: Path) -> None:
    file = tmp_path / "precious"
    for turn, (name, value) in enumerate(VALUES.items()):
        file.write_text("precious")
        bad = value.replace(b"{file}", str(file).encode())
        with stage.group(2) as group:
            before = [rank.do("leftovers")["fds"] for rank in group]
            for rank in group:
                rank.begin(
                    "run",
                    STORE,
                    rank=rank.number,
                    path=str(tmp_path / f"store{turn}"),
                    target=key,
                    bad=bad,
                    limit=LIMIT,
                )
            outcomes = group.end()
            expect_in_time(outcomes, limit=LIMIT)
            wrong = [outcome for outcome in outcomes if outcome.error is not None]
            for outcome in wrong:
                # Who is not told by the other one has to wait for it.
                assert outcome.error in ("InternalError", "TimeoutError", "PeerError"), outcome
            # Nobody reads of rank 1 as long as it attaches.
            assert wrong or key == "here/1", f"{name} was taken"
            assert file.read_text() == "precious"
            assert len(wrong) == 2 or key == "here/1", outcomes
            if key != "here/1":
                assert any(outcome.error == "InternalError" for outcome in wrong), outcomes
                group.do("run", "import gc; gc.collect()")
                assert [rank.do("leftovers")["fds"] for rank in group] == before, name


@pytest.mark.parametrize("kind", ["wrong size", "wrong number", "fifo", "folder", "absent"])
def test_offers_of_other_files(stage: Stage, kind: str, tmp_path: Path) -> None:
    """Rank 1 alone, with a rank 0 that is not dpcomm: right name, wrong thing."""
    path = tmp_path / ("dpcomm-" + "0123456789abcdef")
    if kind in ("wrong size", "wrong number"):
        path.write_bytes(bytes(5000))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    source = (
        "from dpcomm.stores import FileStore\n"
        "store = FileStore(folder)\n"
        "me = open('/proc/self/stat').read().split()[21]\n"
        "import os, socket\n"
        "ns = os.stat('/proc/self/ns/pid').st_ino\n"
        "store.set('dpcomm/default/here/0', f'process {os.getpid()} {ns} {me} host'.encode())\n"
        "offer = f'segment {os.getpid()} {ns} {me} 2 3 {slot} 99 {path}'\n"
        "store.set('dpcomm/default/offer/0', offer.encode())\n"
        "store.set('dpcomm/default/verdict/0', b'go')\n"
        "dpcomm.Communicator(1, 2, store, timeout=1)\n"
    )
    with stage.group(1) as group:
        slot = 262144
        if kind == "wrong number":  # of the right size, which its error tells
            said = group[0].do_outcome(
                "run", source, folder=str(tmp_path / "s1"), path=str(path), slot=slot
            )
            size = int(said.text.split("segment of ")[1].split()[0])
            with path.open("wb") as file:
                file.truncate(size)
        said = group[0].do_outcome(
            "run", source, folder=str(tmp_path / "s2"), path=str(path), slot=slot
        )
        assert said.error == "InternalError", said
        words = {"wrong number": "not of this group", "absent": "cannot open"}
        assert words.get(kind, "") in said.text


@pytest.mark.parametrize("folder", [False, True])
def test_the_mode_of_segments(stage: Stage, folder: bool, tmp_path: Path) -> None:
    """0600, and not to be opened by another user through /proc."""
    source = (
        "import os, stat\n"
        "result = []\n"
        "for fd in os.listdir('/proc/self/fd'):\n"
        "    try: link = os.readlink(f'/proc/self/fd/{fd}')\n"
        "    except OSError: continue\n"
        "    if 'dpcomm' in link or mark in link:\n"
        "        result.append((int(fd), stat.S_IMODE(os.stat(f'/proc/self/fd/{fd}').st_mode)))\n"
    )
    mark = str(tmp_path) if folder else "memfd:dpcomm"
    with stage.group(2) as group:
        group.start(environment={"DPCOMM_SHM_DIR": str(tmp_path)} if folder else {})
        [(fd, mode)] = group[0].do("run", source, mark=mark)
        assert mode == 0o600
        if os.geteuid() != 0:
            return
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                os.open(f"/proc/{group[0].pid}/fd/{fd}", os.O_RDONLY)
            except PermissionError:
                os._exit(7)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def agreement(bad: dict[str, str], ranks: tuple[int, ...] = (0, 1)) -> list[str]:
    """The errors of ranks (threads) of two that meet in a torch store with these values in it."""
    import threading
    from datetime import timedelta

    import torch.distributed as dist

    import dpcomm

    shared = dist.HashStore()
    for key, value in bad.items():
        shared.set(key, value)
    errors = []

    def join(rank: int) -> None:
        group = dist.distributed_c10d._DistributedBackendOptions()
        group.store, group.group_rank, group.group_size = shared, rank, 2
        group.timeout, group.group_id = timedelta(seconds=1), "meeting"
        try:
            dpcomm.backend.binding().create(group, {}).shutdown()
        except dpcomm.DpcommError as error:
            errors.append(type(error).__name__)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "it hangs"
    return errors


@pytest.mark.parametrize(
    "bad",
    [
        {"dpcomm/attempt/1/1/answer": "garbage"},
        {"dpcomm/attempt/1/1/answer": ""},
        {"dpcomm/attempt/1/1/answer": "error 7 x"},
        {"dpcomm/attempt/1/1/answer": "0123456789abcdef-other"},
        {"dpcomm/made/1": "many"},
        {"dpcomm/made/1": "-5"},
        {"dpcomm/answered/1": "9223372036854775807"},
    ],
)
def test_the_name_of_a_torch_group(bad: dict[str, str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("dpcomm._torch", reason="dpcomm is built without torch")
    alone = any("answer/" in key for key in bad)  # rank 0 would write it anew
    errors = agreement(bad, (1,) if alone else (0, 1))
    assert errors, "it was taken"
    assert not alone or errors == ["InternalError"]
    assert agreement({}) == []
