"""A process that plays a rank: it does what a test tells it over a socket, and says how that went.

Run as ``python puppet.py <socket>``: imports what ranks need once, then forks a puppet for every
connection. A puppet that dies stays a zombie until the next one is made, as a rank does whose
launcher is slow.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__" and len(sys.argv) > 2:
    __import__(sys.argv[2])  # torch first, so that dpcomm registers itself

import dpcomm
from dpcomm.stores import FileStore

POISON = 0x5A


class WorkerFailed(BaseException):
    """An exception that a forked worker does not catch."""


class DeadlyStore:
    """A store whose user dies, or stops, in front of a key that is to be set, or behind it."""

    def __init__(self, folder: str, key: str, behind: bool, sign: int) -> None:
        self._store = FileStore(folder)
        self._key, self._behind, self._signal = key, behind, sign

    def set(self, key: str, value: bytes) -> None:
        ours = key.endswith(self._key)
        if ours and not self._behind:
            os.kill(os.getpid(), self._signal)
        self._store.set(key, value)
        if ours and self._behind:
            os.kill(os.getpid(), self._signal)

    def get(self, key: str, timeout: float) -> bytes | None:
        return self._store.get(key, timeout)


def pattern(rank: int, count: int, dtype: str) -> Any:
    """A rank's contribution: small integers, so that sums are exact."""
    return (np.arange(count, dtype="int32") % 31 + rank).astype(dtype)


class Puppet:
    """The commands. What they return has to go through pickle."""

    def __init__(self) -> None:
        self.comm: Any = None
        self.works: list[Any] = []
        self.threads: list[tuple[threading.Thread, list[Any]]] = []

    # --- the communicator ----------------------------------------------------------------------

    def start(
        self,
        rank: int,
        world: int,
        init: str,
        *,
        deadly: tuple[str, bool, int] | None = None,
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        for name in [name for name in os.environ if name.startswith("DPCOMM_")]:
            del os.environ[name]
        os.environ.update(environment or {})
        store: Any = init
        if deadly is not None:
            store = DeadlyStore(init.removeprefix("file://"), *deadly)
        self.comm = dpcomm.Communicator(rank, world, store, **options)

    def collective(
        self, name: str, count: int = 1000, *, verify: bool = True, **options: Any
    ) -> Any:
        """Runs a collective on exact inputs and poisoned outputs, and compares the result."""
        finish = self._begin(name, count, **options)
        return finish() if verify else None

    def submit(self, name: str, count: int = 1000, **options: Any) -> int:
        self.works.append(self._begin(name, count, async_op=True, **options))
        return len(self.works) - 1

    def wait(self, index: int, timeout: float | None = None) -> Any:
        return self.works[index](timeout)

    def _begin(
        self, name: str, count: int, dtype: str = "float32", root: int = 0, **options: Any
    ) -> Any:
        comm = self.comm
        rank, world = comm.rank, comm.world_size
        if name == "barrier":
            comm.barrier(**{key: options[key] for key in ("timeout",) if key in options})
            return lambda *_: None
        own = pattern(rank, count, dtype)
        total = (own - own.dtype.type(rank)) * world + sum(range(world))
        total = total.astype(dtype)
        out: Any = np.frombuffer(bytes([POISON]) * own.nbytes, dtype).copy()
        if name == "all_reduce":
            expected = total
            result = comm.all_reduce(own, out=out, **options)
        elif name == "reduce":
            expected = total if rank == root else None
            result = comm.reduce(own, root, out=out if rank == root else None, **options)
        elif name == "broadcast":
            expected = pattern(root, count, dtype)
            out = own if rank == root else out
            result = comm.broadcast(out, root, **options)
        elif name == "all_gather":
            expected = np.stack([pattern(each, count, dtype) for each in range(world)])
            out = np.frombuffer(bytes([POISON]) * expected.nbytes, dtype).copy()
            out = out.reshape(expected.shape)
            result = comm.all_gather(own, out=out, **options)
        elif name == "gather":
            blocks = np.stack([pattern(each, count, dtype) for each in range(world)])
            expected = blocks if rank == root else None
            out = np.frombuffer(bytes([POISON]) * blocks.nbytes, dtype).copy()
            result = comm.gather(own, root, out=out.reshape(blocks.shape), **options)
        elif name == "scatter":
            expected = own
            blocks = np.stack([pattern(each, count, dtype) for each in range(world)])
            result = comm.scatter(blocks if rank == root else None, root, out=out, **options)
        elif name == "all_to_all":
            expected = np.stack([pattern(each, count, dtype) for each in range(world)])
            blocks = np.stack([own] * world)
            out = np.frombuffer(bytes([POISON]) * blocks.nbytes, dtype).copy()
            result = comm.all_to_all(blocks, out=out.reshape(blocks.shape), **options)
        else:
            expected = total
            blocks = np.stack([own] * world)
            result = comm.reduce_scatter(blocks, out=out, **options)

        def finish(timeout: float | None = None) -> None:
            if options.get("async_op"):
                result.wait(timeout)
            if expected is not None and out.tobytes() != expected.tobytes():
                raise AssertionError(f"rank {rank}: wrong result of {name}")

        return finish

    def message(self, kind: str, peer: int | None, tag: int, nbytes: int, **options: Any) -> Any:
        """Sends, or receives and compares; with async_op, wait() ends it. Returns the source."""
        comm = self.comm
        if kind == "send":
            array = np.full(nbytes, comm.rank + tag, np.uint8)
            result = comm.send(array, peer, tag, **options)
        else:
            array = np.full(nbytes, POISON, np.uint8)
            result = comm.recv(array, peer, tag, **options)

        def finish(timeout: float | None = None) -> Any:
            source = result.wait(timeout) if options.get("async_op") else result
            if kind == "recv" and (array != source + tag).any():
                raise AssertionError(f"rank {comm.rank}: wrong bytes from rank {source}")
            return source

        if not options.get("async_op"):
            return finish()
        self.works.append(finish)
        return len(self.works) - 1

    def close(self) -> None:
        self.comm.close()

    def forget(self) -> None:
        self.works.clear()
        self.comm = None

    def abort(self, reason: str) -> None:
        self.comm.abort(reason)

    # --- threads and processes -----------------------------------------------------------------

    def background(self, command: str, *arguments: Any, **options: Any) -> int:
        """Runs a command in another thread; joined() tells how it went."""
        outcome: list[Any] = []
        thread = threading.Thread(
            target=lambda: outcome.append(perform(self, command, arguments, options)),
            name="background",
        )
        thread.start()
        self.threads.append((thread, outcome))
        return len(self.threads) - 1

    def joined(self, index: int, timeout: float = 10.0) -> Any:
        thread, outcome = self.threads[index]
        thread.join(timeout)
        return outcome[0] if outcome else ("hangs", "", "", timeout)

    def fork(self, manner: str) -> Any:
        """Forks as a DataLoader does. "sleep" returns the child's pid; others how it ended."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            self._child(manner, writer)
        os.close(writer)
        if manner == "sleep":
            os.close(reader)
            return child
        with os.fdopen(reader, "rb") as stream:
            said = stream.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

    def _child(self, manner: str, writer: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if manner == "sleep":
            os.close(writer)
            time.sleep(600)
        said = []
        if manner in ("use", "drop"):
            uses = [
                lambda: self.comm.all_reduce(np.ones(4, "float32")),
                lambda: self.comm.all_reduce(np.ones(4, "float32"), async_op=True),
                lambda: self.comm.barrier(),
                *[lambda work=work: work() for work in self.works],
            ]
            for use in uses if manner == "use" else []:
                try:
                    use()
                    said.append("nothing")
                except RuntimeError as error:
                    said.append(type(error).__name__)
            self.comm.abort("not mine")
            self.comm.close()
            self.forget()
        os.write(writer, " ".join(said).encode())
        os.close(writer)
        if manner == "os_exit":
            os._exit(3)
        if manner == "raise":
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            raise WorkerFailed  # ends the child through the whole interpreter
        raise SystemExit(0)

    # --- what there is -------------------------------------------------------------------------

    def leftovers(self) -> dict[str, Any]:
        """File descriptors, threads and mappings of this process that could be dpcomm's."""
        tasks = Path("/proc/self/task")
        names = []
        for task in tasks.iterdir():
            with contextlib.suppress(OSError):
                names.append((task / "comm").read_text().strip())
        status = Path("/proc/self/status").read_text()
        return {
            "fds": len(os.listdir("/proc/self/fd")),
            "threads": sorted(name for name in names if "dpcomm" in name),
            "maps": len(self.maps().splitlines()),
            "rss_kib": int(status.partition("VmRSS:")[2].split()[0]),
        }

    def maps(self) -> str:
        """The mappings of shared memory."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        return "\n".join(line for line in lines if " rw-s " in line)

    def run(self, source: str, **names: Any) -> Any:
        """Executes Python; what it assigns to `result` is returned."""
        scope: dict[str, Any] = {"puppet": self, "np": np, "dpcomm": dpcomm, **names}
        exec(source, scope)
        return scope.get("result")

    def interpreter_exit(self) -> None:
        sys.exit(0)  # ends the process as a script that is over


def perform(
    puppet: Puppet, command: str, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...]:
    """(name of the error or None, its text, value, seconds)."""
    began = time.monotonic()
    try:
        value = getattr(puppet, command)(*arguments, **options)
        return None, "", value, time.monotonic() - began
    except Exception as error:
        return type(error).__name__, str(error), None, time.monotonic() - began
    except KeyboardInterrupt:
        return "KeyboardInterrupt", "", None, time.monotonic() - began


def delays() -> dict[str, int]:
    """Nanoseconds for which each thread of this process was ready to run and had no core."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended, or this kernel does not say
            found[task.name] = int((task / "schedstat").read_text().split()[1])
    return found


def serve(connection: Connection) -> None:
    puppet = Puppet()
    # As the test sees it and as it sees itself: not the same in a PID namespace of its own.
    connection.send((int(os.readlink("/proc/self")), os.getpid()))
    while True:
        try:
            command, arguments, options = connection.recv()
        except (EOFError, OSError):
            return
        before, began = delays(), time.monotonic()
        done = perform(puppet, command, arguments, options)
        ended = time.monotonic()
        waited = sum(each - before.get(task, 0) for task, each in delays().items())
        connection.send((*done, began, ended, waited / 1e9))


def main() -> None:
    address = sys.argv[1]
    with Listener(address, "AF_UNIX", backlog=64) as listener:
        print("ready", flush=True)
        while True:
            connection = listener.accept()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if os.fork() == 0:
                listener._listener._unlink = None  # type: ignore[attr-defined]
                listener._listener._socket.close()  # type: ignore[attr-defined]
                serve(connection)
                sys.exit(0)
            connection.close()


if __name__ == "__main__":
    main()
