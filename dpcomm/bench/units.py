"""Sizes with suffixes, sweeps over sizes, and bandwidths as nccl-tests define them."""

from __future__ import annotations

import re

__all__ = ["BenchError", "algbw", "busbw", "format_size", "parse_size", "sweep"]

_SUFFIX = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class BenchError(Exception):
    """The benchmark cannot run as asked; the text says what to change."""


def parse_size(text: str) -> int:
    """Reads a number of bytes: `8`, `32K`, `1.5M`, `2GiB`. Suffixes are powers of 1024.

    Raises:
        ValueError: for anything else, and for a size that is not a whole number of bytes.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?", text.strip().upper())
    if match is None:
        raise ValueError(
            f"{text!r} is not a size: write bytes with an optional K, M or G, as in 32K"
        )
    size = float(match[1]) * _SUFFIX[match[2]]
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size_bytes: int) -> str:
    """The shortest exact name of a size: 8 -> "8 B", 26214400 -> "25 MiB"."""
    for suffix in ("T", "G", "M", "K"):
        if size_bytes and size_bytes % _SUFFIX[suffix] == 0:
            return f"{size_bytes // _SUFFIX[suffix]} {suffix}iB"
    return f"{size_bytes} B"


def sweep(min_bytes: int, max_bytes: int, factor: float, step_bytes: int = 0) -> list[int]:
    """The sizes from min to max, each `step_bytes` more than the last, or `factor` times it.

    Raises:
        ValueError: if the sweep would not end.
    """
    if max_bytes < min_bytes:
        raise ValueError(f"-e {max_bytes} is less than -b {min_bytes}")
    if step_bytes == 0 and (factor <= 1 or min_bytes == 0) and max_bytes > min_bytes:
        raise ValueError("the sizes would not grow: -f must be over 1 and -b over 0, or give -i")
    sizes = [min_bytes]
    while True:
        size = sizes[-1] + step_bytes if step_bytes else int(sizes[-1] * factor)
        if size <= sizes[-1]:
            size = sizes[-1] + 1
        if size > max_bytes:
            return sizes
        sizes.append(size)


def algbw(size_bytes: int, seconds: float) -> float:
    """Bytes of the collective's larger buffer over time, in GB/s (1e9)."""
    return size_bytes / seconds / 1e9 if seconds > 0 else 0.0


def busbw(collective: str, size_bytes: int, seconds: float, world_size: int) -> float:
    """algbw times the share of the data that has to cross a link, in GB/s.

    2(N-1)/N for all_reduce, (N-1)/N for all_gather and reduce_scatter, 1 for broadcast
    (nccl-tests, doc/PERFORMANCE.md): comparable with the speed of the hardware at any world size.
    """
    share = {"all_reduce": 2 * (world_size - 1) / world_size, "broadcast": 1.0}
    return algbw(size_bytes, seconds) * share.get(collective, (world_size - 1) / world_size)
