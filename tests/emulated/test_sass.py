"""What nvcc made of the kernels, read from its machine code (tools/sass_report.py).

In CI some kernels of the library that was built (for one architecture) and one kernel compiled for
others; in the campaign all kernels on all architectures.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import sass_report  # noqa: E402
from sass_report import Row  # noqa: E402

pytestmark = pytest.mark.skipif(
    bool(sass_report.missing_tools()),
    reason=f"no {sass_report.missing_tools()} (pip install nvidia-cuda-cuobjdump ...)",
)
needs_nvcc = pytest.mark.skipif(sass_report.find_nvcc() is None, reason="no nvcc")
FEW = "_f32_(native|fp16)$|_bytes_"
KERNELS, PLATFORM = "cuda/kernels.cuh", "cuda/platform.cuh"
ENTRY = """
#include "cuda/kernels.cuh"
extern "C" __global__ void __launch_bounds__(dpcomm::kMaxThreads, 2)
    collective_f32_fp16(const __grid_constant__ dpcomm::KernelArgs args) {
  dpcomm::gpu::run_schedule<dpcomm::gpu::Fp16<dpcomm::gpu::Float32>, true>(args);
}
"""

# Holds 96 values at a time: they fit 128 registers, and not 64.
GREEDY = """
extern "C" __global__ void __launch_bounds__(512, BLOCKS) collective_greedy(volatile float* data) {
  float held[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) held[i] = data[threadIdx.x + 512 * i];
#pragma unroll
  for (int i = 0; i < 96; ++i) data[threadIdx.x + 512 * (95 - i)] = held[i];
}
"""


def compiled(folder: Path, architecture: int, text: str = ENTRY, **changed: str) -> list[Row]:
    """The row of one kernel; `changed` are texts of files below csrc."""
    (folder / "cuda").mkdir()
    for name, content in changed.items():
        (folder / name).write_text(content)
    source = folder / "one.cu"
    source.write_text(text)
    cubin = sass_report.compile_cubin(architecture, folder, source, (folder,))
    return sass_report.read_cubin(cubin)


def check(rows: list[Row]) -> None:
    assert rows
    assert [text for row in rows for text in sass_report.problems(row)] == []


@pytest.mark.skipif(not sass_report.LIBRARY.exists(), reason="built without a CUDA part")
def test_some_kernels_of_the_library_keep_the_limits() -> None:
    check(sass_report.read_files([sass_report.LIBRARY], FEW))


@needs_nvcc
@pytest.mark.parametrize("architecture", [75, 120])
def test_a_kernel_keeps_the_limits(architecture: int, tmp_path: Path) -> None:
    check(compiled(tmp_path, architecture))


@needs_nvcc
@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", sass_report.MULTIPROCESSORS)
def test_all_kernels_keep_the_limits(architecture: int, tmp_path: Path) -> None:
    rows = sass_report.read_files([sass_report.compile_cubin(architecture, tmp_path)])
    print(sass_report.table(rows))
    check(rows)
    entries = re.findall(r"(?m)^DPCOMM_KERNEL", (ROOT / "csrc/cuda/kernels.def").read_text())
    assert len({row.kernel for row in rows}) == 2 * len(entries) + 1


@dataclass(frozen=True)
class Plant:
    """A fault: a piece of a file below csrc replaced, and what the report has to say."""

    name: str
    finding: str
    file: str
    old: str
    new: str


PLANTS = [
    Plant("scalar_loads_in_the_main_loops", "not 16 bytes", PLATFORM,
          '"ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"',
          '"ld.global.u32 %0, [%4]; ld.global.u32 %1, [%4+4];"\n'
          '"ld.global.u32 %2, [%4+8]; ld.global.u32 %3, [%4+12];"'),
    Plant("fence_for_each_flag", "2 fences", KERNELS,
          "    store_flag_relaxed(block.credits[i].flag,",
          "    fence_system();\n    store_flag_relaxed(block.credits[i].flag,"),
    Plant("flag_of_the_device", "less than system scope", PLATFORM,
          "st.relaxed.sys.global.u64", "st.relaxed.gpu.global.u64"),
]  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_fault_is_found(plant: Plant, tmp_path: Path) -> None:
    text = (ROOT / "csrc" / plant.file).read_text()
    assert text.count(plant.old) == 1
    rows = compiled(tmp_path, 90, **{plant.file: text.replace(plant.old, plant.new)})
    found = [text for row in rows for text in sass_report.problems(row)]
    assert any(plant.finding in text for text in found), found


@needs_nvcc
@pytest.mark.parametrize(("blocks", "finding"), [(1, "registers, 64 allowed"), (2, "local memory")])
def test_too_much_for_the_registers_is_found(blocks: int, finding: str, tmp_path: Path) -> None:
    rows = compiled(tmp_path, 90, GREEDY.replace("BLOCKS", str(blocks)))
    found = [text for row in rows for text in sass_report.problems(row)]
    assert any(finding in text for text in found), found
