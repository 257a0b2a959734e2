"""Tensors that the tests of this folder send: dtypes, layouts, and comparison by bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

POISON = 0x5A
REDUCIBLE = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]
MOVABLE = [
    *REDUCIBLE,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
SHAPES = [(), (0,), (1,), (3, 5), (1000,), (7, 1, 33)]


def layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors with the values of `x`: plain, strided, transposed, at an odd address."""
    yield "plain", x.clone()
    if x.dim() == 0 or x.numel() == 0:
        return
    strided = torch.zeros((*x.shape, 2), dtype=x.dtype)[..., 1]
    yield "strided", copied(strided, x)
    if x.dim() > 1:
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
    offset = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    yield "offset", copied(offset, x)


def copied(to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    to.copy_(source)
    return to


def bits(x: torch.Tensor) -> torch.Tensor:
    flat = x.resolve_conj().resolve_neg().reshape(-1)
    if flat.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """As torch.cat, of any dtype."""
    shape = (sum(x.shape[0] for x in tensors), *tensors[0].shape[1:])
    raw = torch.cat([bits(x) for x in tensors])
    empty = torch.empty(shape, dtype=tensors[0].dtype)
    return raw.view(empty.dtype).view(shape) if len(raw) else empty


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return (
        got.dtype == wanted.dtype
        and got.shape == wanted.shape
        and torch.equal(bits(got), bits(wanted))
    )


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype)
    bits_of = x.view(-1).view(torch.uint8) if x.numel() else x
    if x.numel():
        bits_of.fill_(1 if dtype == torch.bool else POISON)
    return x


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bytes that a tensor of this dtype can hold, NaN payloads among them."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).nbytes
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (size,), generator=generator).to(torch.uint8)
    return raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def outputs_like(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """A poisoned tensor, strided if `layout` is not plain."""
    if layout == "plain" or not shape:
        return poisoned(shape, dtype)
    return poisoned((*shape, 3), dtype)[..., 1]
