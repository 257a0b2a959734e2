"""The peers' groups of processes: how they start, take orders, stand still, and end.

A group is N ranks (bench/peer_rank.py) and, for an MPI, its launcher. Nothing of a group stays:
every process carries the run's mark in its environment and is found by it, however its launcher
went, and files in /dev/shm that a rank had mapped are removed after the ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PEERS", "Group", "GroupError", "Peer", "end_processes"]

MARK = "PEERS_RUN"
PROGRAM = Path(__file__).with_name("peer_rank.py")
HOME = Path(__file__).resolve().parents[1]
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_SIZE")
FOREIGN = ("OMPI_", "PMIX_", "PRTE_", "PMI_", "MPIR_", "MPICH_", "I_MPI_", "FI_", "CCL_", "HYDRA_")
SHARED_MEMORY = "/dev/shm/"


class GroupError(Exception):
    """A group did not start, failed or was late; the text says which and why."""


@dataclass(frozen=True)
class Peer:
    """A library under test and one way of calling it."""

    name: str  # in tables
    calls: str  # in peer_calls.CALLS
    environment: str = ""  # folder under that of `make peers`; "" for what runs in this Python
    launcher: str = ""  # in that environment; "" starts the ranks directly
    own_python: bool = False  # the environment's, not this one
    variables: dict[str, str] = field(default_factory=dict, hash=False)  # {environment}, {rank}...
    modules: tuple[str, ...] = ()  # that this Python must have
    needs: tuple[str, str] | None = None  # (module, attribute) that this Python must have
    program: Path = PROGRAM

    def missing(self, environments: Path) -> str:
        """Why it cannot run here; empty if it can."""
        if self.environment:
            folder = environments / self.environment
            reason = folder.with_suffix(".reason")
            if reason.exists():
                return reason.read_text().strip()
            if not (folder / "installed").exists():
                return "not installed (make peers)"
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"this Python has no {module}"
        if self.needs and not hasattr(importlib.import_module(self.needs[0]), self.needs[1]):
            return f"this {self.needs[0]} has no {self.needs[1]}"
        return ""


_MPI: dict[str, Any] = {"calls": "mpi", "launcher": "bin/mpiexec", "own_python": True}
_ONECCL = {
    "CCL_WORKER_OFFLOAD": "0",
    "LD_LIBRARY_PATH": "{environment}/lib",
    "CCL_LOG_LEVEL": "error",
}
_OFI = {"CCL_ATL_TRANSPORT": "ofi", "CCL_ATL_SHM": "1", "CCL_PROCESS_LAUNCHER": "none"}
_OFI |= {"CCL_LOCAL_RANK": "{rank}", "CCL_LOCAL_SIZE": "{size}"}
_TORCH = ("torch",)

# dpcomm first, then its peers; the last two are no peers but measures.
PEERS = (
    Peer("dpcomm", "dpcomm", modules=("dpcomm._core",)),
    Peer(
        "dpcomm, shared",
        "dpcomm-shared",
        modules=("dpcomm._core",),
        needs=("dpcomm", "empty_array"),
    ),
    Peer("dpcomm, dist", "dpcomm-torch", modules=("torch", "dpcomm._torch")),
    Peer("openmpi", environment="openmpi", **_MPI),
    Peer("mpich", environment="mpich", **_MPI),
    Peer("impi", environment="impi", **_MPI),
    Peer(
        "oneccl", "oneccl", "oneccl", "bin/mpiexec", True, {**_ONECCL, "CCL_ATL_TRANSPORT": "mpi"}
    ),
    Peer("oneccl, ofi", "oneccl", "oneccl", "", True, {**_ONECCL, **_OFI}),
    Peer("deepspeed", "deepspeed", "deepspeed", modules=_TORCH),
    Peer("gloo, dist", "gloo", modules=_TORCH),
    Peer("no-op, dist", "no-operation", modules=_TORCH),
    Peer("copy", "copy"),
)


class Group:
    """The processes of one peer.

    Args:
        peer: What to start.
        size: Ranks.
        folder: For the group's files; made, and empty.
        environments: Where `make peers` put them.
        mark: Of the run, in every process's environment.
        pin: Each rank to a core of its own, if they suffice. Open MPI and Intel MPI do it anyway.
    """

    def __init__(
        self, peer: Peer, size: int, folder: Path, environments: Path, mark: str, pin: bool = False
    ) -> None:
        self.peer, self.size = peer, size
        self._pin = pin and size <= len(_cores())
        self.version = ""
        self._folder, self._mark = folder, mark
        self._environment = (environments / (peer.environment or ".")).resolve()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[Any] = []
        self._sockets: list[socket.socket] = []
        self._pids: list[int] = []
        self._mapped: set[str] = set()
        folder.mkdir(parents=True)

    # --- start ----------------------------------------------------------------------------------
    def start(self, deadline_s: float, largest_bytes: int) -> None:
        """Starts the ranks, waits until they have met and have memory; then they stand still."""
        name = f"{self._mark}-{self.peer.calls}-{self._folder.name}"
        end = time.monotonic() + deadline_s
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("\0" + name)  # in no folder: nothing to remove
            listener.listen(self.size)
            with (self._folder / "log").open("wb") as log:
                for command, variables in self._commands(name):
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            env=variables,
                            cwd=self._folder,
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                            preexec_fn=_die_with_parent,
                        )
                    )
            self._accept(listener, end)
        self.ask({"do": "reserve", "bytes": largest_bytes}, end - time.monotonic())
        self._note_mapped()
        self.stop()

    def _commands(self, socket_name: str) -> Iterator[tuple[list[str], dict[str, str]]]:
        peer = self.peer
        python = str(self._environment / "bin/python") if peer.own_python else sys.executable
        base = {k: v for k, v in os.environ.items() if k not in PLACE and not k.startswith(FOREIGN)}
        base.pop("PYTHONPATH", None)
        base |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(self._folder),
        }
        base |= {MARK: self._mark, "PEERS_SOCKET": socket_name, "PEERS_CALLS": peer.calls}
        base |= {"PEERS_SIZE": str(self.size), "PEERS_FOLDER": str(self._folder)}
        base |= {"PEERS_ENVIRONMENT": str(self._environment)}
        if not peer.own_python:
            paths = [str(PROGRAM.parent), str(HOME), os.environ.get("PYTHONPATH", "")]
            base["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        if peer.environment == "mpich" and self.size > len(_cores()):
            base["PEERS_THREADS"] = "multiple"  # its waits leave the core to others only there
        for rank in range(1 if peer.launcher else self.size):
            values = {"environment": self._environment, "rank": rank, "size": self.size}
            own = {k: v.format(**values) for k, v in peer.variables.items()}
            command = [python, str(peer.program)]
            if peer.launcher:
                command = [*self._launcher(), *command]
            else:
                own["PEERS_RANK"] = str(rank)
                if self._pin:
                    own["PEERS_CORE"] = str(_cores()[rank])
            yield command, {**base, **own}

    def _launcher(self) -> list[str]:
        command = [str(self._environment / self.peer.launcher)]
        if self.peer.environment == "openmpi":
            command += ["--allow-run-as-root"] if os.geteuid() == 0 else []
            command += ["--map-by", ":OVERSUBSCRIBE"] if self.size > len(_cores()) else []
        if self.peer.environment == "mpich" and self._pin:
            command += ["-bind-to", "core"]
        return [*command, "-n", str(self.size)]

    def _accept(self, listener: socket.socket, end: float) -> None:
        while len(self._sockets) < self.size:
            listener.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                self._sockets.append(listener.accept()[0])
            if any(p.poll() is not None for p in self._processes):
                raise self._error("ended at its start")
            if time.monotonic() > end:
                raise self._error(f"only {len(self._sockets)} of {self.size} ranks started in time")
        self._links = [link.makefile("rb") for link in self._sockets]
        greetings = self._answers(end)
        self._pids = [greeting["pid"] for greeting in greetings]
        self.version = greetings[0]["version"]
        if sorted(greeting["rank"] for greeting in greetings) != list(range(self.size)):
            raise self._error(f"ranks are {[greeting['rank'] for greeting in greetings]}")

    @property
    def pids(self) -> list[int]:
        """The ranks."""
        return list(self._pids)

    # --- orders ---------------------------------------------------------------------------------
    def ask(self, order: dict[str, Any], deadline_s: float) -> list[dict[str, Any]]:
        """Gives an order to all ranks and returns their answers.

        Raises:
            GroupError: A rank failed, ended, or was late.
        """
        end = time.monotonic() + deadline_s
        try:
            for raw in self._sockets:
                raw.sendall(json.dumps(order).encode() + b"\n")
        except OSError as error:
            raise self._error("a rank ended") from error
        return self._answers(end)

    def _answers(self, end: float) -> list[dict[str, Any]]:
        answers = []
        for link, raw in zip(self._links, self._sockets, strict=True):
            raw.settimeout(max(0.01, end - time.monotonic()))
            try:
                line = link.readline()
            except OSError as error:
                raise self._error("no answer in time") from error
            answer = json.loads(line) if line else {"error": "a rank ended"}
            if "error" in answer:
                raise self._error(answer["error"])
            answers.append(answer)
        return answers

    def _error(self, text: str) -> GroupError:
        lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        return GroupError(f"{text} [{lines[-1].strip()}]" if lines else text)

    # --- standing still -------------------------------------------------------------------------
    def stop(self) -> None:
        """Stops the ranks with all their threads; launchers sleep anyway."""
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The ranks run inside the block only."""
        try:
            for pid in self._pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            yield
        finally:
            self.stop()

    # --- end ------------------------------------------------------------------------------------
    def close(self, deadline_s: float = 5) -> None:
        """Lets the ranks leave, then ends whatever is left of the group."""
        self._note_mapped()
        if self._links:
            with contextlib.suppress(GroupError), self.running():
                self.ask({"do": "quit"}, deadline_s)
        end = time.monotonic() + 2
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.01, end - time.monotonic()) if self._links else 0.01)
        self.kill()

    def kill(self) -> None:
        """Ends the group's processes at once and removes what they had in /dev/shm."""
        self._note_mapped()
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        end_processes(self._mark, self._folder)
        for process in self._processes:
            process.wait()
        for closable in (*self._links, *self._sockets):
            with contextlib.suppress(OSError):
                closable.close()
        self._links, self._sockets, self._pids = [], [], []
        for name in self._mapped:
            with contextlib.suppress(OSError):
                os.unlink(name)

    def _note_mapped(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    name = line.split(maxsplit=5)[5] if line.count("/") else ""
                    if name.startswith(SHARED_MEMORY) and not name.endswith("(deleted)"):
                        self._mapped.add(name)


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def end_processes(mark: str, folder: Path | None = None) -> list[int]:
    """Kills the processes with this run's mark (and this group's folder); returns their ids."""
    wanted = [f"{MARK}={mark}".encode()]
    if folder is not None:
        wanted.append(f"PEERS_FOLDER={folder}".encode())
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if all(text in variables for text in wanted):
            with contextlib.suppress(OSError):
                os.kill(int(entry.name), signal.SIGKILL)
                found.append(int(entry.name))
    return found
