"""Drives puppets: processes that play ranks and may be killed, stopped and interrupted."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

# What the library promises: an error comes so many seconds after its cause, or after the next call,
# or after the time limit.
PROMISE_S = 1.0
PATIENCE_S = 25.0  # after that a test says "hangs"

# (seconds from a fault to the last survivor's error, the test), for the summary.
TIMES: list[tuple[float, str]] = []


def named_segments() -> set[str]:
    """dpcomm's files in /dev/shm."""
    name = re.compile(r"dpcomm-[0-9a-f]{16}")
    return {path.name for path in Path("/dev/shm").iterdir() if name.fullmatch(path.name)}


def children(parent: int) -> set[int]:
    """The living children of a process."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent and fields[0] != "Z":
                    found.add(int(entry.name))
    return found


class Pulse:
    """A thread that does nothing but sleep for 20 ms and look at the clock.

    Where it did not come to that for long, the whole machine (or this container) stood still or
    was hopelessly overloaded, whatever the library did.
    """

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        last = time.monotonic()
        while not self._over.wait(0.02):
            now = time.monotonic()
            self.longest_s = max(self.longest_s, now - last)
            last = now
        self.longest_s = max(self.longest_s, time.monotonic() - last)


@dataclass
class Outcome:
    """How a command went on one rank.

    Times are the rank's own (time.monotonic() is the same clock in all processes), so that what
    the test itself is late does not count. `waited_s` is for how long its threads, taken together,
    were ready to run and had no core: the kernel counts that for each thread, and in an overloaded
    machine it is what makes everything late. A wait that the library makes too long is time asleep,
    and a loop of its own is time on a core; neither counts there. (Ranks that all spin, two on
    each core, have half of that time in `waited_s`; it is what they would not need if each had a
    core.)
    """

    rank: int
    error: str | None
    text: str
    value: Any
    seconds: float
    began: float = 0.0
    ended: float = 0.0
    waited_s: float = 0.0

    def took(self, since: float) -> float:
        """From `since`, or from the call if that was later."""
        return self.ended - max(since, self.began)


class Rank:
    """One puppet."""

    def __init__(self, number: int, address: str) -> None:
        self.number = number
        self._connection: Connection = Client(address, "AF_UNIX")
        self.pid: int
        self.own_pid: int
        self.pid, self.own_pid = self._connection.recv()
        self.dead = False
        self._workers: set[int] = set()  # of the time of its death

    def begin(self, command: str, *arguments: Any, **options: Any) -> None:
        self._connection.send((command, arguments, options))

    def end(self, patience: float = PATIENCE_S) -> Outcome:
        try:
            if not self._connection.poll(patience):
                now = time.monotonic()
                return Outcome(self.number, "hangs", "", None, patience, now - patience, now)
            return Outcome(self.number, *self._connection.recv())
        except (EOFError, OSError):
            return Outcome(self.number, "died", "", None, 0.0)

    def do_outcome(self, command: str, *arguments: Any, **options: Any) -> Outcome:
        self.begin(command, *arguments, **options)
        return self.end()

    def do(self, command: str, *arguments: Any, **options: Any) -> Any:
        """Begins, ends, and expects no error."""
        outcome = self.do_outcome(command, *arguments, **options)
        assert outcome.error is None, outcome
        return outcome.value

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> float:
        """SIGKILL; returns when it was sent."""
        self.dead = True
        self.remember_workers()
        now = time.monotonic()
        self.signal(signal.SIGKILL)
        return now

    def remember_workers(self) -> None:
        """To be called before it dies; they are ended with it in discard()."""
        self._workers |= children(self.pid)

    def ended(self, patience: float = PATIENCE_S) -> bool:
        """Waits until the process is gone (or a zombie) with all its threads."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return True
            with contextlib.suppress(OSError):
                if state == "Z" and len(os.listdir(f"/proc/{self.pid}/task")) <= 1:
                    return True
            time.sleep(0.01)
        return False

    def exit_signal(self) -> int:
        """The signal that ended the process, which is a zombie now; 0: it exited with 0."""
        stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return int(stat[49])  # field 52, exit_code

    def stopped(self, patience: float = PATIENCE_S) -> bool:
        """Waits until the process is stopped."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{self.pid}/stat").read_text()
                if stat.rpartition(")")[2].split()[0] == "T":
                    return True
            time.sleep(0.01)
        return False

    @property
    def name(self) -> str:
        """As dpcomm's messages call it."""
        return f"rank {self.number} (pid {self.own_pid}, host {socket.gethostname()})"

    def discard(self) -> None:
        """Ends the process and its workers."""
        self._connection.close()
        workers = self._workers | children(self.pid)
        with contextlib.suppress(OSError):
            self.signal(signal.SIGKILL)
        for worker in workers:
            with contextlib.suppress(OSError):
                if b"puppet.py" in Path(f"/proc/{worker}/cmdline").read_bytes():
                    os.kill(worker, signal.SIGKILL)


class Group:
    """Some ranks of one communicator."""

    def __init__(self, addresses: list[str], folder: Path) -> None:
        self.folder = folder
        self._generation = 0
        self.ranks = [Rank(number, address) for number, address in enumerate(addresses)]

    def __iter__(self) -> Iterator[Rank]:
        return iter(rank for rank in self.ranks if not rank.dead)

    def __getitem__(self, number: int) -> Rank:
        return self.ranks[number]

    def others(self, *victims: int) -> list[Rank]:
        return [rank for rank in self if rank.number not in victims]

    def init(self) -> str:
        """A fresh address for a start."""
        self._generation += 1
        return f"file://{self.folder}/store{self._generation}"

    def start(self, timeout: float = 20.0, **options: Any) -> None:
        """Makes the communicator on all ranks; special={rank: options} for single ones."""
        special = options.pop("special", {})
        init = options.pop("init", None) or self.init()
        for rank in self:
            rank.begin(
                "start",
                rank.number,
                len(self.ranks),
                init,
                timeout=timeout,
                **options,
                **special.get(rank.number, {}),
            )
        for outcome in self.end():
            assert outcome.error is None, outcome

    def begin(self, command: str, *arguments: Any, **options: Any) -> None:
        for rank in self:
            rank.begin(command, *arguments, **options)

    def end(self, ranks: list[Rank] | None = None) -> list[Outcome]:
        return [rank.end() for rank in (list(self) if ranks is None else ranks)]

    def do(self, command: str, *arguments: Any, **options: Any) -> None:
        """On all living ranks, without an error."""
        self.begin(command, *arguments, **options)
        for outcome in self.end():
            assert outcome.error is None, outcome

    def outcomes(self, command: str, *arguments: Any, **options: Any) -> list[Outcome]:
        self.begin(command, *arguments, **options)
        return self.end()

    def restart(self, timeout: float = 20.0) -> None:
        """The survivors make a communicator of their own and use it."""
        survivors = list(self)
        init = self.init()
        for number, rank in enumerate(survivors):
            rank.begin("start", number, len(survivors), init, timeout=timeout)
        for outcome in self.end(survivors):
            assert outcome.error is None, outcome
        self.do("collective", "all_reduce", 5000)
        self.do("collective", "broadcast", 300_000)
        self.do("collective", "barrier")

    def discard(self) -> None:
        for rank in self.ranks:
            rank.discard()


class Stage:
    """The process that forks puppets, and the groups made of them.

    Args:
        module: What puppets import besides dpcomm.
        prefix: What runs the process: a command that takes another one as its last arguments.
    """

    def __init__(self, module: str = "", prefix: tuple[str, ...] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stage-")
        self.address = f"{self._folder.name}/socket"
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        puppet = Path(__file__).with_name("puppet.py")
        self._process = subprocess.Popen(
            [*prefix, sys.executable, str(puppet), self.address, *([module] if module else [])],
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdout is not None
        self.works = self._process.stdout.readline() == b"ready\n"

    @contextlib.contextmanager
    def group(self, world: int, *others: Stage) -> Iterator[Group]:
        """Fresh processes, gone afterwards: `world` from here, and one from each other stage."""
        with tempfile.TemporaryDirectory(prefix="group-") as folder:
            addresses = [self.address] * world + [other.address for other in others]
            group = Group(addresses, Path(folder))
            try:
                yield group
            finally:
                group.discard()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()


def late(outcomes: list[Outcome], since: float, limit: float = 0.0) -> float:
    """Seconds from `since`, or from a rank's call if that was later, and beyond the time limit,
    until the last one was told; without what any of them waited for a core."""
    waited = max(outcome.waited_s for outcome in outcomes)
    return max(outcome.took(since) for outcome in outcomes) - limit - waited


def expect_in_time(outcomes: list[Outcome], since: float = 0.0, limit: float = 0.0) -> None:
    """Each command ended as soon as the library promises; by default from when it began."""
    seconds = late(outcomes, since, limit)
    assert seconds < PROMISE_S, f"{seconds:.2f} s late: {outcomes}"


def expect_done_since(outcomes: list[Outcome], since: float) -> None:
    """The same of what began before these commands, in threads that they join."""
    expect_in_time([replace(outcome, began=since) for outcome in outcomes])


def expect_error(
    outcomes: list[Outcome], error: str, *parts: str, since: float | None = None
) -> str:
    """Every outcome is `error`, all with the same text, which has all the parts. The text."""
    for outcome in outcomes:
        assert outcome.error == error, f"{outcome} is no {error}"
    texts = {outcome.text for outcome in outcomes}
    assert len(texts) == 1, "not the same text everywhere:\n" + "\n".join(sorted(texts))
    text = texts.pop()
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"
    if since is not None:
        seconds = max(outcome.took(since) for outcome in outcomes)
        TIMES.append((seconds, os.environ.get("PYTEST_CURRENT_TEST", "").split()[0]))
        expect_in_time(outcomes, since)
    return text
