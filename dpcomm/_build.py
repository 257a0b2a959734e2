"""The build record, and the check that the torch at run time is the one that was built for.

A binary for one minor version of torch does not merely misbehave with another: it may end the
process without a Python error. So this is looked up before ``dpcomm._torch`` is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BuildMismatchError", "BuildRecord", "build_record", "check_torch", "installed_torch"]

_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir dpcomm"
_REINSTALL_HINT = f"{_REINSTALL}   (or, in a clone of dpcomm, `.` in place of `dpcomm`)"


class BuildMismatchError(ImportError):
    """The torch backend is not there, or was built for another torch; the text says what to do."""


@dataclass(frozen=True)
class BuildRecord:
    """What this copy of dpcomm was built with.

    Attributes:
        torch: version of torch, such as "2.13.0+cpu"; None: built without the torch backend.
        cuda: version of the CUDA toolkit; None: no CUDA part.
        architectures: CUDA architectures, such as ("80", "90", "120+PTX").
        compiler: name and version, such as "GNU 12.2.0".
        build_type: CMake's, such as "Release".
        processor: such as "x86_64".
    """

    torch: str | None
    cuda: str | None
    architectures: tuple[str, ...]
    compiler: str
    build_type: str
    processor: str


def build_record() -> BuildRecord | None:
    """The record that the build left in the package; None in a source tree that was not built."""
    try:
        module = importlib.import_module("dpcomm._build_record")
    except ModuleNotFoundError:
        return None
    return BuildRecord(
        torch=module.TORCH,
        cuda=module.CUDA,
        architectures=module.ARCHITECTURES,
        compiler=module.COMPILER,
        build_type=module.BUILD_TYPE,
        processor=module.PROCESSOR,
    )


def installed_torch() -> str | None:
    """The version of the torch that ``import torch`` gives, found without importing it.

    Returns:
        Such as "2.13.0+cpu"; None where there is no torch.
    """
    if "torch" in sys.modules:
        version = getattr(sys.modules["torch"], "__version__", None)
        return None if version is None else str(version)
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:  # without origin: a folder that is called torch
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"""^__version__\s*=\s*['"]([^'"]+)['"]""", text, re.MULTILINE)
    return match.group(1) if match else None


def check_torch() -> None:
    """Makes sure that ``dpcomm._torch`` can be imported. To be called before its first import.

    Raises:
        BuildMismatchError: an ImportError that says what to install or rebuild.

    Cost: one look at the file system. Starts nothing, imports no library.
    """
    record = build_record()
    if record is None:
        raise BuildMismatchError(
            "dpcomm was not built: this is its source tree. Build it with\n"
            "  pip install -e .\n"
            "or leave this folder, if dpcomm is installed."
        )
    installed = installed_torch()
    if installed is None:
        built = f"torch=={_release(record.torch)}" if record.torch else "torch"
        after = "" if record.torch else f"\nthen dpcomm again:\n  {_REINSTALL_HINT}"
        raise BuildMismatchError(
            "dpcomm's torch backend needs torch, which is not installed here. Install it:\n"
            f"  pip install {built}{after}"
        )
    if record.torch is None:
        raise BuildMismatchError(
            f"dpcomm was built without torch, and this is torch {installed}: rebuild with\n"
            f"  {_REINSTALL_HINT}\n"
            "(install torch, then reinstall dpcomm; with uv set DPCOMM_TORCH or use\n"
            "--no-build-isolation)."
        )
    if _minor(record.torch) != _minor(installed):
        raise BuildMismatchError(
            f"dpcomm was built for torch {_minor(record.torch)}, this is {_minor(installed)}: "
            f"rebuild with\n  {_REINSTALL_HINT}"
        )


def _release(version: str) -> str:
    """ "2.13.0+cpu" -> "2.13.0"."""
    return version.split("+")[0]


def _minor(version: str) -> str:
    """ "2.13.0+cpu" -> "2.13"."""
    return ".".join(_release(version).split(".")[:2])
