"""What the doctor looks at: files, limits and calls of the system, behind one object for tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import socket
import struct
from collections.abc import Callable
from pathlib import Path

__all__ = ["Machine"]

_SIOCGIFADDR = 0x8915


class Machine:
    """This machine. Tests give another `root` for /proc and /sys, or override a method."""

    def __init__(self, root: str = "/") -> None:
        self._root = Path(root)

    def read(self, path: str) -> str | None:
        """The text of a file of the system, stripped; None if it is not there."""
        try:
            return (self._root / path.lstrip("/")).read_text().strip()
        except OSError:
            return None

    def cores(self) -> int:
        """Cores that this process may use."""
        return len(os.sched_getaffinity(0))

    def limit(self, which: int) -> tuple[int, int]:
        """Soft and hard limit (resource.RLIMIT_*); resource.RLIM_INFINITY: none."""
        return resource.getrlimit(which)

    def free_bytes(self, folder: str) -> int:
        """Free bytes of the file system of a folder. Raises OSError."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize

    def reserve(self, folder: str, nbytes: int) -> None:
        """Reserves memory as a communicator would, and lets it go. Raises OSError.

        Args:
            folder: Of the segment; "": a memfd.
        """
        if folder:
            file = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        else:
            file = os.memfd_create("dpcomm-doctor", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(file, 0, nbytes)
        finally:
            os.close(file)

    def interfaces(self) -> dict[str, str | None]:
        """IPv4 address by name of interface; None: it has none."""
        found: dict[str, str | None] = {}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                found[name] = None
                with contextlib.suppress(OSError):
                    import fcntl

                    request = struct.pack("256s", name.encode()[:15])
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                    found[name] = socket.inet_ntoa(answer[20:24])
        return found

    def own_address_towards(self, host: str) -> str:
        """The address by which this machine reaches `host`. Raises OSError. Sends nothing."""
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])

    def open_files_of_sibling(self) -> str | None:
        """Opens a file of a sibling through /proc, as ranks do; what went wrong, or None."""
        file = os.memfd_create("dpcomm-doctor", os.MFD_CLOEXEC)
        try:
            return _between_siblings(lambda pid: os.close(os.open(f"/proc/{pid}/fd/{file}", 2)))
        finally:
            os.close(file)

    def read_memory_of_sibling(self) -> str | None:
        """Copies from a sibling's memory (process_vm_readv); what went wrong, or None."""
        source = ctypes.create_string_buffer(b"dpcomm", 64)  # where it is after the fork, too

        def body(pid: int) -> None:
            target = ctypes.create_string_buffer(64)
            own = (ctypes.c_size_t * 2)(ctypes.addressof(target), 64)
            other = (ctypes.c_size_t * 2)(ctypes.addressof(source), 64)
            libc = ctypes.CDLL(None, use_errno=True)
            got = libc.process_vm_readv(pid, own, 1, other, 1, 0)
            if got != 64:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

        return _between_siblings(body)


def _between_siblings(body: Callable[[int], None]) -> str | None:
    """Runs `body` in one child with the pid of another; the text of its OSError, or None."""
    stay_read, stay_write = os.pipe()
    told_read, told_write = os.pipe()
    children = []
    try:
        victim = os.fork()
        if victim == 0:
            for end in (stay_write, told_read, told_write):
                os.close(end)
            os.read(stay_read, 1)  # until the parent closes its end
            os._exit(0)
        children.append(victim)
        actor = os.fork()
        if actor == 0:
            os.close(stay_write)  # else the first child would wait for this one
            try:
                body(victim)
            except OSError as error:
                os.write(told_write, (error.strerror or str(error)).encode())
            finally:
                os._exit(0)
        children.append(actor)
        os.waitpid(children.pop(), 0)
        os.close(told_write)
        told_write = -1
        return os.read(told_read, 4096).decode() or None
    finally:
        for end in (stay_write, stay_read, told_read, told_write):
            if end >= 0:
                os.close(end)
        for child in children:
            os.waitpid(child, 0)
