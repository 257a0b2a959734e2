"""Processes that run cases on request: a rank each, or for inproc all ranks as threads of one."""

from __future__ import annotations

import itertools
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_S = 60.0


class Process:
    """A worker and the pipes to it."""

    def __init__(self, first: int, last: int) -> None:
        self.ranks = range(first, last + 1)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DPCOMM_")}
        paths = [str(HERE), *sys.path]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        environment["OMP_NUM_THREADS"] = environment["OPENBLAS_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(first), str(last)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.to, self.answers = self.process.stdin, self.process.stdout

    def send(self, message: Any) -> None:
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self.to.write(struct.pack("!Q", len(data)) + data)
        self.to.flush()

    def receive(self, deadline: float) -> Any:
        (size,) = struct.unpack("!Q", self._exactly(8, deadline))
        return pickle.loads(self._exactly(size, deadline))

    def _exactly(self, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            ready, _, _ = select.select(
                [self.answers], [], [], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise TimeoutError(f"ranks {self.ranks} do not answer")
            part = os.read(self.answers.fileno(), min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError(f"ranks {self.ranks} ended with {self.process.wait(5)}")
            parts += part
        return bytes(parts)

    def end(self) -> None:
        self.to.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()


class Pool:
    """Ranks 0..size-1 of one transport; groups of any size up to that run on the first of them."""

    def __init__(self, transport: str, size: int) -> None:
        self.transport = transport
        self.size = size
        self.broken = False
        self._numbers = itertools.count()
        self._processes: list[Process] = []
        self._folder = tempfile.TemporaryDirectory(prefix="dpcomm-test-")

    def _start(self) -> None:
        if self._processes:
            return
        if self.transport == "inproc":
            self._processes = [Process(0, self.size - 1)]
        else:
            self._processes = [Process(rank, rank) for rank in range(self.size)]

    def call(
        self,
        world: int,
        method: str,
        *arguments: Any,
        environment: dict[str, str] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> list[Any]:
        """Calls Rank.method(*arguments) on ranks 0..world-1; their answers.

        A rank that fails or is late is an AssertionError, and the pool starts afresh.
        """
        self._start()
        deadline = time.monotonic() + deadline_s
        used = [process for process in self._processes if process.ranks[0] < world]
        for process in used:
            requests = [(method, arguments) if rank < world else None for rank in process.ranks]
            process.send((environment or {}, requests))
        answers: list[Any] = []
        try:
            for process in used:
                answered = process.receive(deadline)
                answers += [answered[i] for i in sorted(answered)]
        except (TimeoutError, EOFError) as error:
            self._give_up()
            raise AssertionError(f"{self.transport}, world {world}, {method}: {error}") from error
        failures = [text for worked, text in answers if not worked]
        if failures:
            self._give_up()
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def _give_up(self) -> None:
        """Shows where everybody stands, and ends all."""
        for process in self._processes:
            if process.process.poll() is None:
                process.process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        for process in self._processes:
            process.process.kill()
        self.close()

    def close(self) -> None:
        """Ends all processes."""
        for process in self._processes:
            process.end()
        self._processes = []

    def __del__(self) -> None:
        self.close()

    def group(self, world: int, environment: dict[str, str] | None = None, **options: Any) -> Group:
        """A new communicator of ranks 0..world-1; `environment` holds while it is made."""
        name = f"{self.transport}-{next(self._numbers)}"
        if self.transport != "inproc":
            options["init"] = f"file://{self._folder.name}/{name}"
        options |= {"transport": self.transport, "wire_links": "all"}
        options.setdefault("timeout", 40.0)
        return Group(self, name, world, environment or {}, options)


class Group:
    """A communicator on all its ranks."""

    def __init__(
        self,
        pool: Pool,
        name: str,
        world: int,
        environment: dict[str, str],
        options: dict[str, Any],
    ) -> None:
        self.pool, self.name, self.world = pool, name, world
        names = ("SLOT_BYTES", "FAULTS", "SPIN_US", "YIELD_US", "ISA")
        clean = {f"DPCOMM_{name}": "" for name in names}  # empty counts as not set
        lanes = pool.call(world, "open", name, world, options, environment=clean | environment)
        assert all(each == lanes[0] for each in lanes)
        self.lanes: list[tuple[int, int]] = lanes[0]

    def call(self, method: str, *arguments: Any, deadline_s: float = DEADLINE_S) -> list[Any]:
        """Rank.method(name, *arguments) on all ranks."""
        return self.pool.call(self.world, method, self.name, *arguments, deadline_s=deadline_s)

    def close(self) -> None:
        """On all ranks; nothing happens where the pool was ended."""
        if self.pool._processes:
            self.call("close")

    def __enter__(self) -> Group:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
