"""Sizes, sweeps and the bandwidth formulas."""

from __future__ import annotations

import pytest

from dpcomm.bench.units import algbw, busbw, format_size, parse_size, sweep


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("8", 8),
        ("8B", 8),
        ("32K", 32768),
        ("32k", 32768),
        ("1.5M", 1572864),
        ("25MiB", 26214400),
        ("2G", 2147483648),
        ("1T", 2**40),
        (" 4 M ", 4194304),
    ],
)
def test_sizes_are_read(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "K", "-1", "8X", "1e6", "0.3", "1.0001K", "8 8", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|bytes"):
        parse_size(text)


@pytest.mark.parametrize("size_bytes", [0, 1, 8, 1000, 1024, 26214400, 3 * 2**30, 2**40 + 1])
def test_a_formatted_size_reads_back(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


def test_sweeps() -> None:
    assert sweep(8, 128, 4) == [8, 32, 128]
    assert sweep(8, 127, 4) == [8, 32]
    assert sweep(8, 8, 1) == [8]
    assert sweep(1, 4, 1.1) == [1, 2, 3, 4]
    assert sweep(100, 300, 2, step_bytes=100) == [100, 200, 300]


@pytest.mark.parametrize(("low", "high", "factor"), [(16, 8, 2), (8, 16, 1), (0, 16, 2)])
def test_sweeps_without_an_end_are_refused(low: int, high: int, factor: float) -> None:
    with pytest.raises(ValueError, match=r"-[bef]"):
        sweep(low, high, factor)


def test_bandwidths_are_those_of_nccl_tests() -> None:
    assert algbw(2 * 10**9, 0.5) == pytest.approx(4)
    assert busbw("all_reduce", 10**9, 1, 2) == pytest.approx(1)
    assert busbw("all_reduce", 10**9, 1, 4) == pytest.approx(1.5)
    assert busbw("all_gather", 10**9, 1, 4) == pytest.approx(0.75)
    assert busbw("all_gather_list", 10**9, 1, 4) == pytest.approx(0.75)
    assert busbw("reduce_scatter", 10**9, 1, 8) == pytest.approx(0.875)
    assert busbw("broadcast", 10**9, 1, 8) == pytest.approx(1)
    assert busbw("all_reduce", 10**9, 1, 1) == 0
