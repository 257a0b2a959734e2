"""``dpcomm.launch()``: runs a function on several processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from dpcomm import _rank_process
from dpcomm.errors import PeerError, TimeoutError, UsageError
from dpcomm.options import milliseconds

__all__ = ["launch"]

_POLL_S = 0.02
_OTHERS_S = 2.0  # for the other ranks to end by themselves, once one has failed
_TERM_S = 1.0  # between SIGTERM and SIGKILL


def launch(
    fn: Callable[..., Any],
    nprocs: int,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    timeout: float | timedelta | None = None,
    *,
    start_method: str | None = None,
) -> list[Any]:
    """Calls ``fn(*args, **kwargs)`` on `nprocs` new processes of this machine, and waits for them.

    Each has the environment that ``dpcomm.init()`` reads: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
    and MASTER_PORT among it. This process keeps torch's store, so no port is guessed; without torch
    the port is one that was free a moment ago, for ``dpcomm.Communicator``. OMP_NUM_THREADS is 1
    where it is not set and `nprocs` is above 1. A rank that returns without
    ``destroy_process_group`` leaves its groups.

    `start_method` is chosen by itself where it is None:

    - "spawn", where `fn` and its arguments can be pickled and a new interpreter finds them:
      functions of modules and of scripts, which need ``if __name__ == "__main__":`` then.
    - "fork" otherwise: functions made in a notebook or at a prompt, lambdas, closures. All is there
      then as it is here. CUDA must not be in use here, nor a process group; and the ranks run torch
      with one thread, since threads of this process do not exist in them.

    Args:
        fn: what to call on each rank.
        nprocs: number of ranks, at least 1.
        args, kwargs: the same for all ranks. With "spawn" each rank gets a copy by pickle.
        timeout: seconds (or a timedelta) for all of it; None: no limit.
        start_method: "spawn", "fork" or None.

    Returns:
        What `fn` returned, by rank; it came by pickle.

    Raises:
        Exception: the first real error of a rank, of its own class, with that rank's traceback as
            ``__cause__`` and its number as a note (Python 3.11). Real is what does not only say
            that another rank is gone. One that cannot be pickled comes as a DpcommError.
        PeerError: a rank died, by a signal or by exit.
        TimeoutError: the time ran out; names the ranks that were still running.
        UsageError: arguments that make no sense.

    Whatever happens, Ctrl-C included, all processes of all ranks are ended before it returns or
    raises: the others get 2 s after a failure, then SIGTERM, and SIGKILL after one more second. A
    rank leads a process group of its own, so that its children end with it; if this process is
    killed, so are the ranks. Call it from any thread that stays until it returns.

    Cost: one interpreter for each rank, and the import of torch with "spawn" (own).
    """
    if isinstance(nprocs, bool) or not isinstance(nprocs, int) or nprocs < 1:
        raise UsageError(f"nprocs={nprocs!r} is no number of processes")
    if not callable(fn):
        raise UsageError(f"fn={fn!r} cannot be called")
    seconds = None if timeout is None else milliseconds(timeout) / 1000
    call, method = _how(fn, tuple(args), dict(kwargs or {}), start_method)
    with tempfile.TemporaryDirectory(prefix="dpcomm-launch-") as folder:
        ranks = _Ranks(Path(folder), nprocs, seconds)
        try:
            ranks.start(call, method)
            ranks.wait()
        finally:
            ranks.end()
        return ranks.results()


# How to start -------------------------------------------------------------------------------------


def _how(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], method: str | None
) -> tuple[Any, str]:
    """What a rank is given, (bytes to unpickle or the call itself), and the start method."""
    if method not in (None, "spawn", "fork"):
        raise UsageError(f"start_method={method!r} is none of spawn, fork")
    if method != "fork":
        try:
            pickled = pickle.dumps((fn, args, kwargs))
            if method == "spawn" or _found_by_a_new_interpreter(fn):
                return pickled, "spawn"
        except Exception as error:  # pickle raises whatever it likes
            if method == "spawn":
                raise UsageError(f"what a spawned rank is given must pickle: {error}") from error
    _check_fork()
    return (fn, args, kwargs), "fork"


def _found_by_a_new_interpreter(fn: Callable[..., Any]) -> bool:
    """Whether the file in which `fn` was made can be imported, as multiprocessing does it."""
    if getattr(fn, "__module__", None) != "__main__":
        return True
    main = sys.modules["__main__"]
    if hasattr(sys, "ps1") or hasattr(main, "get_ipython"):  # a prompt, a notebook
        return False
    file = getattr(main, "__file__", None)
    return getattr(main, "__spec__", None) is not None or (file is not None and Path(file).exists())


def _check_fork() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    why = "and fn cannot be pickled for a new interpreter: put it into a file of its own"
    if torch.cuda.is_initialized():
        raise UsageError(f"CUDA is in use in this process, so its children cannot use it, {why}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UsageError(
            "this process has a process group, which its children would take for theirs: call "
            f"torch.distributed.destroy_process_group() first; {why}"
        )


def _serve(nprocs: int) -> tuple[Any, int]:
    """torch's store, kept here, and its port; without torch None and a port that is free now."""
    try:
        from torch.distributed import TCPStore  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return None, int(probe.getsockname()[1])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, int(store.port)


class _Ranks:
    """The processes of one launch."""

    def __init__(self, folder: Path, nprocs: int, seconds: float | None) -> None:
        self._folder = folder
        self._nprocs = nprocs
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._processes: list[Any] = []
        self._codes: dict[int, int] = {}  # of those that have ended
        self._failures: dict[int, Exception] = {}  # in the order in which they came
        self._causes: list[Exception] = []  # those that do not only follow from another's
        self._store: Any = None

    def start(self, call: Any, method: str) -> None:
        context: Any = multiprocessing.get_context(method)
        for rank in range(self._nprocs):
            variables = self._variables(rank)
            process = context.Process(
                target=_rank_process.run,
                args=(call, str(self._folder), variables, os.getpid()),
                name=f"rank {rank}",
            )
            self._processes.append(process)
            with contextlib.ExitStack() as stack:
                stack.enter_context(_rank_process.interrupts_later())
                if method == "spawn":
                    stack.enter_context(_environment(variables))
                process.start()
        # Not before: a forked rank must not inherit the store's sockets and locks.
        self._store, port = _serve(self._nprocs)
        temporary = self._folder / "port.new"
        temporary.write_text(str(port))
        temporary.rename(self._folder / "port")

    def _variables(self, rank: int) -> dict[str, str | None]:
        variables: dict[str, str | None] = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._nprocs),
            "LOCAL_WORLD_SIZE": str(self._nprocs),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": None,  # follows when all are there
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": None,
            "TORCHELASTIC_RESTART_COUNT": None,
        }
        if self._nprocs > 1 and not os.environ.get("OMP_NUM_THREADS"):
            variables["OMP_NUM_THREADS"] = "1"
        return variables

    def wait(self) -> None:
        """Until all have ended, one has failed and the others had their time, or time is up."""
        others: float | None = None
        while len(self._codes) < self._nprocs:
            self._look()
            now = time.monotonic()
            if self._failures and others is None:
                others = now + _OTHERS_S
            if others is not None and now > others:
                return
            if self._deadline is not None and now > self._deadline and not self._failures:
                running = [r for r in range(self._nprocs) if r not in self._codes]
                raise TimeoutError(
                    f"launch was not complete after {self._seconds:g} s: rank(s) "
                    f"{', '.join(map(str, running))} of {self._nprocs} still ran"
                )
            time.sleep(_POLL_S)

    def _look(self) -> None:
        """Notes who has ended or failed since the last look."""
        for rank, process in enumerate(self._processes):
            if rank in self._codes:
                continue
            code = _rank_process.exit_code(process)
            failure = self._folder / f"{rank}.error"
            if rank not in self._failures and failure.exists():
                error, only_follows = _rank_process.read_error(failure, rank)
                self._fail(rank, error, only_follows)
            if code is None:
                continue
            self._codes[rank] = code
            done = (self._folder / f"{rank}.result").exists()
            if rank not in self._failures and (code != 0 or not done):
                ending = _ending(code, "after" if done else "before")
                self._fail(
                    rank, PeerError(f"rank {rank} (pid {process.pid}) {ending}"), only_follows=False
                )

    def _fail(self, rank: int, error: Exception, only_follows: bool) -> None:
        self._failures[rank] = error
        if not only_follows:
            self._causes.append(error)

    def end(self) -> None:
        """Ends all processes of all ranks. Ctrl-C while it waits only makes it shorter."""
        started = [process for process in self._processes if process.pid is not None]
        try:
            for process in started:
                if _rank_process.exit_code(process) is None:
                    _rank_process.signal_group(process, signal.SIGTERM)
            deadline = time.monotonic() + _TERM_S
            while time.monotonic() < deadline and any(
                _rank_process.exit_code(process) is None for process in started
            ):
                time.sleep(_POLL_S)
        finally:
            with _rank_process.interrupts_later():
                for process in started:  # none is reaped yet: no number belongs to another by now
                    _rank_process.signal_group(process, signal.SIGKILL)
                for process in started:
                    process.join()
                    process.close()
            self._processes = []
            self._store = None

    def results(self) -> list[Any]:
        """What the ranks returned; raises the first real error."""
        for error in (*self._causes, *self._failures.values()):
            raise error
        results = []
        for rank in range(self._nprocs):
            try:
                results.append(pickle.loads((self._folder / f"{rank}.result").read_bytes()))
            except Exception as error:
                raise UsageError(f"the result of rank {rank} cannot be read: {error}") from error
        return results


def _ending(code: int, when: str) -> str:
    if code == 0:
        return "ended by os._exit(0) before fn returned"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name} {when} fn returned"
    return f"ended with exit code {code} {when} fn returned; its own output may say why"


@contextlib.contextmanager
def _environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """os.environ as a rank is to find it when its interpreter starts."""
    before = {name: os.environ.get(name) for name in variables}
    _rank_process.set_variables(variables)
    try:
        yield
    finally:
        _rank_process.set_variables(before)
