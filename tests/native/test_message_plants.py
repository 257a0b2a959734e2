"""Faults planted in the messages between two ranks: messages_test.cc has to find every one of them.

A plant is a copy of a source file with one exact piece of text replaced, compiled and linked in
front of the core that has the real one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_native import ROOT, build

PROTOCOL, WAIT, SIDE = "cpu/messenger.cc", "cpu/messenger_wait.cc", "comm/message_side.cc"
HANG = "hangs"
SANITIZER = "address,undefined"


@dataclass(frozen=True)
class Plant:
    """One fault, and the test that finds it."""

    name: str
    old: str
    new: str
    test: str
    """Part of the names of the tests that run."""
    finding: str
    """Pattern of what the output has to contain; or HANG."""
    file: str = PROTOCOL


PLANTS = [
    # The wrong message.
    Plant(
        "any_sender_will_do",
        "if ((*at)->peer != Transfer::kAnyPeer && (*at)->peer != peer) continue;",
        "",
        "any_rank",
        "messages_test.cc",
    ),
    Plant(
        "receives_in_reverse",
        "receives_[transfer->tag].push_back(std::move(transfer));",
        "receives_[transfer->tag].push_front(std::move(transfer));",
        "one_tag_keeps",
        "sizes differ|messages_test.cc",
    ),
    Plant(
        "messages_in_reverse",
        "announced_[packet.tag].push_back(std::move(message));",
        "announced_[packet.tag].push_front(std::move(message));",
        "one_tag_keeps",
        "sizes differ|messages_test.cc",
    ),
    Plant(
        "short_ones_overtake",
        "peers_[peer].announcements.push_back(std::move(transfer));",
        "auto& list = peers_[peer].announcements;\n"
        "    transfer->bytes < 1000 ? list.push_front(transfer) : list.push_back(transfer);",
        "one_tag_keeps",
        "sizes differ|messages_test.cc",
    ),
    Plant(
        "sizes_not_compared",
        "if (bytes != receive->bytes) {",
        "if (bytes > receive->bytes) {",
        "sizes_that_differ",
        "no error|messages_test.cc",
    ),
    Plant(
        "data_written_twice_to_one_place",
        "receive->data + receive->moved, payload, bytes);",
        "receive->data, payload, bytes);",
        "large_messages",
        "messages_test.cc",
    ),
    # Nothing comes.
    Plant(
        "no_clear_to_send",
        "from.answers.push_back({{id, 1}, nullptr});",
        "",
        "large_messages",
        HANG,
    ),
    Plant("credit_not_returned", "peers_[peer].in->release();", "", "tags_come", "damaged"),
    Plant(
        "answers_forgotten_where_the_channel_is_full",
        "    if (slot == nullptr) break;\n",
        "    if (slot == nullptr) {\n      peer.answers.clear();\n      break;\n    }\n",
        "stalls",
        HANG,
    ),
    Plant(
        "a_dropped_message_is_taken_for_kept",
        "message.bytes, message.kept,",
        "message.bytes, true,",
        "one_tag_keeps",
        "AddressSanitizer|runtime error",
    ),
    Plant(
        "everything_is_kept",
        "packet.comes_along && from.kept_bytes + bytes <= kKeptBytes;",
        "packet.comes_along;",
        "more_unexpected",
        "wire_bytes",
    ),
    # The ends of ranks.
    Plant(
        "complete_before_the_answer_has_left",
        "from.answers.push_back({{id, 0}, receive});",
        "from.answers.push_back({{id, 0}, nullptr});\n    finish(receive);",
        "stalls",
        "has closed its communicator",
    ),
    Plant(
        "a_rank_that_closed_is_not_looked_at_twice",
        "constexpr int kSure = 2;",
        "constexpr int kSure = 1;",
        "stalls",
        "has closed its communicator",
        WAIT,
    ),
    Plant(
        "closed_ranks_are_not_missed",
        "if (rank != Transfer::kAnyPeer && peers_[rank].gone >= kSure) {",
        "if (rank != Transfer::kAnyPeer && peers_[rank].gone < 0) {",
        "a_close_ends",
        HANG,
        WAIT,
    ),
    Plant(
        "no_look_for_a_failure",
        "if (transport_->failed()) {",
        "if (false) {",
        "an_abort_ends",
        HANG,
        SIDE,
    ),
    Plant(
        "no_time_limit",
        "if (now > transfer->deadline) throw_timeout(*transfer);",
        "",
        "nobody_sends",
        HANG,
        WAIT,
    ),
    Plant(
        "callbacks_keep_the_thread",
        "  if (completing_ != this) return;\n",
        "  return;\n",
        "callbacks_send",
        HANG,
        SIDE,
    ),
]


@pytest.fixture(scope="module")
def objects() -> Path:
    """The build's folder, with the core and the objects of the test."""
    return build(SANITIZER).parent


def compiled(folder: Path, source: Path, executable: Path) -> None:
    test = folder / "CMakeFiles" / "messages_test.dir" / "tests" / "native"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    command = [compiler, "-std=c++20", "-O1", "-g", "-pthread", f"-fsanitize={SANITIZER}"]
    command += [f"-I{ROOT / 'csrc'}", str(source), str(test / "messages_test.cc.o")]
    command += [str(test / "check.cc.o"), str(folder / "libdpcomm_core.a"), "-lrt", "-ldl"]
    command += ["-fno-sanitize-recover=undefined", "-o", str(executable)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.campaign
@pytest.mark.timeout(900)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_fault_is_found(plant: Plant, objects: Path, tmp_path: Path) -> None:
    original = (ROOT / "csrc" / plant.file).read_text()
    assert original.count(plant.old) == 1, f"{plant.old!r} is not (once) in {plant.file}"
    source = tmp_path / Path(plant.file).name
    source.write_text(original.replace(plant.old, plant.new))
    compiled(objects, source, tmp_path / "test")
    prefix = ["setarch", os.uname().machine, "-R"] if shutil.which("setarch") else []
    for _ in range(5):  # some need two things to happen at once
        try:
            done = subprocess.run(
                [*prefix, str(tmp_path / "test"), plant.test],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=15 if plant.finding == HANG else 100,
                check=False,
            )
        except subprocess.TimeoutExpired:
            assert plant.finding == HANG
            return
        if done.returncode != 0:
            break
    assert done.returncode != 0, f"not found:\n{done.stdout}"
    pattern = "not complete after" if plant.finding == HANG else plant.finding
    assert re.search(pattern, done.stdout), done.stdout
