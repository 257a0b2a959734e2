"""What a schedule's header may be made of, so that a device compiler can read it as well."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "csrc" / "schedule"
# The registry and the rule of cuts are for the host.
HOST = {FOLDER / name for name in ("registry.h", "algorithms.h", "cut.h")}
HEADERS = sorted(set(FOLDER.glob("*.h")) - HOST)
GENERATORS = [h for h in HEADERS if h.name not in ("collective.h", "step.h", "topology.h")]


def code_of(header: Path) -> str:
    return re.sub(r"//[^\n]*", "", header.read_text())


@pytest.mark.parametrize("header", HEADERS, ids=lambda h: h.name)
def test_no_library_and_no_memory(header: Path) -> None:
    code = code_of(header)
    includes = re.findall(r'#include [<"]([^>"]+)[>"]', code)
    assert set(includes) <= {"cstdint", "cstddef", "base/macros.h"} | {
        name for name in includes if name.startswith("schedule/")
    }
    assert not re.search(
        r"\bstd::|\bnew\b|\bdelete\b|\bmalloc\b|\bvirtual\b|\bthrow\b|\bstatic_cast<void", code
    )


@pytest.mark.parametrize("header", [*GENERATORS, FOLDER / "topology.h"], ids=lambda h: h.name)
def test_every_function_is_marked_for_host_and_device(header: Path) -> None:
    assert unmarked_functions(code_of(header)) == []


def test_a_function_without_the_mark_is_seen() -> None:
    code = code_of(FOLDER / "ring.h")
    for mark in re.finditer(r"DPCOMM_HD ", code):
        assert unmarked_functions(code[: mark.start()] + code[mark.end() :])


def unmarked_functions(code: str) -> list[str]:
    """Heads of functions without DPCOMM_HD: definitions of a namespace or of a class's members."""
    heads = re.findall(
        r"(?m)^(?:  )?([A-Za-z_][^\n;=]*?\w\([^;{}]*?\)[^;{}()]*(?:: [^;]*?)?\{)", code
    )
    marks = ("DPCOMM_HD ", "if ", "for ", "while ", "do ", "switch ")
    return [head for head in heads if not head.startswith(marks)]


@pytest.mark.parametrize("header", GENERATORS, ids=lambda h: h.name)
def test_an_algorithm_file_opens_with_what_a_reader_needs(header: Path) -> None:
    opening = header.read_text().split("#pragma once")[0]
    assert all(line.startswith("//") for line in opening.splitlines() if line)
    for word in ("4 ranks", "Steps:", "Bytes sent per rank:", "Slots:", "Roundings", "Invariant:"):
        assert word in re.sub(r"\n// ", " ", opening), f"{header.name} does not say: {word}"
    assert re.search(r"Source:.*", opening), f"{header.name} cites no source"
