"""Faults planted in the hand-over of messages: the native tests have to find every one of them.

A plant is a copy of a source file with one exact piece of text replaced, put before the real one on
the include path, so that the sources themselves need no hooks. The pieces must occur, so that a
plant cannot lose its meaning when the source changes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
RACE = "WARNING: ThreadSanitizer: data race"


@dataclass(frozen=True)
class Plant:
    """One fault and who finds it."""

    name: str
    file: str
    """Below csrc/."""
    old: str
    new: str
    test: str
    """Part of the names of the tests that run."""
    finding: str
    """Pattern of what the output has to contain."""
    sanitizer: str = "thread"
    source: str = "slot_ring_test"


RING = "transport/slot_ring.h"
PLANTS = [
    Plant(
        "turn_stored_relaxed",
        RING,
        "slot.turn.store(++sent_, std::memory_order_seq_cst)",
        "slot.turn.store(++sent_, std::memory_order_relaxed)",
        "messages_arrive",
        RACE,
    ),
    Plant(
        "turn_read_relaxed",
        RING,
        "slot.turn.load(std::memory_order_seq_cst) != received_ + 1",
        "slot.turn.load(std::memory_order_relaxed) != received_ + 1",
        "messages_arrive",
        RACE,
    ),
    Plant(
        "credit_given_relaxed",
        RING,
        "credits().released.store(++received_, std::memory_order_seq_cst)",
        "credits().released.store(++received_, std::memory_order_relaxed)",
        "messages_arrive",
        RACE,
    ),
    Plant(
        "credit_read_relaxed",
        RING,
        "credits().released.load(std::memory_order_seq_cst)",
        "credits().released.load(std::memory_order_relaxed)",
        "messages_arrive",
        RACE,
    ),
    Plant(
        "failure_ready_relaxed",
        RING,
        "state.store(kReady, std::memory_order_release)",
        "state.store(kReady, std::memory_order_relaxed)",
        "first_failure",
        RACE,
    ),
    Plant(
        "credit_off_by_one",
        RING,
        "if (sent_ - released_ >= slots()) return nullptr;",
        "if (sent_ - released_ > slots()) return nullptr;",
        "never_has_more_slots",
        r"sender.try_acquire\(\) == nullptr",
        sanitizer="",
    ),
    Plant(
        "released_before_it_is_read",
        RING,
        "message = Message{payload(slot), slot.bytes, slot.tag};",
        "message = Message{payload(slot), slot.bytes, slot.tag};\n"
        "    credits().released.store(received_ + 1, std::memory_order_seq_cst);",
        "messages_arrive",
        RACE,
    ),
    Plant(
        "turn_before_payload",
        RING,
        "    slot.bytes = bytes;\n    slot.tag = tag;\n",
        "    slot.turn.store(sent_ + 1, std::memory_order_seq_cst);\n"
        "    slot.bytes = bytes;\n    slot.tag = tag;\n",
        "messages_arrive",
        f"{RACE}|message.tag == ",
    ),
    Plant(
        "turn_compared_by_order",
        RING,
        "slot.turn.load(std::memory_order_seq_cst) != received_ + 1",
        "slot.turn.load(std::memory_order_seq_cst) < received_ + 1",
        "wraps_around",
        "slot_ring_test.cc",
        sanitizer="",
    ),
    Plant(
        "lost_ring_of_a_message",
        RING,
        "    receiver_.ring();\n",
        "",
        "a_ring_ends_a_sleep",
        "began < kNever",
        sanitizer="",
    ),
    Plant(
        "lost_ring_of_a_credit",
        RING,
        "    sender_.ring();\n",
        "",
        "a_ring_ends_a_sleep",
        "began < kNever",
        sanitizer="",
    ),
    Plant(
        "ring_without_a_new_ticket",
        RING,
        "    rung.fetch_add(1, std::memory_order_seq_cst);\n",
        "",
        "sees_the_other",
        r"looked\[round\] \|\| rung\[round\]",
        sanitizer="",
    ),
    Plant(
        "record_without_an_odd_version",
        RING,
        "version_.store(version + 1, std::memory_order_relaxed);",
        "",
        "read_whole",
        r"word == record.words\[0\]",
        sanitizer="",
    ),
    Plant(
        "no_second_look",
        "cpu/progress.cc",
        "  if (armed_) {  // looked once more after arm(), and there was still nothing\n",
        "  if (!armed_) ticket_ = transport_.arm(), armed_ = true;\n  if (armed_) {\n",
        "looks_once_more",
        r"waiter_test.cc:\d+: looked ",
        sanitizer="",
        source="waiter_test",
    ),
]


def compiled(plant: Plant, folder: Path) -> Path:
    """The test's executable with the fault in it."""
    original = (ROOT / "csrc" / plant.file).read_text()
    assert original.count(plant.old) == 1, f"{plant.old!r} is not (once) in {plant.file}"
    planted = folder / "include" / plant.file
    planted.parent.mkdir(parents=True)
    planted.write_text(original.replace(plant.old, plant.new))
    sources = [HERE / f"{plant.source}.cc", HERE / "check.cc"]
    if plant.source == "waiter_test":
        base = ROOT / "csrc" / "base"
        sources += [
            base / "env.cc",
            planted if planted.suffix == ".cc" else ROOT / "csrc/cpu/progress.cc",
        ]
    executable = folder / plant.source
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", f"-I{folder / 'include'}"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    if plant.sanitizer:
        flags.append(f"-fsanitize={plant.sanitizer}")
    command = [compiler, *flags, *map(str, sources), "-o", str(executable)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return executable


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found(plant: Plant, tmp_path: Path) -> None:
    executable = compiled(plant, tmp_path)
    prefix = ["setarch", os.uname().machine, "-R"] if shutil.which("setarch") else []
    done = subprocess.run(
        [*prefix, str(executable), plant.test],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode != 0, f"not found:\n{done.stdout}"
    assert re.search(plant.finding, done.stdout), done.stdout
