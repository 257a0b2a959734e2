"""The check of torch's version, with patched records, each in a process of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
import sys, types
record = types.ModuleType("dpcomm._build_record")
record.TORCH = {built!r}
record.CUDA, record.ARCHITECTURES = None, ()
record.COMPILER, record.BUILD_TYPE, record.PROCESSOR = "GNU 12.2.0", "Release", "x86_64"
sys.modules["dpcomm._build_record"] = record
from dpcomm import _build
try:
    _build.check_torch()
except ImportError as error:
    assert type(error) is _build.BuildMismatchError
    print("ERROR", error)
else:
    print("PASSED")
assert "torch" not in sys.modules, "the check must not import torch"
"""


def check(tmp_path: Path, built: str | None, installed: str | None) -> str:
    """What check_torch says in a fresh interpreter that sees a torch of version `installed`."""
    if installed is not None:
        package = tmp_path / "torch"
        package.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
        (package / "version.py").write_text(f"__version__ = {installed!r}\ncuda = None\n")
    program = textwrap.dedent(PROGRAM).format(built=built)
    if installed is None:
        # A finder that has never heard of torch, whatever this environment has.
        program = (
            "import importlib.util as u\nfind = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n" + program
        )
    import dpcomm

    folders = [str(tmp_path), str(Path(dpcomm.__file__).parent.parent)]
    program = f"import sys; sys.path[:0] = {folders!r}\n" + program
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("installed", ["2.13.0", "2.13.0+cpu", "2.13.1+cu130", "2.13.0a0+git12"])
def test_same_minor_version_passes(tmp_path: Path, installed: str) -> None:
    assert check(tmp_path, "2.13.0+cpu", installed) == "PASSED\n"


@pytest.mark.parametrize(
    ("built", "installed", "text"),
    [
        ("2.13.0+cpu", "2.14.1", "built for torch 2.13, this is 2.14"),
        ("2.14.1", "2.13.0+cpu", "built for torch 2.14, this is 2.13"),
        ("2.1.0", "2.13.0+cpu", "built for torch 2.1, this is 2.13"),
        ("2.13.0", "3.13.0", "built for torch 2.13, this is 3.13"),
    ],
)
def test_other_version_says_rebuild(tmp_path: Path, built: str, installed: str, text: str) -> None:
    said = check(tmp_path, built, installed)
    assert said.startswith("ERROR dpcomm was " + text)
    assert "rebuild with" in said
    assert "pip install --force-reinstall --no-deps --no-cache-dir" in said


def test_built_without_torch(tmp_path: Path) -> None:
    said = check(tmp_path, None, "2.13.0+cpu")
    assert "built without torch" in said
    assert "pip install --force-reinstall" in said


def test_torch_absent_at_run_time(tmp_path: Path) -> None:
    said = check(tmp_path, "2.13.0+cpu", None)
    assert "pip install torch==2.13.0\n" in said
    assert "--force-reinstall" not in said


def test_torch_absent_at_both_times(tmp_path: Path) -> None:
    said = check(tmp_path, None, None)
    assert "pip install torch\n" in said
    assert "pip install --force-reinstall" in said


def test_record_of_this_build() -> None:
    from dpcomm import _build

    record = _build.build_record()
    assert record is not None
    assert record.build_type
    assert " " in record.compiler
    plugin = Path(_build.__file__).parent / "libdpcomm_cuda.so"
    assert (record.cuda is not None) == plugin.is_file()
    assert (record.cuda is not None) == bool(record.architectures)


def test_sources_that_were_not_built(tmp_path: Path) -> None:
    """Started in the folder of the sources, Python takes them; the error says so."""
    import dpcomm

    shutil.copytree(
        Path(dpcomm.__file__).parent,
        tmp_path / "dpcomm",
        ignore=shutil.ignore_patterns("*.so", "_build_record.py", "__pycache__"),
    )
    program = """
import sys
sys.meta_path[:] = [m for m in sys.meta_path if "editable" not in getattr(m, "__module__", "")]
import dpcomm, dpcomm._build
for attempt in ["import dpcomm._core", "dpcomm._build.check_torch()"]:
    try:
        exec(attempt)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"in {tmp_path / 'dpcomm'}" in done.stdout
    assert done.stdout.count("pip install -e .") == 2
