"""The directions of the house (DESIGN, "who may include whom"), checked by reading the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# folder of csrc/ -> the folders whose headers it may include, besides its own.
MAY_INCLUDE = {
    "base": set(),
    "wire": {"base"},
    "schedule": {"base"},
    "transport": {"base"},
    "verify": {"base", "schedule"},
    "cpu": {"base", "wire", "schedule", "transport"},
    "cuda": {"base", "wire", "schedule", "transport"},
    "comm": {"base", "wire", "schedule", "transport", "verify", "cpu", "cuda"},
    "torch": {"base", "wire", "schedule", "transport", "verify", "cpu", "cuda", "comm"},
    "bind": {"base", "wire", "schedule", "transport", "verify", "cpu", "cuda", "comm", "torch"},
}
TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2)/")
PYBIND11_HEADER = re.compile(r"(pybind11/|Python\.h)")
CUDA_HEADER = re.compile(r"(cuda|cooperative_groups|nv/|c10/cuda|ATen/cuda)|\.cuh$")
MAY_ORDER_MEMORY = {"transport/slot_ring.h", "cpu/small.cc", "cuda/platform.cuh"}
# What the device code stands on where no CUDA compiler reads it; only the tests have it.
HOST_TWIN = ("cuda/platform.cuh", "emulated/platform.h")
MAY_READ_ENVIRONMENT = {"base/env.cc"}
LOOSE_FLAGS = re.compile(
    r"-march=native|-mcpu=native|-ffast-math|-Ofast|-funsafe-math|-fassociative-math"
    r"|-ffp-contract=(fast|on)|--use_fast_math"
)
BUILD_VARIABLES = {"DPCOMM_TORCH", "DPCOMM_CUDA", "DPCOMM_WERROR"}
# The modules of dpcomm that may import torch when they are imported; all others work without it.
TORCH_MODULES = {"bench/backends.py", "bench/cases.py", "bench/ddp.py", "bench/runner.py"}


def without_comments(text: str) -> str:
    """C++ without its comments; strings and line numbers stay."""
    pattern = r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|//[^\n]*|/\*.*?\*/"""

    def keep(match: re.Match[str]) -> str:
        return match.group(1) or "\n" * match.group(0).count("\n")

    return re.sub(pattern, keep, text, flags=re.DOTALL)


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """(path below csrc, text without comments) of every C++ file."""
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in {".h", ".cc", ".def", ".cu", ".cuh"}:
            yield path.relative_to(root / "csrc").as_posix(), without_comments(path.read_text())


def find(root: Path, pattern: str) -> Iterator[tuple[str, int, str]]:
    """(path, line, match) of a pattern in the code of csrc."""
    for path, text in sources(root):
        for number, line in enumerate(text.splitlines(), 1):
            for match in re.finditer(pattern, line):
                yield path, number, match.group(0)


def includes_break_the_order(root: Path) -> list[str]:
    problems = []
    for path, text in sources(root):
        folder = path.split("/")[0] if "/" in path else ""
        if folder not in MAY_INCLUDE:
            problems.append(f"{path}: the folder has no place in the order")
            continue
        for header in re.findall(r'(?m)^\s*#\s*include\s*"([^"]+)"', text):
            target = header.split("/")[0]
            if (path, header) == HOST_TWIN:
                continue
            if ".." in header or target not in MAY_INCLUDE:
                problems.append(f'{path}: "{header}": name it from csrc, as "base/error.h"')
            elif target != folder and target not in MAY_INCLUDE[folder]:
                problems.append(f"{path}: {folder} may not include {header}")
            elif target == "torch" and not may_use_torch(path):
                problems.append(f"{path}: only bind/torch_* may include {header}")
            elif not (root / "csrc" / header).is_file():
                problems.append(f'{path}: "{header}" is not there')
    return problems


def may_use_torch(path: str) -> bool:
    return path.startswith(("torch/", "bind/torch_"))


def foreign_headers(root: Path) -> list[str]:
    problems = []
    for path, text in sources(root):
        folder = path.split("/")[0]
        for header in re.findall(r"(?m)^\s*#\s*include\s*<([^>]+)>", text):
            if CUDA_HEADER.search(header) and folder != "cuda":
                problems.append(f"{path}: CUDA header <{header}>")
            elif TORCH_HEADER.match(header) and not may_use_torch(path):
                problems.append(f"{path}: torch header <{header}>")
            elif PYBIND11_HEADER.match(header) and folder not in {"bind", "torch"}:
                problems.append(f"{path}: pybind11 header <{header}>")
    return problems


def memory_orders(root: Path) -> list[str]:
    problems = [
        f"csrc/{path}:{line}: {text} (only in {', '.join(sorted(MAY_ORDER_MEMORY))})"
        for path, line, text in find(root, r"\bmemory_order\w*|\b__ATOMIC_(?!SEQ_CST)[A-Z]+")
        if path not in MAY_ORDER_MEMORY
    ]
    return problems + [
        f"csrc/{path}:{line}: {text}: thread sanitizers do not know fences"
        for path, line, text in find(root, r"\b\w*atomic_(thread|signal)_fence|__sync_synchronize")
        if not path.startswith("cuda/")
    ]


def loose_flags(root: Path) -> list[str]:
    files = [root / "CMakeLists.txt", root / "setup.py", root / "pyproject.toml", root / "Makefile"]
    files += [*root.glob("cmake/*"), *root.glob("tools/*"), *root.glob(".ci/*")]
    problems = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
            if match := LOOSE_FLAGS.search(line.split("# ")[0]):
                problems.append(f"{path.relative_to(root)}:{number}: {match.group(0)}")
    return problems + [
        f"csrc/{path}:{line}: {text}"
        for path, line, text in find(root, r"#\s*pragma\s+\w+\s+optimize|__optimize__|fast-math")
    ]


def environment_variables(root: Path) -> list[str]:
    """Reads outside of base/env.cc, and names in texts that the table does not have."""
    problems = [
        f"csrc/{path}:{line}: {text}: ask base/env.h"
        for path, line, text in find(root, r"\b(secure_)?getenv\b|\bsetenv\b|\benviron\b")
        if path not in MAY_READ_ENVIRONMENT
    ]
    table = (root / "csrc/base/env.def").read_text()
    known = {f"DPCOMM_{name}" for name in re.findall(r"DPCOMM_VARIABLE\((\w+)", table)}
    known |= BUILD_VARIABLES
    for path, line, text in find(root, r'"(?:\\.|[^"\\])*"'):
        for name in re.findall(r"\bDPCOMM_[A-Z0-9_]+", text):
            if name not in known and name != "DPCOMM_":
                problems.append(f"csrc/{path}:{line}: {name} is not in base/env.def")
    for path, tree in python_modules(root):
        problems += [f"dpcomm/{path}: {text}" for text in environment_of_python(tree, known)]
    return problems


def environment_of_python(tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for name in re.findall(r"\bDPCOMM_[A-Z0-9_]+", node.value):
                if name not in known:
                    yield f"line {node.lineno}: {name} is not in base/env.def"
        if isinstance(node, ast.Call | ast.Subscript) and reads_environment(node):
            yield f"line {node.lineno}: reads a DPCOMM_ variable past the table of base/env.h"


def reads_environment(node: ast.Call | ast.Subscript) -> bool:
    """os.environ["DPCOMM_X"] as a value, os.environ.get("DPCOMM_X"), os.getenv("DPCOMM_X")."""
    if isinstance(node, ast.Subscript):
        what, name, read = node.value, node.slice, isinstance(node.ctx, ast.Load)
    else:
        what, name, read = node.func, node.args[0] if node.args else None, True
    if not (read and isinstance(name, ast.Constant) and str(name.value).startswith("DPCOMM_")):
        return False
    return "environ" in ast.unparse(what) or "getenv" in ast.unparse(what)


def python_modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((root / "dpcomm").rglob("*.py")):
        yield path.relative_to(root / "dpcomm").as_posix(), ast.parse(path.read_text())


def may_import_torch(path: str) -> bool:
    return path in TORCH_MODULES


def imported_at_import(tree: ast.Module) -> Iterator[str]:
    """The modules that are imported as soon as this one is (not in functions, not for types)."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module == "dpcomm":  # `from dpcomm import _torch` imports dpcomm._torch
                yield from (f"dpcomm.{alias.name}" for alias in node.names)
            else:
                yield module
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        else:
            pending += ast.iter_child_nodes(node)


def torch_imports(root: Path) -> list[str]:
    return [
        f"dpcomm/{path}: imports {name}"
        for path, tree in python_modules(root)
        if not may_import_torch(path)
        for name in imported_at_import(tree)
        if name.split(".")[0] == "torch" or name.startswith("dpcomm._torch")
    ]


CHECKS: list[Callable[[Path], list[str]]] = [
    includes_break_the_order,
    foreign_headers,
    memory_orders,
    loose_flags,
    environment_variables,
    torch_imports,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_tree_keeps_the_rules(check: Callable[[Path], list[str]]) -> None:
    assert check(ROOT) == []


def test_the_tree_is_read() -> None:
    """The checks above pass on an empty folder too: show that they saw the sources."""
    assert len(list(sources(ROOT))) > 20
    assert len(list(python_modules(ROOT))) > 3


PLANTED: list[tuple[Callable[[Path], list[str]], str, str]] = [
    (includes_break_the_order, "csrc/wire/x.cc", '#include "schedule/step.h"'),
    (includes_break_the_order, "csrc/base/x.h", '#include "comm/work.h"'),
    (includes_break_the_order, "csrc/verify/x.h", '  #  include "transport/channel.h"'),
    (includes_break_the_order, "csrc/bind/core_x.cc", '#include "torch/call.h"'),
    (includes_break_the_order, "csrc/cpu/x.cc", '#include "../base/env.h"'),
    (includes_break_the_order, "csrc/cpu/x.cc", '#include "base/not_there.h"'),
    (includes_break_the_order, "csrc/misc/x.cc", "int x;"),
    (foreign_headers, "csrc/comm/x.cc", "#include <ATen/ATen.h>"),
    (foreign_headers, "csrc/bind/core_x.cc", "#include <torch/extension.h>"),
    (foreign_headers, "csrc/cpu/x.cc", "#include <pybind11/pybind11.h>"),
    (foreign_headers, "csrc/torch/x.cc", "#include <c10/cuda/CUDAStream.h>"),
    (foreign_headers, "csrc/comm/x.cc", "#include <cuda_runtime.h>"),
    (memory_orders, "csrc/comm/x.cc", "int y = x.load(std::memory_order_relaxed);"),
    (memory_orders, "csrc/comm/x.cc", "int y = __atomic_load_n(&x, __ATOMIC_ACQUIRE);"),
    (memory_orders, "csrc/transport/slot_ring.h", "std::atomic_thread_fence(std::order);"),
    (loose_flags, "CMakeLists.txt", "add_compile_options(-march=native)"),
    (loose_flags, "setup.py", 'FLAGS = ["-ffast-math"]'),
    (loose_flags, "csrc/wire/x.cc", '#pragma GCC optimize("O3")'),
    (environment_variables, "csrc/cpu/x.cc", 'auto* s = std::getenv("HOME");'),
    (environment_variables, "csrc/cpu/x.cc", 'say("set DPCOMM_TIMEOOT");'),
    (environment_variables, "dpcomm/x.py", 'import os\nos.environ.get("DPCOMM_WIRE")'),
    (environment_variables, "dpcomm/x.py", 'import os\nx = os.environ["DPCOMM_WIRE"]'),
    (environment_variables, "dpcomm/x.py", 'raise ValueError("see DPCOMM_WIER")'),
    (torch_imports, "dpcomm/x.py", "import torch.nn"),
    (torch_imports, "dpcomm/x.py", "try:\n    from torch import nn\nexcept ImportError:\n    pass"),
    (torch_imports, "dpcomm/tools/x.py", "from dpcomm import _torch"),
]  # fmt: skip

HARMLESS = {
    "csrc/wire/y.cc": '// #include "comm/work.h"\n/* getenv memory_order */\n#include <vector>\n',
    "csrc/cpu/y.cc": '#include "base/env.h"\n#include "wire/codec.h"\n#include <immintrin.h>\n',
    "csrc/transport/slot_ring.h": "int x = y.load(std::memory_order_acquire);  // pairs\n",
    "csrc/torch/y.cc": '#include <torch/csrc/utils.h>\n#include "comm/work.h"\n',
    "dpcomm/y.py": (
        "from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    import torch\n    raise ValueError('set DPCOMM_WIRE')\n"
    ),
    "CMakeLists.txt": "# no -march=native here\nadd_compile_options(-ffp-contract=off)\n",
}


@pytest.fixture
def small_tree(tmp_path: Path) -> Path:
    """A tree that keeps all rules."""
    for header in ["base/env.h", "wire/codec.h", "comm/work.h", "schedule/step.h", "torch/call.h"]:
        write(tmp_path / "csrc" / header, "#pragma once\n")
    write(tmp_path / "csrc/transport/channel.h", "#pragma once\n")
    write(tmp_path / "csrc/base/env.def", 'DPCOMM_VARIABLE(WIRE, "", "")\n')
    for path, text in HARMLESS.items():
        write(tmp_path / path, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_harmless_code_passes(check: Callable[[Path], list[str]], small_tree: Path) -> None:
    assert check(small_tree) == []


@pytest.mark.parametrize(("check", "path", "text"), PLANTED)
def test_planted_faults_are_found(
    check: Callable[[Path], list[str]], path: str, text: str, small_tree: Path
) -> None:
    write(small_tree / path, text + "\n")
    assert len(check(small_tree)) == 1


def test_import_without_torch() -> None:
    """Every module that must do without torch does, and none starts a thread or a process."""
    modules = [
        "dpcomm." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path, _ in python_modules(ROOT)
        if not may_import_torch(path) and not path.endswith("__main__.py") and path != "__init__.py"
    ]
    program = f"""
import importlib, os, sys
sys.modules["torch"] = None  # any import of torch raises ImportError
import numpy
before = set(os.listdir("/proc/self/task"))
for name in {modules!r}:
    importlib.import_module(name)
assert set(os.listdir("/proc/self/task")) == before, "the import started a thread"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
