"""What ``dpcomm.launch()`` runs in each rank, and what it asks the system about one."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dpcomm.errors import DpcommError, PeerError, TimeoutError

_PR_SET_PDEATHSIG = 1
_PORT_S = 60.0


class RankTraceback(Exception):  # noqa: N818  never raised: the cause of what is
    """The traceback of a rank, as text."""


# In the rank --------------------------------------------------------------------------------------


def run(call: Any, folder: str, variables: Mapping[str, str | None], parent: int) -> None:
    """Calls the function and leaves ``<rank>.result`` or ``<rank>.error`` in `folder`.

    Args:
        call: (function, args, kwargs), or bytes that unpickle to that.
        folder: for the results; the file "port" in it appears when the store stands.
        variables: environment, None for those to be unset.
        parent: pid of the launching process.
    """
    _belong_to(parent)
    set_variables(variables)
    rank = variables["RANK"]
    try:
        os.environ["MASTER_PORT"] = _port(Path(folder))
        if isinstance(call, bytes):
            call = pickle.loads(call)
        elif "torch" in sys.modules:
            # Forked: the threads of the parent's pools are not here, so torch must not want them.
            sys.modules["torch"].set_num_threads(1)
        fn, args, kwargs = call
        result = fn(*args, **kwargs)
        data = _pickled_result(result, rank)
        _leave_groups()
        _write(Path(folder) / f"{rank}.result", data)
    except BaseException as error:
        _write(Path(folder) / f"{rank}.error", _pickled_error(error))
        # Told before the peers are, whose errors only follow from this one.
        _flush()
        os._exit(1)


def _belong_to(parent: int) -> None:
    """Leads a process group, and dies with the parent."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    # What the parent's handlers do is the parent's business (a notebook's, say).
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _port(folder: Path) -> str:
    deadline = time.monotonic() + _PORT_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            return (folder / "port").read_text()
        if time.monotonic() > deadline:
            raise DpcommError("the launching process made no store")
        time.sleep(0.005)


def _leave_groups() -> None:
    torch = sys.modules.get("torch")
    if (
        torch is not None
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        torch.distributed.destroy_process_group()


def _pickled_result(result: Any, rank: str | None) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise DpcommError(f"what rank {rank} returned cannot be pickled: {error}") from error


def _pickled_error(error: BaseException) -> bytes:
    """(the exception, its traceback as text, whether it only says that another rank is gone)."""
    text = "".join(traceback.format_exception(error))
    follows = isinstance(error, PeerError | TimeoutError) or type(error).__name__.startswith("Dist")
    error.__traceback__ = error.__cause__ = error.__context__ = None
    what = "".join(traceback.format_exception_only(error)).strip()
    if not isinstance(error, Exception):  # such as sys.exit(): must not end the launching process
        error = PeerError(f"ended by {what}")
    try:
        data = pickle.dumps((error, text, follows))
        pickle.loads(data)  # some exceptions pickle but do not come back
        return data
    except Exception:
        return pickle.dumps((DpcommError(what), text, follows))


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.rename(path)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


# In the launching process -------------------------------------------------------------------------


def set_variables(variables: Mapping[str, str | None]) -> None:
    """Sets os.environ; None removes."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def read_error(path: Path, rank: int) -> tuple[Exception, bool]:
    """The exception that a rank left, with its traceback as the cause; whether it only follows."""
    error: Exception
    try:
        error, text, follows = pickle.loads(path.read_bytes())
    except Exception as problem:  # its class is not known here, say
        error, text, follows = DpcommError(f"an error that cannot be read: {problem}"), "", False
    error.__cause__ = RankTraceback(f"\n{text}")
    if sys.version_info >= (3, 11):
        error.add_note(f"(raised on rank {rank} of dpcomm.launch)")
    return error, follows


def exit_code(process: Any) -> int | None:
    """Exit code of a process of multiprocessing, negative for a signal; None while it runs.

    Does not reap it, so its number stays its own.
    """
    try:
        status = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # multiprocessing has reaped it, as it does at other starts
        code: int | None = process.exitcode
        return code
    if status is None or status.si_pid == 0:
        return None
    return status.si_status if status.si_code == os.CLD_EXITED else -status.si_status


def signal_group(process: Any, number: int) -> None:
    """Sends a signal to a process that is not reaped yet, and to the group that it leads."""
    with contextlib.suppress(ChildProcessError, ProcessLookupError, PermissionError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        os.kill(process.pid, number)
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, number)


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Keeps Ctrl-C back until the end of the block (in the main thread; elsewhere none comes)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), signal.SIGINT)
