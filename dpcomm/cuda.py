"""CUDA devices without torch: which there are, and groups of virtual ranks on one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpcomm import _core

__all__ = ["Geometry", "VirtualGroup", "Wait", "device_count"]

WAIT_KINDS = ("none", "arrival", "credit", "packet", "disagree")


def device_count() -> tuple[int, str]:
    """CUDA devices that are visible, and why there are none ("" where there are). Never raises."""
    return _core.device_count()


@dataclass(frozen=True)
class Geometry:
    """Staging of each rank (csrc/cuda/layout.h)."""

    ctas: int
    """The most that an operation may use."""
    slots: int
    slot_bytes: int
    packet_capacity: int
    """Packets from one source with one parity."""


@dataclass(frozen=True)
class Wait:
    """A wait of a kernel that lasts; numbers are those of csrc/cuda/kernel_args.h (WaitRecord)."""

    rank: int
    peer: int
    cta: int
    lane: int
    step: int
    kind: str
    seen: int
    wanted: int


class VirtualGroup:
    """All ranks of a group in this process, on one device: for tests and first runs.

    An operation is one cooperative launch over all ranks. Buffers are addresses of device memory;
    nothing is checked about them. Operations run in the order of the stream they are given; one
    thread at a time may call.

    Args:
        world_size: 1 to 16.
        device: Ordinal.
        max_ctas: Thread blocks of an operation for each rank and lane, at most; fewer where the
            device cannot hold those of all ranks at once.
        staging_bytes: The most that staging may take for each rank.

    Raises:
        UsageError: no CUDA device, or an argument makes no sense.
    """

    def __init__(
        self,
        world_size: int,
        *,
        device: int = 0,
        max_ctas: int = 4,
        staging_bytes: int = 64 << 20,
    ) -> None:
        self._core = _core.VirtualGroup(world_size, device, max_ctas, staging_bytes)
        self.world_size = world_size

    @property
    def geometry(self) -> Geometry:
        return Geometry(*self._core.geometry)

    @property
    def staging_bytes(self) -> int:
        """Of all ranks together."""
        return self._core.staging_bytes

    def ctas_of(self, nbytes: int) -> int:
        """CTAs that an operation over a tensor (or block) of so many bytes takes."""
        return self._core.ctas_of(nbytes)

    def launch(
        self,
        collective: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        count: int,
        *,
        algorithm: str,
        dtype: str = "float32",
        op: str = "sum",
        wire: str = "native",
        root: int = 0,
        factor: float = 1.0,
        stream: int = 0,
    ) -> None:
        """Enqueues one operation of all ranks on a stream (a handle; 0: the legacy default one).

        Args:
            collective: "all_reduce", "broadcast", "reduce", "all_gather" or "reduce_scatter".
            inputs, outputs: Addresses by rank; the same for an operation in place.
            count: Elements of the tensor; of a block for all_gather and reduce_scatter.
            algorithm: A name of ``dpcomm.schedule.algorithms(collective)``.

        Raises:
            UsageError: what the kernels do not support.
        """
        self._core.launch(
            collective,
            algorithm,
            dtype,
            op,
            wire,
            count,
            root,
            factor,
            list(inputs),
            list(outputs),
            stream,
        )

    def abort(self) -> None:
        """Ends all waits; nothing is published afterwards, and no operation runs any more."""
        self._core.abort()

    def waits(self) -> list[Wait]:
        """The waits that last at this moment."""
        return [Wait(*w[:5], WAIT_KINDS[w[5]], *w[6:]) for w in self._core.waits()]
