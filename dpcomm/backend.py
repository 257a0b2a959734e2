"""dpcomm as a backend of torch.distributed. Importing this module imports no torch and no library.

The library, ``dpcomm._torch``, is loaded when the first group is made. A binary for another minor
version of torch could end the process, so versions are compared first.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

from dpcomm import _buckets, _build
from dpcomm.errors import UsageError
from dpcomm.options import Options

__all__ = ["binding", "register"]

NAME = "dpcomm"
DEVICES = ["cpu", "cuda"]  # a list: torch would take a str for a list of letters


def register() -> None:
    """Makes the name "dpcomm" known to torch.distributed. Imports torch. Idempotent."""
    import torch.distributed as dist

    if not dist.is_available():
        return
    if NAME.upper() in dist.Backend._plugins:
        return
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=DEVICES)


@functools.cache
def binding() -> ModuleType:
    """The module ``dpcomm._torch``, loaded at the first call.

    Raises:
        ImportError: torch is missing or another than the one built for; says what to do.
    """
    if _build.build_record() is not None or importlib.util.find_spec("dpcomm._torch") is None:
        _build.check_torch()
    import torch  # noqa: F401  its libraries, which the binding needs

    module = importlib.import_module("dpcomm._torch")
    # A group that nobody destroyed must not outlive the interpreter with a thread.
    atexit.register(module.shutdown_all)
    return module


def _create(group: Any, pg_options: Options | None) -> Any:
    """What torch calls to make a group.

    Args:
        group: torch's _DistributedBackendOptions: store, rank, size, timeout, name.
        pg_options: Options of the group, or None.

    Returns:
        A ``torch._C._distributed_c10d.Backend``. Complete when all ranks have come.

    Raises:
        UsageError: options that make no sense. TimeoutError: ranks that did not come.
    """
    if pg_options is not None and not isinstance(pg_options, Options):
        raise UsageError(f"pg_options of backend dpcomm is a dpcomm.Options, not {pg_options!r}")
    _buckets.install(binding())
    return binding().create(group, pg_options.chosen() if pg_options is not None else {})
