"""Builds small PTX texts into programs and runs them: for the tests of the translator."""

from __future__ import annotations

import ctypes
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import variants

from ptx.syntax import parse
from ptx.translate import FLAGS, FOLDER, table, translate

ENTRIES_A_FILE = 64  # small ones
HEADER = ".version 9.0\n.target sm_90\n.address_size 64\n"
Array = npt.NDArray[Any]


def build(name: str, text: str, thread_sanitizer: bool = False) -> Path:
    """The kernels of a PTX text: a library for ctypes, or a program with the thread sanitizer."""
    folder = variants.OUTPUT / "ptx" / name
    folder.mkdir(parents=True, exist_ok=True)
    module = parse(text, f"{name}.ptx")
    sources = []
    for first in range(0, len(module.entries), ENTRIES_A_FILE):
        chosen = module.entries[first : first + ENTRIES_A_FILE]
        sources.append(folder / f"kernels{first}.cc")
        sources[-1].write_text("\n".join(translate(module, entry) for entry in chosen))
    sources.append(folder / "table.cc")
    sources[-1].write_text(table(module.entries))
    sources.append(FOLDER / "launcher.cc")
    plain = [*variants.FLAGS, *FLAGS, "-fPIC"]
    checked = [*plain, "-fsanitize=thread"] if thread_sanitizer else plain
    # The scheduler itself is not instrumented.
    scheduler = [*plain, "-O2"] + (["-DDPCOMM_EMULATED_TSAN"] if thread_sanitizer else [])
    jobs = [(source, checked) for source in sources]
    jobs += [(source, scheduler) for source in variants.RUNTIME]
    with variants.locked("ptx"), ThreadPoolExecutor(variants.JOBS) as pool:
        objects = list(pool.map(lambda job: variants.compiled(*job), jobs))
        target = folder / ("program" if thread_sanitizer else "program.so")
        link = ["-fsanitize=thread"] if thread_sanitizer else ["-shared"]
        variants.run_compiler([variants.compiler(), *link, *map(str, objects), "-o", str(target)])
    return target


class Program:
    """A library of translated kernels."""

    def __init__(self, name: str, text: str) -> None:
        self.library = ctypes.CDLL(str(build(name, text)))
        self.library.ptx_run.restype = ctypes.c_char_p

    def run(
        self,
        kernel: str,
        arguments: list[Array | int],
        blocks: tuple[int, int] = (1, 1),
        threads: int = 32,
        seed: int = 0,
    ) -> str:
        """Every argument is a parameter of 8 bytes: the address of an array, or a number.

        Returns: what went wrong, or an empty string.
        """
        words = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in arguments]
        parameters = np.array(words, dtype=np.uint64)
        problem = self.library.ptx_run(
            kernel.encode(),
            ctypes.c_void_p(parameters.ctypes.data),
            ctypes.c_uint32(blocks[0]),
            ctypes.c_uint32(blocks[1]),
            ctypes.c_uint32(threads),
            ctypes.c_uint64(seed),
        )
        return str(problem.decode())


def entry(name: str, parameters: int, body: str) -> str:
    """An entry with `parameters` parameters p0, p1, ... of 8 bytes."""
    declared = ",\n".join(f"\t.param .u64 p{index}" for index in range(parameters))
    return f".visible .entry {name}(\n{declared}\n)\n{{\n{body}\n}}\n"


def without_address_randomisation() -> list[str]:
    """A prefix: old thread sanitizers do not know the address layouts of newer kernels."""
    return ["setarch", os.uname().machine, "-R"] if shutil.which("setarch") else []
