"""Faults planted in the hand-over of messages: the native tests have to find every one of them.

A plant is a copy of a source file with one exact piece of text replaced, put before the real one on
the include path, so that the sources themselves need no hooks. The piece must occur once, so that a
plant cannot lose its meaning when the source changes.

Three finders: ThreadSanitizer on real threads; the tests' own checks; and model/, which runs the
header over atomics whose stores other threads see late and out of order (what hardware does too
rarely for a test), with a futex that knows when nobody is left to wake a sleeper.
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
RING = "transport/slot_ring.h"
PROGRESS = "cpu/progress.cc"

RACE = "WARNING: ThreadSanitizer: data race"
ASLEEP_FOR_EVER = "all_came_to_an_end"
TORN = re.escape("record.words[0] == record.words[1]")


@dataclass(frozen=True)
class Plant:
    """One fault and who finds it."""

    name: str
    old: str
    new: str
    finder: str
    """"thread" (ThreadSanitizer), "checks" or "model"."""
    test: str
    """Part of the names of the tests that run."""
    finding: str
    """Pattern of what the output has to contain."""
    file: str = RING
    """Below csrc/."""


# A race needs two threads that run at the same time, which a busy machine may not grant at once.
ATTEMPTS = 8

SEQ_CST, RELAXED, RELEASE = (
    f"std::memory_order_{order}" for order in ("seq_cst", "relaxed", "release")
)


def weaker(
    name: str, access: str, order: str, weak: str, finder: str, test: str, finding: str
) -> Plant:
    """The same access with a weaker memory order."""
    old, new = f"{access}{order})", f"{access}{weak})"
    return Plant(name, old, new, finder, test, finding)


PLANTS = [
    # The bytes of a slot are not handed over: races.
    weaker(
        "turn_stored_relaxed", "turn.store(++sent_, ", SEQ_CST, RELAXED, "thread", "arrive", RACE
    ),
    weaker("turn_read_relaxed", "slot.turn.load(", SEQ_CST, RELAXED, "thread", "arrive", RACE),
    weaker(
        "credit_stored_relaxed",
        "released.store(++received_, ",
        SEQ_CST,
        RELAXED,
        "thread",
        "arrive",
        RACE,
    ),
    weaker("credit_read_relaxed", "released.load(", SEQ_CST, RELAXED, "thread", "arrive", RACE),
    weaker(
        "failure_stored_relaxed",
        "first.compare_exchange_strong(none, own, ",
        RELEASE,
        RELAXED,
        "thread",
        "failure",
        RACE,
    ),
    Plant(
        "credit_at_the_peek",
        "message = Message{payload(slot), bytes_in(slot), slot.tag};",
        "message = Message{payload(slot), bytes_in(slot), slot.tag};\n"
        "    credits().released.store(received_ + 1, std::memory_order_seq_cst);",
        "thread",
        "arrive",
        RACE,
    ),
    Plant(
        "turn_before_the_header",
        "    slot.bytes = bytes;\n    slot.tag = tag;\n",
        "    slot.turn.store(sent_ + 1, std::memory_order_seq_cst);\n"
        "    slot.bytes = bytes;\n    slot.tag = tag;\n",
        "thread",
        "arrive",
        f"{RACE}|slot_ring_test.cc:\\d+:",
    ),
    # Miscounted.
    Plant(
        "credit_off_by_one",
        "if (sent_ - released_ >= slots()) return nullptr;",
        "if (sent_ - released_ > slots()) return nullptr;",
        "checks",
        "never_has_more_slots",
        re.escape("sender.try_acquire() == nullptr"),
    ),
    Plant(
        "turn_compared_by_order",
        "slot.turn.load(std::memory_order_seq_cst) != received_ + 1",
        "slot.turn.load(std::memory_order_seq_cst) < received_ + 1",
        "checks",
        "wraps_around",
        "slot_ring_test.cc",
    ),
    # Wake-ups are lost.
    weaker(
        "asleep_stored_with_release",
        "asleep.store(1, ",
        SEQ_CST,
        RELEASE,
        "model",
        "for_ever",
        ASLEEP_FOR_EVER,
    ),
    weaker(
        "turn_stored_with_release",
        "turn.store(++sent_, ",
        SEQ_CST,
        RELEASE,
        "model",
        "for_ever",
        ASLEEP_FOR_EVER,
    ),
    weaker(
        "credit_stored_with_release",
        "released.store(++received_, ",
        SEQ_CST,
        RELEASE,
        "model",
        "for_ever",
        ASLEEP_FOR_EVER,
    ),
    Plant(
        "no_ring_for_a_message", "    receiver_.ring();\n", "", "model", "for_ever", ASLEEP_FOR_EVER
    ),
    Plant(
        "no_ring_for_a_credit", "    sender_.ring();\n", "", "model", "for_ever", ASLEEP_FOR_EVER
    ),
    Plant(
        "ring_without_a_new_ticket",
        "    rung.fetch_add(1, std::memory_order_seq_cst);\n",
        "",
        "model",
        "for_ever",
        ASLEEP_FOR_EVER,
    ),
    Plant(
        "sleep_on_a_new_ticket",
        "FUTEX_WAIT, ticket,",
        "FUTEX_WAIT, rung.load(),",
        "model",
        "for_ever",
        ASLEEP_FOR_EVER,
    ),
    Plant(
        "sleep_without_a_second_look",
        "  if (armed_) {  // looked once more after arm(), and there was still nothing\n",
        "  if (!armed_) ticket_ = transport_.arm(port_), armed_ = true;\n  if (armed_) {\n",
        "checks",
        "looks_once_more",
        r"waiter_test.cc:\d+: looked ",
        file=PROGRESS,
    ),
    # Records are torn.
    Plant(
        "no_odd_version",
        "version_.store(version + 1, std::memory_order_relaxed);",
        "",
        "model",
        "whole",
        TORN,
    ),
    Plant(
        "versions_not_compared",
        "if (before == after && before % 2 == 0)",
        "if (before % 2 == 0)",
        "model",
        "whole",
        TORN,
    ),
    weaker(
        "words_stored_relaxed",
        "words_[i].store(words[i], ",
        RELEASE,
        RELAXED,
        "model",
        "whole",
        TORN,
    ),
    weaker(
        "version_stored_relaxed",
        "version_.store(version + 2, ",
        RELEASE,
        RELAXED,
        "model",
        "whole",
        TORN,
    ),
]


def over_the_model(header: str) -> str:
    """The header with model/model.h in place of std::atomic, futex and usleep."""
    for old, new in {
        "std::atomic<": "model::atomic<",
        "syscall(SYS_futex, ": "model::futex(",
        "usleep(": "model::usleep(",
        "#pragma once": '#pragma once\n#include "model.h"',
    }.items():
        assert old in header
        header = header.replace(old, new)
    return header


def compiled(finder: str, file: str, text: str, folder: Path) -> Path:
    """The test's executable, with `text` in place of csrc/`file`."""
    planted = folder / "include" / file
    planted.parent.mkdir(parents=True)
    planted.write_text(over_the_model(text) if finder == "model" else text)
    sources = [HERE / "check.cc", ROOT / "csrc" / "base" / "text.cc"]
    if finder == "model":
        sources.append(HERE / "model" / "slot_ring_model.cc")
    elif file == PROGRESS:
        sources += [HERE / "waiter_test.cc", planted, ROOT / "csrc" / "base" / "env.cc"]
    else:
        sources.append(HERE / "slot_ring_test.cc")
    executable = folder / "test"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    command = [compiler, "-std=c++20", "-O1", "-pthread", f"-I{folder / 'include'}"]
    command += [f"-I{ROOT / 'csrc'}", f"-I{HERE}", f"-I{HERE / 'model'}"]
    if finder == "thread":
        command.append("-fsanitize=thread")
    command += [*map(str, sources), "-o", str(executable)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return executable


def run(executable: Path, test: str) -> subprocess.CompletedProcess[str]:
    # gcc 12's thread sanitizer does not know the address layouts that newer kernels choose.
    prefix = ["setarch", os.uname().machine, "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*prefix, str(executable), test],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found(plant: Plant, tmp_path: Path) -> None:
    original = (ROOT / "csrc" / plant.file).read_text()
    assert original.count(plant.old) == 1, f"{plant.old!r} is not (once) in {plant.file}"
    executable = compiled(
        plant.finder, plant.file, original.replace(plant.old, plant.new), tmp_path
    )
    for _ in range(ATTEMPTS):
        done = run(executable, plant.test)
        if done.returncode != 0:
            break
    assert done.returncode != 0, f"not found:\n{done.stdout}"
    assert re.search(plant.finding, done.stdout), done.stdout


def test_the_header_itself_holds_over_the_model(tmp_path: Path) -> None:
    done = run(compiled("model", RING, (ROOT / "csrc" / RING).read_text(), tmp_path), "")
    assert done.returncode == 0, done.stdout
