"""Faults planted in the paths within a host: local_paths_test has to find them.

As test_plants.py, but all faults are in one copy of local_paths.cc and board.h, each behind a
question whether it is the one that the environment names, so that it is compiled once. The object
is linked before the library of test_native.py's build, which has the rest.
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
from test_plants import ATTEMPTS, ROOT, run

PATHS, BOARD = "cpu/local_paths.cc", "transport/board.h"
ARENA = "transport/shared_arena.cc"
RACE = "ThreadSanitizer"
WRONG = r"(group\.h|local_paths_test\.cc):\d+: "
VARIABLE = "PLANTED_FAULT"
ANYTHING = "anything_over"

QUESTION = f"""
#include <cstdlib>
#include <cstring>
namespace dpcomm {{
inline bool planted(const char* name) {{
  static const char* const fault = std::getenv("{VARIABLE}");
  return fault != nullptr && std::strcmp(fault, name) == 0;
}}
}}  // namespace dpcomm
"""


@dataclass(frozen=True)
class Plant:
    """One fault and who finds it."""

    name: str
    old: str
    """Occurs once; what is replaced is the part between « and »."""
    new: str
    """A statement where the old one is, else an expression."""
    test: str = ANYTHING
    finding: str = f"{RACE}|{WRONG}"
    file: str = PATHS

    def put_into(self, text: str) -> str:
        """The source with the fault, for the process that asks for it."""
        before, rest = self.old.split("«")
        old, after = rest.split("»")
        whole = before + old + after
        assert text.count(whole) == 1, f"{whole!r} is not (once) in {self.file}"
        question = f'dpcomm::planted("{self.name}")'
        if old.rstrip().endswith(";"):
            fault = f"if ({question}) {{ {self.new} }} else {{ {old} }}"
        else:
            fault = f"({question} ? ({self.new}) : ({old}))"
        return text.replace(whole, before + fault + after)


WAIT_REDUCED = "wait(rank, [&] { return board_->counted(rank, kReduced) >= counts_[kReduced]; });"

PLANTS = [
    Plant(
        "arrival_not_awaited",
        "«wait(rank, [&] { return board_->has_arrived(rank, epoch_); });»",
        ";",
    ),
    Plant(
        "tag_not_compared",
        "if («board_->arrival(rank, epoch_).tag == tag_») continue;",
        "true",
        "do_not_match",
        "no error",
    ),
    Plant("epoch_not_advanced", "«++epoch_;»", ";"),
    Plant(
        "slots_without_parity", "layout_.slots_offset() + («epoch & 1»)", "uint64_t{0}", file=BOARD
    ),
    Plant(
        "lines_without_parity",
        "of(rank) + («epoch & 1») * sizeof(Arrival)",
        "uint64_t{0}",
        file=BOARD,
    ),
    Plant("two_bounce_buffers", "chunk % «BoardLayout::kBounceBuffers»", "2", file=BOARD),
    Plant("chunk_of_a_bounce_not_awaited", f"      «{WAIT_REDUCED}»\n      const Part part", ";"),
    Plant(
        "part_of_a_pull_not_awaited",
        f"    «{WAIT_REDUCED}»\n    const Part other",
        ";",
        "left_while",
    ),
    Plant("no_meeting_after_a_push", "* 2;\n    «meet_at(kReduced);»", ";"),
    Plant(
        "no_meeting_after_a_pull",
        "  «meet_at(kLeft);»\n}\n\n/// The i-th chunk",
        ";",
        "left_while",
        WRONG,
    ),
    Plant(
        "no_meeting_after_blocks",
        "exchange_portions();\n  }\n  «meet_at(kLeft);»",
        ";",
        "left_while",
        WRONG,
    ),
    Plant(
        "part_one_line_further",
        "std::min(bytes, «each * rank»)",
        "each * rank + (rank > 0 ? unit : 0)",
    ),
    Plant("chunks_of_all_not_awaited", "if (in_heap) copy_in(0);\n    «meet_at(kIn);»", ";"),
    Plant("slots_of_all_not_awaited", "stage_input();\n      «meet_at(kIn);»", ";"),
    Plant("verdict_ignored", "heaps_[rank].shared = «all»;", "true", "cannot_map"),
    Plant("verdict_not_awaited", "std::byte{failed};\n  «meet_at(kIn);»", ";"),
    Plant(
        "verdict_in_a_chunk",
        "board_->bounce(rank, «chunks_ + 1»); };",
        "chunks_",
        "introduced",
        WRONG,
    ),
    Plant("failure_to_map_not_told", "«failed = true;»", ";", "cannot_map"),
    Plant(
        "reach_of_others_not_asked",
        "if («line(rank).reaches.load() == 0») return Reach::kNone;",
        "rank == rank_ && line(rank).reaches.load() == 0",
        "forbids",
        file=ARENA,
    ),
    Plant(
        "epoch_stored_relaxed",
        "«own.epoch.store(epoch);»",
        "own.epoch.store(epoch, std::memory_order_relaxed);",
        finding=RACE,
        file=BOARD,
    ),
    Plant(
        "epoch_read_relaxed",
        "return «arrival(rank, epoch).epoch.load()»",
        "arrival(rank, epoch).epoch.load(std::memory_order_relaxed)",
        finding=RACE,
        file=BOARD,
    ),
    Plant(
        "counter_stored_relaxed",
        "«value.store(value.load() + 1);»",
        "value.store(value.load() + 1, std::memory_order_relaxed);",
        finding=RACE,
        file=BOARD,
    ),
    Plant(
        "counter_read_relaxed",
        "return «counter_of(rank, counter).load()»",
        "counter_of(rank, counter).load(std::memory_order_relaxed)",
        finding=RACE,
        file=BOARD,
    ),
]


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """local_paths_test with every fault in it."""
    folder = tmp_path_factory.mktemp("planted")
    for file in (PATHS, BOARD, ARENA):
        text = (ROOT / "csrc" / file).read_text()
        for plant in PLANTS:
            if plant.file == file:
                text = plant.put_into(text)
        planted = folder / "include" / file
        planted.parent.mkdir(parents=True, exist_ok=True)
        planted.write_text(text.replace("#pragma once\n", f"#pragma once\n{QUESTION}", 1))
    library = build("thread").parent
    objects = library / "CMakeFiles" / "local_paths_test.dir" / "tests" / "native"
    test = folder / "test"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    command = [compiler, "-std=c++20", "-O1", "-g1", "-pthread", "-fsanitize=thread"]
    command += ["-ffp-contract=off", f"-I{folder / 'include'}", f"-I{ROOT / 'csrc'}"]
    command += [str(folder / "include" / file) for file in (PATHS, ARENA)]
    command += map(str, objects.glob("*.o"))
    command += [str(library / "libdpcomm_core.a"), "-ldl", "-o", str(test)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return test


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found(
    plant: Plant, executable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, plant.name)
    monkeypatch.setenv("DPCOMM_TIMEOUT", "5")  # some make ranks wait
    for _ in range(ATTEMPTS):
        done = run(executable, plant.test)
        if done.returncode != 0:
            break
    assert done.returncode != 0, f"not found:\n{done.stdout}"
    assert re.search(plant.finding, done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_without_a_fault_all_is_well(executable: Path) -> None:
    done = run(executable, ANYTHING)
    assert done.returncode == 0, done.stdout
