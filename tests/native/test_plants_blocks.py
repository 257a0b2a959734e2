"""Faults planted where unequal blocks are cut and placed: collectives_test has to find them.

As test_plants.py, but the fault is in the executor: its object is made anew and linked before the
library of test_native.py's build, which has the rest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_native import build
from test_plants import ROOT, run

EXECUTOR, BLOCKS = "cpu/executor.cc", "cpu/blocks.h"
WRONG = r"collectives_test.cc:\d+: |group.h:\d+: |what\(\):|ThreadSanitizer"


@dataclass(frozen=True)
class Plant:
    """One fault and who finds it."""

    name: str
    file: str
    old: str
    new: str
    test: str
    finding: str = WRONG


PLANTS = [
    Plant(
        "size_of_a_pair_not_told",
        EXECUTOR,
        "if (task_->collective == Collective::kAllToAll) slice.tag ^=",
        "if (false) slice.tag ^=",
        "a_pair_that_disagrees",
    ),
    Plant(
        "empty_blocks_not_told",
        EXECUTOR,
        "slice.elems == 0 && round > 0;",
        "slice.elems == 0;",
        "a_pair_that_disagrees",
    ),
    Plant(
        "places_of_a_pair_swapped",
        BLOCKS,
        "unequal() ? recv_first_[source]",
        "unequal() ? recv_first_[destination]",
        "blocks_of_unequal_size",
    ),
    Plant(
        "rounds_of_what_is_sent_alone",
        BLOCKS,
        "*std::max_element(recv_counts_->begin(), recv_counts_->end())",
        "size_t{0}",
        "blocks_of_unequal_size",
    ),
    Plant(
        "cut_as_the_largest",
        EXECUTOR,
        "const Partition own(block.count, ",
        "const Partition own(blocks_.largest(), ",
        "blocks_of_unequal_size",
    ),
    Plant(
        "blocks_of_a_scatter_one_further",
        BLOCKS,
        "return Block{count(chunk), first(chunk), 0};",
        "return Block{count(chunk), first((chunk + 1) % world_), 0};",
        "blocks_of_unequal_size",
    ),
]


def planted_test(plant: Plant, folder: Path) -> Path:
    """The executable of collectives_test with the fault in it."""
    original = (ROOT / "csrc" / plant.file).read_text()
    assert original.count(plant.old) == 1, f"{plant.old!r} is not (once) in {plant.file}"
    planted = folder / "include" / plant.file
    planted.parent.mkdir(parents=True)
    planted.write_text(original.replace(plant.old, plant.new))
    library = build("thread").parent
    objects = library / "CMakeFiles" / "collectives_test.dir" / "tests" / "native"
    executor = planted if plant.file == EXECUTOR else ROOT / "csrc" / EXECUTOR
    executable = folder / "test"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    command = [compiler, "-std=c++20", "-O1", "-pthread", "-fsanitize=thread"]
    command += ["-ffp-contract=off", f"-I{folder / 'include'}", f"-I{ROOT / 'csrc'}"]
    command += [str(executor), *map(str, objects.glob("*.o"))]
    command += [str(library / "libdpcomm_core.a"), "-ldl", "-o", str(executable)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return executable


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found(plant: Plant, tmp_path: Path) -> None:
    done = run(planted_test(plant, tmp_path), plant.test)
    assert done.returncode != 0, f"not found:\n{done.stdout}"
    assert re.search(plant.finding, done.stdout), done.stdout
