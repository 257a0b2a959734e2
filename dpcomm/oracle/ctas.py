"""What an operation on a device must give: every CTA's part is an operation of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpcomm.oracle import wire as codecs
from dpcomm.oracle.execute import Geometry, execute, partition

__all__ = ["execute_on_ctas", "parts"]

Array = npt.NDArray[Any]
_GRAIN_BYTES = 64


def parts(count: int, grain: int, ctas: int) -> list[slice]:
    """Which of `count` elements each CTA works on; all parts but the last are multiples of `grain`.

    Source: cta_part() in csrc/cuda/kernel_args.h.
    """
    each = -(-count // ctas)
    each = -(-each // grain) * grain
    return [slice(min(each * cta, count), min(each * (cta + 1), count)) for cta in range(ctas)]


def execute_on_ctas(
    collective: str,
    algorithm: str,
    inputs: Sequence[Array | None],
    *,
    count: int,
    geometry: Geometry,
    ctas: int,
    op: str = "sum",
    dtype: str = "float32",
    wire: str = "native",
    root: int = 0,
    factor: float = 1.0,
) -> list[Array | None]:
    """The outputs of all ranks. All parts are cut as the largest one.

    Args:
        inputs: by rank, as `execute` takes them.
        count: elements of the tensor; of each rank's block for all_gather and reduce_scatter.
        geometry: slots of the channels of a CTA.
        ctas: CTAs of each rank.

    Returns:
        By rank: a flat array of the tensor's dtype; None where a rank gets nothing.

    Raises:
        UsageError: as `partition` does.
    """
    world = len(inputs)
    grain = max(codecs.BLOCK_ELEMS[wire], _GRAIN_BYTES // codecs.tensor_dtype(dtype).itemsize)
    ranges = parts(count, grain, ctas)
    largest = partition(
        collective, algorithm, world, ranges[0].stop - ranges[0].start, dtype, wire, geometry
    )
    outputs: list[list[Array | None]] = []
    for part in ranges:
        if part.start == part.stop:
            continue
        own = [None if x is None else _part_of(collective, world, x, part) for x in inputs]
        cut = dataclasses.replace(largest, count=part.stop - part.start)
        outputs.append(
            execute(
                collective,
                algorithm,
                own,
                op=op,
                dtype=dtype,
                wire=wire,
                root=root,
                factor=factor,
                cut=cut,
            )
        )
    empty = np.zeros(0, codecs.tensor_dtype(dtype))
    return [_joined(collective, world, [out[r] for out in outputs], empty) for r in range(world)]


def _part_of(collective: str, world: int, tensor: Array, part: slice) -> Array:
    if collective != "reduce_scatter":
        return tensor[part]
    return np.ascontiguousarray(tensor.reshape(world, -1)[:, part]).reshape(-1)


def _joined(
    collective: str, world: int, outputs: Sequence[Array | None], empty: Array
) -> Array | None:
    held = [output for output in outputs if output is not None]
    if len(held) < len(outputs):
        return None
    if not held:
        return empty
    if collective == "all_gather":
        return np.concatenate([output.reshape(world, -1) for output in held], axis=1).reshape(-1)
    return np.concatenate(held)
