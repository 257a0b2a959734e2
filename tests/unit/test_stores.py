"""Stores: what ranks meet through, and what comes to a port besides ranks."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpcomm.errors import PeerError, TimeoutError, UsageError
from dpcomm.stores import FileStore, TcpStore, TorchStore, open_store

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def tcp() -> Iterator[tuple[TcpStore, TcpStore]]:
    """Rank 0's store and another rank's."""
    port = free_port()
    server = TcpStore(HOST, port, rank=0)
    client = TcpStore(HOST, port, rank=1, timeout=10)
    yield server, client
    client.close()
    server.close()


@pytest.fixture(params=["file", "tcp", "torch"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """Two ranks' views of one store."""
    if request.param == "file":
        yield FileStore(str(tmp_path)), FileStore(str(tmp_path))
    elif request.param == "tcp":
        yield request.getfixturevalue("tcp")
    else:
        distributed = pytest.importorskip("torch.distributed", reason="torch is not installed")
        store = distributed.HashStore()
        yield TorchStore(store), TorchStore(store)


def test_a_key_that_is_set_is_read(pair: tuple[Any, Any]) -> None:
    first, second = pair
    first.set("group/offer", b"\x00\xff binary")
    assert second.get("group/offer", 5) == b"\x00\xff binary"
    second.set("group/offer", b"")
    assert first.get("group/offer", 5) == b""


def test_keys_are_told_apart(pair: tuple[Any, Any]) -> None:
    first, second = pair
    keys = ["a", "a/b", "a b", "../a", "A", "ä", "x" * 300]
    for key in keys:
        first.set(key, key.encode())
    for key in keys:
        assert second.get(key, 5) == key.encode()


def test_a_get_waits_for_the_key(pair: tuple[Any, Any]) -> None:
    first, second = pair
    later = threading.Timer(0.2, lambda: first.set("late", b"here"))
    later.start()
    assert second.get("late", 10) == b"here"
    later.join()


def test_a_key_that_does_not_come_is_none(pair: tuple[Any, Any]) -> None:
    began = time.monotonic()
    assert pair[1].get("never", 0.2) is None
    assert time.monotonic() - began < 10


def test_a_file_store_never_shows_half_a_value(tmp_path: Path) -> None:
    store, reader = FileStore(str(tmp_path / "made")), FileStore(str(tmp_path / "made"))
    values = [bytes([i]) * 100_000 for i in range(30)]

    def write() -> None:
        for value in values:
            store.set("key", value)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        seen = reader.get("key", 5)
        assert seen is not None
        assert len(seen) == 100_000
        assert len(set(seen)) == 1
    writer.join()
    assert (tmp_path / "made").stat().st_mode & 0o077 == 0
    assert len(os.listdir(tmp_path / "made")) == 1


def test_an_absent_rank_0_is_a_timeout_that_names_the_address() -> None:
    port = free_port()
    with pytest.raises(TimeoutError, match=rf"rank 0 does not listen at tcp://127.0.0.1:{port}"):
        TcpStore(HOST, port, rank=1, timeout=0.3)


def test_rank_0_may_come_late() -> None:
    port = free_port()
    made: list[TcpStore] = []
    later = threading.Timer(0.3, lambda: made.append(TcpStore(HOST, port, rank=0)))
    later.start()
    client = TcpStore(HOST, port, rank=1, timeout=20)
    client.set("key", b"value")
    assert client.get("key", 5) == b"value"
    later.join()
    client.close()
    made[0].close()


def test_a_port_in_use_is_told(tcp: tuple[TcpStore, TcpStore]) -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        with pytest.raises(UsageError, match="rank 0 cannot listen at"):
            TcpStore(HOST, other.getsockname()[1], rank=0)


def test_a_rank_0_that_goes_is_a_peer_error() -> None:
    port = free_port()
    server = TcpStore(HOST, port, rank=0)
    with socket.create_connection((HOST, port)) as _:
        client = TcpStore(HOST, port, rank=1, timeout=5)
        result: list[BaseException] = []

        def wait() -> None:
            try:
                client.get("never", 30)
            except BaseException as error:
                result.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.1)
        client._connection.shutdown(socket.SHUT_RDWR)  # as when rank 0's process dies
        waiter.join(10)
        assert not waiter.is_alive()
        assert isinstance(result[0], PeerError)
        assert "rank 0" in str(result[0])
    client.close()
    server.close()


def frame(*fields: bytes) -> bytes:
    return b"".join(struct.pack("!I", len(field)) + field for field in fields)


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "nothing": b"",
    "half a header": b"\x00\x00",
    "half a field": struct.pack("!I", 100) + b"abc",
    "a field too long": struct.pack("!I", (1 << 20) + 1) + b"x" * 100,
    "a field far too long": b"\xff\xff\xff\xff",
    "an unknown verb": frame(b"delete", b"key", b"value"),
    "a timeout that is no number": frame(b"get", b"never", b"soon"),
    "a timeout that is not a number": frame(b"get", b"never", b"nan"),
    "a timeout without end": frame(b"get", b"never", b"1e300"),
    "zeros": bytes(4000),
    "noise": random.Random(5).randbytes(4000),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_at_the_port_harms_nobody(
    tcp: tuple[TcpStore, TcpStore], name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    server, client = tcp
    server.set("before", b"1")
    address = client._connection.getpeername()
    with socket.create_connection(address, timeout=5) as stranger, contextlib.suppress(OSError):
        stranger.sendall(GARBAGE[name])
        stranger.shutdown(socket.SHUT_WR)
        while stranger.recv(4096):
            pass
    client.set("after", b"2")
    assert server.get("after", 5) == b"2"
    assert client.get("before", 5) == b"1"
    assert capfd.readouterr().err == ""


def test_a_stranger_who_stays_silent_blocks_nobody(tcp: tuple[TcpStore, TcpStore]) -> None:
    server, client = tcp
    with socket.create_connection(client._connection.getpeername(), timeout=5):
        client.set("key", b"value")
        assert server.get("key", 5) == b"value"


def test_a_value_that_is_too_long_is_refused_at_once(tcp: tuple[TcpStore, TcpStore]) -> None:
    server, client = tcp
    with pytest.raises(UsageError, match="takes no value of 1048576 bytes"):
        client.set("key", bytes(1 << 20))
    client.set("key", bytes((1 << 20) - 1))
    assert len(server.get("key", 5) or b"") == (1 << 20) - 1


def test_a_closed_server_frees_its_port() -> None:
    port = free_port()
    for _ in range(3):
        store = TcpStore(HOST, port, rank=0)
        store.set("key", b"value")
        store.close()
        store.close()


def test_many_ranks_at_once(tcp: tuple[TcpStore, TcpStore]) -> None:
    host, port = tcp[1]._connection.getpeername()

    def meet(rank: int) -> None:
        store = TcpStore(host, port, rank=rank + 1, timeout=10)
        store.set(f"rank/{rank}", str(rank).encode())
        for other in range(12):
            assert store.get(f"rank/{other}", 20) == str(other).encode()
        store.close()
        done.append(rank)

    done: list[int] = []
    ranks = [threading.Thread(target=meet, args=(rank,)) for rank in range(12)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert sorted(done) == list(range(12))


def test_torch_tcp_store() -> None:
    distributed = pytest.importorskip("torch.distributed", reason="torch is not installed")
    store = distributed.TCPStore(HOST, 0, 1, is_master=True)
    adapted, owned = open_store(store, 0, 5)
    assert isinstance(adapted, TorchStore)
    assert not owned
    adapted.set("key", b"\x00\xff")
    assert adapted.get("key", 5) == b"\x00\xff"
    assert adapted.get("never", 0.2) is None


@pytest.mark.parametrize(
    "init",
    ["", "file://", "tcp://", "tcp://host", "tcp://:1", "tcp://host:port", "http://x", "/tmp"],
)
def test_an_address_that_makes_no_sense(init: str) -> None:
    with pytest.raises(UsageError, match="is neither file://<folder> nor tcp://<host>:<port>"):
        open_store(init, 0, 1)


def test_an_object_that_is_no_store() -> None:
    with pytest.raises(UsageError, match="is no address and no store"):
        open_store(object(), 0, 1)


def test_any_object_with_set_and_get_is_a_store() -> None:
    class Mine:
        def set(self, key: str, value: bytes) -> None: ...
        def get(self, key: str, timeout: float) -> bytes | None: ...

    mine = Mine()
    assert open_store(mine, 0, 1) == (mine, False)
