"""The fake CUDA runtime, asked by a program that nvcc built like any other (runtime_test.cu)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_runtime
import pytest

PROGRAMS = fake_runtime.FAKE / "programs"
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def program() -> Path:
    why = fake_runtime.missing()
    if why:
        pytest.skip(why)
    return fake_runtime.cuda_program("runtime_test", PROGRAMS / "runtime_test.cu", [PROGRAMS])


@pytest.fixture(scope="module")
def kernels(program: Path) -> Path:
    return fake_runtime.kernel_library(
        "libruntime_test_kernels.so", [PROGRAMS / "kernels_source.cc"], [PROGRAMS]
    )


@pytest.fixture(scope="module")
def translated(program: Path) -> Path:
    """The same kernels by way of PTX."""
    return fake_runtime.translated_kernels(
        "libruntime_test_ptx.so", PROGRAMS / "runtime_test.cu", [PROGRAMS]
    )


def clean_environment(**variables: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FAKE_CUDA_", "CUDA_VISIBLE"))
    }
    return kept | variables


def run(
    program: Path, part: str, kernels: Path, report: Path | None = None, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """Runs a part of the program; returns it and the reports of its processes."""
    environment = clean_environment(FAKE_CUDA_KERNELS=str(kernels), **variables)
    if report is not None:
        environment["FAKE_CUDA_REPORT"] = str(report)
    process = subprocess.Popen(
        [program, part],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    done = subprocess.CompletedProcess(process.args, process.returncode, out, err)
    print(done.stdout, done.stderr, file=sys.stderr)
    lines = report.read_text().splitlines() if report is not None and report.exists() else []
    return done, [json.loads(line) for line in lines]


def passes(program: Path, part: str, kernels: Path, **variables: str) -> str:
    done, _ = run(program, part, kernels, **variables)
    assert done.returncode == 0, f"{part} ended with {done.returncode}: {done.stdout}{done.stderr}"
    assert done.stdout.endswith("ok\n")
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "part", ["kernels", "streams", "events", "capture", "capture_errors", "errors", "peers", "ipc"]
)
@pytest.mark.parametrize("seed", ["0", "7"])
def test_part(program: Path, kernels: Path, part: str, seed: str) -> None:
    passes(program, part, kernels, FAKE_CUDA_SEED=seed)


@pytest.mark.parametrize("part", ["kernels", "capture", "peers", "ipc"])
def test_part_by_way_of_ptx(program: Path, translated: Path, part: str) -> None:
    """What nvcc made runs whole: host code and device code."""
    passes(program, part, translated)


def test_fork_leaves_the_child_without_the_runtime(program: Path, kernels: Path) -> None:
    passes(program, "forked", kernels)


def test_memory(program: Path, kernels: Path, tmp_path: Path) -> None:
    done, (report,) = run(program, "memory", kernels, tmp_path / "report")
    assert done.returncode == 0, done.stdout
    misuse = report["misuse"]
    assert len(misuse) == 3, misuse
    assert "cudaFree" in misuse[0]
    assert "cudaFree" in misuse[1]
    assert "behind the end of an allocation of 10 bytes" in misuse[2]
    # What the program did not free: the gate, and a stream.
    assert [entry["kind"] for entry in report["memory"]] == ["host"]
    assert report["streams"] == 1
    assert report["events"] == 0
    assert report["calls"]["cudaMalloc"] == 4


def test_ipc_leaves_nothing(program: Path, kernels: Path, tmp_path: Path) -> None:
    done, reports = run(program, "ipc", kernels, tmp_path / "report")
    assert done.returncode == 0, done.stdout
    assert len(reports) == 2
    for report in reports:
        assert [entry["kind"] for entry in report["memory"] if entry["kind"] != "host"] == []
        assert report["streams"] == report["events"] == 0
        assert len(report["misuse"]) == 1  # the handle that was closed too often


def test_blocks_that_cannot_all_be_resident(program: Path, kernels: Path) -> None:
    text = passes(program, "cooperative", kernels, FAKE_CUDA_SMS="3", FAKE_CUDA_DEADLINE="3")
    assert "1 blocks have not started" in text


def test_access_outside_of_memory(program: Path, kernels: Path) -> None:
    text = passes(program, "fault", kernels)
    assert "thread 4: load of 4 bytes outside of all memory" in text
    assert "behind memory of device 0 (16 bytes)" in text


def test_end_with_work_queued(program: Path, kernels: Path) -> None:
    start = time.monotonic()
    passes(program, "leave", kernels)
    assert time.monotonic() - start < LIMIT_S / 2


def test_devices(program: Path, kernels: Path) -> None:
    assert "4 devices, 8 SMs, first on bus 1" in passes(program, "devices", kernels)
    text = passes(program, "devices", kernels, FAKE_CUDA_DEVICES="2", FAKE_CUDA_SMS="5")
    assert "2 devices, 5 SMs" in text
    text = passes(program, "devices", kernels, CUDA_VISIBLE_DEVICES="2,1")
    assert "2 devices, 8 SMs, first on bus 3" in text


@pytest.mark.parametrize(
    ("variable", "value", "error"),
    [
        ("FAKE_CUDA_DEVICES", "0", "cudaErrorNoDevice"),
        ("CUDA_VISIBLE_DEVICES", "", "cudaErrorNoDevice"),
        ("FAKE_CUDA_DRIVER_VERSION", "12080", "cudaErrorInsufficientDriver"),
        ("FAKE_CUDA_FAIL", "cudaGetDeviceCount:1:999", "cudaErrorUnknown"),
    ],
)
def test_no_device(program: Path, kernels: Path, variable: str, value: str, error: str) -> None:
    done, _ = run(program, "devices", kernels, **{variable: value})
    assert done.returncode == 1
    assert f"gives {error}" in done.stdout


def test_missing_kernels_are_an_error(program: Path, kernels: Path) -> None:
    done, _ = run(program, "kernels", Path(""))
    assert done.returncode == 1
    assert "no emulated kernel scale_add" in done.stderr


def test_signatures_are_those_of_the_headers() -> None:
    """What the library exports is what the headers declare, or what nvcc's objects call."""
    why = fake_runtime.missing(nvcc=False)
    if why:
        pytest.skip(why)
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", str(fake_runtime.fake_cudart())],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    ).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    api = {name for name in names if name.startswith(("cuda", "__cuda"))}
    assert {"cudaMalloc", "cudaLaunchKernelExC", "__cudaRegisterFunction"} <= api
    folder = fake_runtime.home() / "include"
    text = "".join(
        (folder / name).read_text(errors="replace")
        for name in ["cuda_runtime_api.h", "crt/host_runtime.h", "crt/device_functions.h"]
    )
    assert sorted(name for name in api if f" {name}(" not in text) == []
