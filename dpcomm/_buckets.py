"""DDP's gradient buckets in shared memory, with no change of the user's script.

DDP gives its parameters to ``torch.distributed.Reducer``, which allocates the buckets when it is
made, and once more after the first step, when it knows the order in which gradients come. A class
that stands in its place holds the switch of dpcomm.memory meanwhile, for groups of dpcomm only.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

__all__ = ["install"]


def install(binding: ModuleType) -> None:
    """Puts the class into torch.distributed. Idempotent.

    Args:
        binding: the module ``dpcomm._torch``.
    """
    import torch.distributed as dist

    base: Any = getattr(dist, "Reducer", None)
    if base is None or getattr(base, "_dpcomm_switch", None) is not None:
        return

    class Reducer(base):  # type: ignore[misc]
        """torch.distributed's Reducer; with a group of dpcomm its buckets lie in shared memory."""

        _dpcomm_switch = binding.set_thread_shared_memory
        _dpcomm_shares = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._dpcomm_shares = _shares(binding, [*args, *kwargs.values()])
            with _Switch(self):
                super().__init__(*args, **kwargs)

        def _rebuild_buckets(self) -> bool:
            with _Switch(self):
                rebuilt: bool = super()._rebuild_buckets()
                return rebuilt

        def _update_process_group(self, new_process_group: Any) -> None:
            super()._update_process_group(new_process_group)
            self._dpcomm_shares = _shares(binding, [new_process_group])

    Reducer.__qualname__ = base.__qualname__
    Reducer.__module__ = base.__module__
    vars(dist)["Reducer"] = Reducer


class _Switch:
    """Of this thread, on for the time of a block if the reducer's buckets are to be shared."""

    __slots__ = ("_previous", "_reducer")

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __enter__(self) -> None:
        if self._reducer._dpcomm_shares:
            self._previous: bool = type(self._reducer)._dpcomm_switch(True)

    def __exit__(self, *_: object) -> None:
        if self._reducer._dpcomm_shares:
            type(self._reducer)._dpcomm_switch(self._previous)


def _shares(binding: ModuleType, arguments: list[Any]) -> bool:
    """Whether the process group among the arguments is dpcomm's and has the option."""
    import torch
    import torch.distributed as dist

    for group in arguments:
        if isinstance(group, dist.ProcessGroup):
            try:
                backend = group._get_backend(torch.device("cpu"))
            except RuntimeError:  # it has none for the CPU
                return False
            backend = getattr(backend, "wrapped_pg", backend)  # under TORCH_DISTRIBUTED_DEBUG
            return isinstance(backend, binding.ProcessGroupDpcomm) and bool(
                binding.options(backend)["shared_buckets"]
            )
    return False
