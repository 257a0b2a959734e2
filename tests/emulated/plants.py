"""Faults planted in the device kernels, and who finds them; prints the table when it is run.

A plant is a copy of a source file with one exact piece of text replaced, put before the real one on
the include path; the PTX path compiles the same copies. The piece must occur once, so that a plant
cannot lose its meaning when the source changes.

    python tests/emulated/plants.py [--path source|ptx|both] [NAME ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import variants
from emulate import Case, Emulation, Operation, Result, problems
from ptx import kernels, lint
from variants import OUTPUT, ROOT, Variant, digest

KERNELS = "cuda/kernels.cuh"
PACKETS = "cuda/packets.cuh"
PRIMITIVES = "cuda/primitives.cuh"
PLATFORM = "cuda/platform.cuh"
LIST = "cuda/kernels.def"

#: What can find a fault.
FINDERS = ("bits", "deadlock", "abort", "threads", "lint")


@dataclass(frozen=True)
class Plant:
    """One fault: exact pieces of text in files below csrc, and the finder that has to find it."""

    name: str
    changes: tuple[tuple[str, str, str], ...]
    """(file, old, new); old occurs once."""
    finder: str
    kernels: tuple[str, ...] = ("collective_f32_fp16",)
    """Those that are compiled and run."""


PLANTS = [
    Plant("fence_left_out", ((KERNELS, "  fence_system();\n", ""),), "threads"),
    Plant(
        "acquire_left_out",
        ((KERNELS, "load_flag_acquire(flag)", "load_flag_relaxed(flag)"),),
        "threads",
    ),
    Plant(
        "barrier_left_out_before_publishing",
        ((KERNELS, "    block_sync();  // all bytes are moved\n", ""),),
        "bits",
    ),
    Plant(
        "barrier_left_out_before_moving",
        ((KERNELS, "    block_sync();  // the command is there\n", ""),),
        "bits",
    ),
    Plant(
        "credit_off_by_one",
        (
            (
                KERNELS,
                "return wanted - value < static_cast<uint64_t>(rank.slots);",
                "return wanted - value <= static_cast<uint64_t>(rank.slots);",
            ),
        ),
        "bits",
    ),
    Plant(
        "lost_credit",
        (
            (
                KERNELS,
                "store_flag_relaxed(block.credits[i].flag, block.credits[i].value);",
                "if (block.credits[i].value % 5 != 3)\n"
                "      store_flag_relaxed(block.credits[i].flag, block.credits[i].value);\n"
                "    else\n"
                "      store_flag_relaxed(block.credits[i].flag, block.credits[i].value - 1);",
            ),
        ),
        "deadlock",
    ),
    Plant(
        "single_staging_buffer",
        ((PACKETS, "uint64_t{block_.epoch % 2}", "uint64_t{0}"),),
        "deadlock",
        ("packets_f32_fp16",),
    ),
    Plant(
        "owner_keeps_the_unrounded_value",
        (
            (
                PRIMITIVES,
                "if (Wire::kLossy && command.has(kCopy)) decode(encoded, byte, sum);",
                "",
            ),
        ),
        "bits",
    ),
    Plant(
        "flag_scope_of_the_device",
        (
            (
                PLATFORM,
                '"st.relaxed.sys.global.u64 [%0], %1;"',
                '"st.relaxed.gpu.global.u64 [%0], %1;"',
            ),
        ),
        "lint",
    ),
    Plant(
        "tail_one_too_long",
        ((PRIMITIVES, "return elems - at < most ? elems - at : most;", "return most;"),),
        "bits",
    ),
    Plant(
        "tail_left_out",
        (
            (
                PRIMITIVES,
                "return elems - at < most ? elems - at : most;",
                "return elems - at < most ? 0 : most;",
            ),
        ),
        "bits",
    ),
    Plant(
        "published_after_an_abort",
        ((KERNELS, "  if (leave) block.over = block.aborted = true;\n", ""),),
        "abort",
    ),
]


def planted(plant: Plant) -> Path:
    """A folder to put before csrc among the includes: the fault, and few kernels."""
    texts = {LIST: (kernels.list_of(plant.kernels) / LIST).read_text()}
    for file, old, new in plant.changes:
        text = texts.get(file, (ROOT / "csrc" / file).read_text())
        if text.count(old) != 1:
            raise ValueError(f"{plant.name}: {old!r} is not (once) in {file}")
        texts[file] = text.replace(old, new)
    folder = OUTPUT / "planted" / f"{plant.name}-{digest(*texts, *texts.values())}"
    for file, text in texts.items():
        path = folder / file
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return folder


# --- finders --------------------------------------------------------------------------------------
def operations(kernel: str) -> tuple[Operation, ...]:
    """Sizes that vary, and a tail; schedules one after the other."""
    by, _, wire = kernel.split("_")
    if by == "packets":
        return tuple(
            Operation("all_reduce", "one_shot", wire=wire, count=count, ctas=1 + count % 2)
            for count in (1001, 64, 900, 1001)
        )
    return (
        Operation("all_reduce", "ring", wire=wire, count=5003, ctas=2),
        Operation("all_reduce", "two_shot", wire=wire, count=3001),
        # The first rank of the chain waits for nothing but credits.
        Operation("reduce", "ring", wire=wire, count=6003),
        Operation("all_reduce", "ring", wire=wire, count=1700, ctas=2, input_offset=1),
    )


def cases(kernel: str, threads: int, seeds: range, worlds: Sequence[int] = (2, 3, 5)) -> list[Case]:
    """On the fewest slots."""
    return [
        Case(
            world=worlds[seed % len(worlds)],
            operations=operations(kernel),
            ctas=2,
            threads=threads,
            slots=2,
            slot_bytes=1040,
            packets=2000 if kernel.startswith("packets") else 0,
            virtual_ranks=seed % 3 == 0,
            seed=seed,
        )
        for seed in seeds
    ]


def aborted(case: Case) -> Case:
    """Sees the abort while it waits, first on one rank."""
    at = 3 + 5 * case.seed
    extra = (("abort_at", at), ("abort_all_at", at + 60), ("look_every", 1))
    return dataclasses.replace(case, virtual_ranks=False, extra=extra)


def scope_problems(text: str) -> list[str]:
    """Strong accesses and fences, in PTX or in inline PTX, that are not of the system's scope."""
    found = re.findall(r"\b(?:ld|st|atom|red|fence)\.[a-z0-9_.]*", text)
    strong = re.compile(r"\.(relaxed|acquire|release|acq_rel|sc)\b")
    return [access for access in found if strong.search(access) and ".sys" not in access]


def finding(case: Case, result: Result) -> tuple[str, str] | None:
    """(finder, what it says), or None where nothing is wrong."""
    if result.status == "race":
        return "threads", "\n".join(result.text.splitlines()[:3])
    if result.status == "stuck":
        return "deadlock", result.text
    if "published after it saw the abort word" in result.text:
        return "abort", result.text
    if result.status != "ok":
        return "bits", f"{result.status}: {result.text}"
    if any(key == "abort_at" for key, _ in case.extra):
        return None
    found = problems(case, result)
    return ("bits", found[0]) if found else None


def ran(emulation: Emulation, ran_cases: Sequence[Case]) -> dict[str, str]:
    """finder -> what it says first."""
    found: dict[str, str] = {}
    for case, result in zip(ran_cases, emulation.run(ran_cases), strict=False):
        said = finding(case, result)
        if said:
            found.setdefault(*said)
    return found


class SourcePath:
    """g++ on the headers."""

    name = "source"

    def emulation(self, plant: Plant, thread_sanitizer: bool) -> Emulation:
        variant = Variant(variants.F32_KERNELS, thread_sanitizer, (planted(plant),))
        return Emulation(variants.build(variant), thread_sanitizer)

    def lint(self, plant: Plant) -> list[str]:
        """What reading finds: here only the scopes in the inline PTX."""
        path = planted(plant) / PLATFORM
        return scope_problems((path if path.exists() else ROOT / "csrc" / PLATFORM).read_text())


class PtxPath:
    """nvcc's PTX, as C++."""

    name = "ptx"
    arch = "90"

    def emulation(self, plant: Plant, thread_sanitizer: bool) -> Emulation:
        built = kernels.ptx_path(self.arch, plant.kernels, thread_sanitizer, (planted(plant),))
        return Emulation(built, thread_sanitizer)

    def lint(self, plant: Plant) -> list[str]:
        """What ptx/lint.py finds."""
        module = kernels.module_of(self.arch, plant.kernels, (planted(plant),))
        return [str(finding) for finding in lint.lint(module)]


AnyPath = SourcePath | PtxPath


def found_by(path: AnyPath, plant: Plant, finders: Sequence[str]) -> dict[str, str]:
    """What is said of a plant when these finders look: finder -> text. Others may have something to
    say as well. Empty: not found."""
    found: dict[str, str] = {}
    if "lint" in finders and (said := path.lint(plant)):
        found["lint"] = "\n".join(said)
    if {"bits", "deadlock", "abort"} & set(finders):
        plain = path.emulation(plant, False)
        for kernel in plant.kernels:
            found |= ran(plain, cases(kernel, 64, range(1, 11)))
            if "abort" in finders:
                waits = ran(plain, [aborted(case) for case in cases(kernel, 64, range(1, 7))])
                found |= {key: text for key, text in waits.items() if key == "abort"}
    if "threads" in finders:
        checked = path.emulation(plant, True)
        for kernel in plant.kernels:
            # It keeps no access for ever, so that it may miss a race; the first one ends the run.
            seeds = range(8) if plant.changes else range(2)
            found |= ran(checked, cases(kernel, 32, seeds, worlds=(3, 2)))
    return found


#: Nothing wrong.
SOUND = Plant("sound", (), "", ("collective_f32_fp16", "packets_f32_fp16"))


def main() -> int:
    parser = argparse.ArgumentParser(description="faults planted in the device kernels")
    parser.add_argument("names", nargs="*", help="only these plants")
    parser.add_argument("--path", choices=("source", "ptx", "both"), default="both")
    given = parser.parse_args()
    paths = [path for path in (SourcePath(), PtxPath()) if given.path in (path.name, "both")]
    chosen = [plant for plant in PLANTS if not given.names or plant.name in given.names]
    width = max(len(plant.name) for plant in PLANTS)
    print(f"{'fault':{width}}  {'path':8}" + "".join(f"{finder:>10}" for finder in FINDERS))
    missed = 0
    for plant in chosen:
        for path in paths:
            found = found_by(path, plant, FINDERS)
            marks = "".join(f"{'found' if finder in found else '-':>10}" for finder in FINDERS)
            print(f"{plant.name:{width}}  {path.name:8}{marks}", flush=True)
            missed += plant.finder not in found
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
