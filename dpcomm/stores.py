"""Key-value stores through which the ranks of a communicator find each other.

A store has two methods: ``set(key: str, value: bytes)`` and ``get(key: str, timeout: float)``,
which waits for the key at most ``timeout`` seconds and returns its value, or None.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import socketserver
import struct
import tempfile
import threading
import time
from typing import Any, Protocol

from dpcomm.errors import PeerError, TimeoutError, UsageError

__all__ = ["FileStore", "Store", "TcpStore", "TorchStore", "open_store"]


class Store(Protocol):
    """What a communicator needs of a store."""

    def set(self, key: str, value: bytes) -> None:
        """Stores ``value`` under ``key`` for every rank to read."""

    def get(self, key: str, timeout: float) -> bytes | None:
        """The value of ``key``, waited for at most ``timeout`` seconds, or None."""


class FileStore:
    """A folder on a file system that all ranks share; one file a key, written by rename.

    Args:
        path: The folder. It is made if need be and can be deleted once the communicator stands.
            Use a fresh one for every run: keys of an earlier run would be taken for this one's.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        os.makedirs(path, mode=0o700, exist_ok=True)

    def _file(self, key: str) -> str:
        return os.path.join(self._path, hashlib.sha256(key.encode()).hexdigest()[:32])

    def set(self, key: str, value: bytes) -> None:
        """Stores ``value`` under ``key``."""
        handle, temporary = tempfile.mkstemp(dir=self._path)
        with os.fdopen(handle, "wb") as file:
            file.write(value)
        os.replace(temporary, self._file(key))

    def get(self, key: str, timeout: float) -> bytes | None:
        """The value of ``key``, or None after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while True:
            with contextlib.suppress(FileNotFoundError), open(self._file(key), "rb") as file:
                return file.read()
            if time.monotonic() > deadline:
                return None
            time.sleep(pause)
            pause = min(pause * 2, 0.02)


_LENGTH = struct.Struct("!I")
_MAX_FIELD_BYTES = 1 << 20


def _receive(connection: socket.socket) -> bytes:
    def exactly(count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            part = connection.recv(count - len(parts))
            if not part:
                raise ConnectionError("the store closed the connection")
            parts += part
        return parts

    (length,) = _LENGTH.unpack(exactly(_LENGTH.size))
    if length > _MAX_FIELD_BYTES:
        raise ConnectionError("a field of the store is too long")
    return exactly(length)


def _send(connection: socket.socket, *fields: bytes) -> None:
    connection.sendall(b"".join(_LENGTH.pack(len(field)) + field for field in fields))


class _Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        server: Any = self.server
        # Whatever else comes to the port ends its own connection and nothing more.
        with contextlib.suppress(OSError, ValueError, OverflowError):
            while True:
                verb, key, value = (_receive(self.request) for _ in range(3))
                with server.changed:
                    if verb == b"set":
                        server.values[key] = value
                        server.changed.notify_all()
                        answer = b"1"
                    elif verb == b"get" and float(value) >= 0:  # not so for NaN
                        there = server.changed.wait_for(
                            lambda wanted=key: wanted in server.values, float(value)
                        )
                        answer = b"1" + server.values[key] if there else b"0"
                    else:
                        return
                _send(self.request, answer)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int]) -> None:
        self.values: dict[bytes, bytes] = {}
        self.changed = threading.Condition()
        super().__init__(address, _Handler)


class TcpStore:
    """A store that rank 0 keeps in its memory and the others reach by TCP.

    Meant for the start of communicators among hosts that trust each other: whoever reaches the port
    can write keys. Rank 0's process has to live until all ranks have met.

    Args:
        host, port: Where rank 0 listens.
        rank: This process's rank.
        timeout: Seconds to wait for rank 0's server.

    Raises:
        TimeoutError: Nobody listens at the address in time.
    """

    def __init__(self, host: str, port: int, rank: int, timeout: float = 600.0) -> None:
        self._server: _Server | None = None
        self._lock = threading.Lock()
        self._address = f"tcp://{host}:{port}"
        if rank == 0:
            try:
                self._server = _Server((host, port))
            except OSError as error:
                raise UsageError(f"rank 0 cannot listen at {self._address}: {error}") from error
            threading.Thread(
                target=self._server.serve_forever, args=(0.02,), name="dpcomm-store", daemon=True
            ).start()
        self._connection = self._connect(host, port, timeout)

    @staticmethod
    def _connect(host: str, port: int, timeout: float) -> socket.socket:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return socket.create_connection((host, port), timeout=5.0)
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"rank 0 does not listen at tcp://{host}:{port} after {timeout:g} s: "
                        f"{error}"
                    ) from error
                time.sleep(0.02)

    def set(self, key: str, value: bytes) -> None:
        """Stores ``value``, less than a MiB, under ``key``."""
        if len(value) >= _MAX_FIELD_BYTES:
            raise UsageError(f"the store takes no value of {len(value)} bytes")
        self._call(30.0, b"set", key.encode(), value)

    def get(self, key: str, timeout: float) -> bytes | None:
        """The value of ``key``, or None after ``timeout`` seconds."""
        seconds = max(timeout, 0.0)
        answer = self._call(seconds + 30.0, b"get", key.encode(), str(seconds).encode())
        return answer[1:] if answer[:1] == b"1" else None

    def _call(self, patience: float, *fields: bytes) -> bytes:
        try:
            with self._lock:
                self._connection.settimeout(patience)
                _send(self._connection, *fields)
                return _receive(self._connection)
        except OSError as error:  # also ConnectionError and a timeout
            raise PeerError(
                f"rank 0, which keeps the store at {self._address}, went away during the start"
            ) from error

    def close(self) -> None:
        """Closes the connection and, on rank 0, the server."""
        self._connection.close()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class TorchStore:
    """A ``torch.distributed`` store, such as TCPStore, FileStore or HashStore."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def set(self, key: str, value: bytes) -> None:
        """Stores ``value`` under ``key``."""
        self._store.set(key, value)

    def get(self, key: str, timeout: float) -> bytes | None:
        """The value of ``key``, or None after ``timeout`` seconds."""
        from datetime import timedelta

        deadline = time.monotonic() + timeout
        try:
            self._store.wait([key], timedelta(seconds=max(timeout, 0.001)))
        except RuntimeError as error:
            # Every store throws a class of its own when time runs out, and rounds.
            if time.monotonic() < deadline - max(0.25 * timeout, 0.05):
                raise PeerError("the store that the ranks meet in failed") from error
            if not self._store.check([key]):
                return None
        value: bytes = self._store.get(key)
        return value


def open_store(init: Any, rank: int, timeout: float) -> tuple[Store, bool]:
    """The store that ``init`` names, and whether the communicator owns it.

    Args:
        init: ``"file://<folder>"``, ``"tcp://<host>:<port>"``, a store as above, or one of torch.
        rank: This process's rank.
        timeout: Seconds to wait for rank 0's TCP server.

    Raises:
        UsageError: ``init`` is none of these.
    """
    if isinstance(init, str):
        if init.startswith("file://") and len(init) > 7:
            return FileStore(init[7:]), True
        if init.startswith("tcp://"):
            host, _, port = init[6:].rpartition(":")
            if host and port.isdigit():
                return TcpStore(host.strip("[]"), int(port), rank, timeout), True
        raise UsageError(f"init={init!r} is neither file://<folder> nor tcp://<host>:<port>")
    if type(init).__module__.startswith("torch."):
        return TorchStore(init), False
    if hasattr(init, "set") and hasattr(init, "get"):
        return init, False
    raise UsageError(f"init={init!r} is no address and no store")
