"""How a rank calls each library of the benchmark against peers: its own interface, in place.

Runs in the peers' environments, so beyond the peer it needs NumPy only. A class for each library:

    start(place)     joins the group; `place` says which rank of how many, and where files may lie
    allocate(bytes)  the memory that buffers are cut from: a flat float32 array
    bind(view)       what the library's call takes for a part of that memory
    prepare(arguments)  makes of many of those what `loop` takes
    loop(prepared)   one all-reduce for each of them; the clock sees this only, so it is written out
    finish()         leaves the group

Imports stand in `start`: every environment has only its own peer.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CALLS", "Calls", "Place"]


@dataclass
class Place:
    """A rank's place in its group. MPI ranks learn theirs from MPI."""

    rank: int
    size: int
    folder: Path  # of the group, empty at its start
    environment: Path  # what `make peers` made for this peer


class Calls:
    """What all of them share."""

    sums = True  # False: does not add anything, so that there is nothing to check
    version = ""

    def start(self, place: Place) -> None:
        self.place = place

    def allocate(self, size_bytes: int) -> np.ndarray:
        return aligned(size_bytes)

    def bind(self, view: np.ndarray) -> Any:
        return view

    def prepare(self, arguments: Sequence[Any]) -> Any:
        return arguments

    def loop(self, prepared: Any) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        pass


def aligned(size_bytes: int, alignment: int = 4096) -> np.ndarray:
    """Private memory of NumPy, which asks for huge pages where it is large; float32."""
    raw = np.empty(size_bytes + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size_bytes].view(np.float32)


class Mpi(Calls):
    """Any MPI, through mpi4py."""

    def start(self, place: Place) -> None:
        import mpi4py

        # The cheapest that MPI offers, unless the driver knows better.
        mpi4py.rc.thread_level = os.environ.get("PEERS_THREADS", "single")
        from mpi4py import MPI

        self.comm, self.in_place = MPI.COMM_WORLD, MPI.IN_PLACE
        self.place = place
        place.rank, place.size = self.comm.rank, self.comm.size
        self.version = MPI.Get_library_version().splitlines()[0].split(", package")[0].strip("\0 ")

    def loop(self, prepared: Sequence[np.ndarray]) -> None:
        all_reduce, in_place = self.comm.Allreduce, self.in_place
        for buffer in prepared:
            all_reduce(in_place, buffer)

    def finish(self) -> None:
        from mpi4py import MPI

        MPI.Finalize()


class OneCcl(Calls):
    """oneCCL's C++ interface. The loop is in C++ (peer_oneccl.cc), free of Python's cost."""

    def start(self, place: Place) -> None:
        self.place = place
        if "PMI_RANK" in os.environ:
            place.rank, place.size = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
        self.library = ctypes.CDLL(str(place.environment / "libpeer_oneccl.so"))
        self.library.peer_all_reduce.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        address = place.folder / "address"
        text = ctypes.create_string_buffer(256)
        if place.rank == 0:
            self._check(self.library.peer_address(text))
            address.with_suffix(".part").write_bytes(text.raw)
            address.with_suffix(".part").rename(address)
        else:
            while not address.exists():
                time.sleep(0.01)
            text.raw = address.read_bytes()
        self._check(self.library.peer_start(text, place.rank, place.size))
        transport = os.environ.get("CCL_ATL_TRANSPORT", "")
        version = ctypes.c_char_p.in_dll(self.library, "peer_version").value or b""
        self.version = f"oneCCL {version.decode()}, transport {transport}"

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError("oneCCL failed; its text is on standard error")

    def bind(self, view: np.ndarray) -> tuple[int, int]:
        return view.ctypes.data, view.size

    def prepare(self, arguments: Sequence[tuple[int, int]]) -> tuple[Any, Any, int]:
        pointers, counts = (np.array(column, np.uintp) for column in zip(*arguments, strict=True))
        return pointers, counts, len(arguments)

    def loop(self, prepared: tuple[Any, Any, int]) -> None:
        pointers, counts, calls = prepared
        self._check(self.library.peer_all_reduce(pointers.ctypes.data, counts.ctypes.data, calls))

    def finish(self) -> None:
        self.library.peer_finish()


class Torch(Calls):
    """`dist.all_reduce` on tensors over the same memory."""

    backend = "gloo"

    def start(self, place: Place) -> None:
        import torch
        import torch.distributed as dist

        self.place, self.torch, self.dist = place, torch, dist
        torch.set_num_threads(1)
        self.join()
        self.version = f"torch {torch.__version__}"

    def join(self) -> None:
        store = self.dist.FileStore(str(self.place.folder / "store"), self.place.size)
        self.dist.init_process_group(
            self.backend, store=store, rank=self.place.rank, world_size=self.place.size
        )

    def bind(self, view: np.ndarray) -> Any:
        return self.torch.from_numpy(view)

    def loop(self, prepared: Sequence[Any]) -> None:
        all_reduce = self.dist.all_reduce
        for tensor in prepared:
            all_reduce(tensor)

    def finish(self) -> None:
        self.dist.destroy_process_group()


class DpcommTorch(Torch):
    """The same on backend dpcomm."""

    backend = "dpcomm"

    def join(self) -> None:
        import dpcomm

        super().join()
        self.version = f"dpcomm {dpcomm.__version__}"


class NoOperation(Torch):
    """The same on a backend that does nothing (torch's "fake", in C++): Python and c10d alone."""

    sums = False
    backend = "fake"

    def join(self) -> None:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        self.dist.init_process_group(
            self.backend, store=FakeStore(), rank=self.place.rank, world_size=self.place.size
        )


class DeepSpeed(Torch):
    """DeepSpeed's operator on shared memory, called as deepspeed.comm calls it."""

    def join(self) -> None:
        # The operator's names in /dev/shm are made from these.
        os.environ["MASTER_ADDR"] = self.place.folder.name + self.place.folder.parent.name
        os.environ["LOCAL_SIZE"] = str(self.place.size)
        name = "deepspeed_shm_comm"
        spec = importlib.util.spec_from_file_location(name, self.place.environment / f"{name}.so")
        if spec is None or spec.loader is None:
            raise ImportError(f"no {name}.so in {self.place.environment}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.initialize(self.place.size, self.place.rank)

    def loop(self, prepared: Sequence[Any]) -> None:
        operators = self.torch.ops.deepspeed
        for tensor in prepared:
            operators.inference_all_reduce_(tensor)

    def finish(self) -> None:
        pass


class Dpcomm(Calls):
    """dpcomm.Communicator on NumPy arrays in private memory."""

    def start(self, place: Place) -> None:
        import dpcomm

        self.place, self.dpcomm = place, dpcomm
        meeting = f"file://{place.folder / 'meeting'}"
        self.comm = dpcomm.Communicator(place.rank, place.size, meeting)
        self.version = f"dpcomm {dpcomm.__version__}"

    def loop(self, prepared: Sequence[np.ndarray]) -> None:
        all_reduce = self.comm.all_reduce
        for array in prepared:
            all_reduce(array)

    def finish(self) -> None:
        self.comm.close()


class DpcommShared(Dpcomm):
    """The same on arrays that all ranks of the host can map."""

    def allocate(self, size_bytes: int) -> np.ndarray:
        return self.dpcomm.empty_array((size_bytes // 4,), np.float32)


class Copy(Calls):
    """Copies in the own memory, no communication: the bandwidth with all ranks at it."""

    sums = False

    def allocate(self, size_bytes: int) -> np.ndarray:
        self.source = aligned(size_bytes)
        self.source.fill(1)
        self.target = aligned(size_bytes)
        return self.target

    def bind(self, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = (view.ctypes.data - self.target.ctypes.data) // 4
        return view, self.source[start : start + view.size]

    def loop(self, prepared: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        copy = np.copyto
        for target, source in prepared:
            copy(target, source)


CALLS: dict[str, type[Calls]] = {
    "copy": Copy,
    "deepspeed": DeepSpeed,
    "dpcomm": Dpcomm,
    "dpcomm-shared": DpcommShared,
    "dpcomm-torch": DpcommTorch,
    "gloo": Torch,
    "mpi": Mpi,
    "no-operation": NoOperation,
    "oneccl": OneCcl,
}

if __name__ == "__main__":
    sys.exit("part of bench/peers.py")
