"""The pages on algorithms and invariants name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dpcomm import schedule

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "algorithms"
INVARIANTS = ROOT / "docs" / "invariants.md"
ALGORITHMS = schedule.algorithms()
IDS = [f"{a.collective}-{a.name}" for a in ALGORITHMS]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=IDS)
def test_an_algorithm_has_a_page_and_a_picture(algorithm: schedule.Algorithm) -> None:
    picture = f"pictures/{algorithm.collective}_{algorithm.name}_4.png"
    assert (PAGES / picture).stat().st_size > 5000
    assert any(picture in page.read_text() for page in PAGES.glob("*.md"))


def test_the_table_of_algorithms_is_that_of_the_code() -> None:
    """docs/algorithms/README.md lists slots and roundings for 8 ranks."""
    rows = {}
    for line in (PAGES / "README.md").read_text().splitlines():
        cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0] in schedule.COLLECTIVES:
            rows[cells[0], cells[1]] = (int(cells[4]), int(cells[5]))
    wanted = {(a.collective, a.name): (a.min_slots(8), a.roundings(8)) for a in ALGORITHMS}
    assert rows == wanted


@pytest.mark.parametrize(
    "page", [*PAGES.glob("*.md"), *INVARIANTS.parent.glob("*.md")], ids=lambda p: p.name
)
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_law_names_tests_that_exist() -> None:
    laws = re.split(r"(?m)^## (?=\d+\. )", INVARIANTS.read_text())[1:]
    assert [int(law.split(".")[0]) for law in laws] == list(range(1, 14))
    for law in laws:
        tests = re.findall(r"`((?:[\w/]+)\.(?:py|cc))(?:::(\w+))?`", law)
        named = [(file, test) for file, test in tests if not file.startswith("csrc/")]
        assert named, law
        for file, test in named:
            path = ROOT / "tests" / file
            assert path.exists(), file
            assert test in path.read_text(), f"{file}::{test}"


def test_faults_that_the_page_on_cuda_names_are_planted() -> None:
    page = (ROOT / "docs" / "cuda.md").read_text()
    seen_by = "".join(re.findall(r"(?s)\*Seen by:\*.*?\n\n", page))
    emulated = ROOT / "tests" / "emulated"
    planted = "".join((emulated / f).read_text() for f in ("plants.py", "test_models.py"))
    names = re.findall(r"`([a-z]+(?:_[a-z]+)+)`", seen_by)
    assert len(names) > 10
    assert [name for name in names if f'"{name}"' not in planted] == []
