"""The backends under test: each one a process group of its own in the same processes.

Every backend of torch.distributed goes through the same code (`TorchBackend`); what dpcomm alone
has are options (wire format, algorithm, links) and `communicator`, its interface without torch.
`<backend>-fp16hook` is any of them behind a cast to fp16 and back, as DDP's fp16 hook does it: the
fair peer of a lossy wire.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from dpcomm import backend as dpcomm_backend
from dpcomm.bench.cases import PREMUL_FACTOR, Case
from dpcomm.bench.units import BenchError
from dpcomm.errors import UsageError

__all__ = ["Backend", "BackendSpec", "create_backend", "expand", "unsupported_reason"]

IN_PLACE, OUT_OF_PLACE = "in-place", "out-of-place"
HOOK_SUFFIX = "-fp16hook"
WITH_OPTIONS = ("dpcomm", "communicator")  # backends that have a wire format and an algorithm
Operation = Callable[[Any, Any], object]  # on (input, output), both flat, as Backend.array gives


@dataclass(frozen=True)
class BackendSpec:
    """What the user asked for by one name of --backends, --wire and --algo."""

    name: str
    wire: str = "native"
    algo: str = "auto"
    label: str = ""
    shared_buckets: bool | None = None  # of dpcomm; None: its default

    @property
    def base(self) -> str:
        return self.name.removesuffix(HOOK_SUFFIX)


def expand(names: list[str], wires: list[str], algos: list[str]) -> list[BackendSpec]:
    """One spec per backend, and per wire format and algorithm for those that have them.

    Raises:
        BenchError: if two would be the same.
    """
    specs: list[BackendSpec] = []
    for name in names:
        if name.removesuffix(HOOK_SUFFIX) not in WITH_OPTIONS:
            specs.append(BackendSpec(name, label=name))
            continue
        for wire in wires:
            for algo in algos:
                label = name
                label += f"/{wire}" if len(wires) > 1 or wire != "native" else ""
                label += f"/{algo}" if len(algos) > 1 or algo != "auto" else ""
                specs.append(BackendSpec(name, wire, algo, label))
    labels = [spec.label for spec in specs]
    if not labels or len(set(labels)) < len(labels):
        raise BenchError(f"--backends needs different names, not {', '.join(labels) or 'none'}")
    return specs


class Backend(Protocol):
    """What the runner needs of a backend."""

    spec: BackendSpec

    def placements(self, case: Case) -> tuple[str, ...]:
        """In place, out of place or both: what the interface really has."""

    def operation(self, case: Case) -> Operation:
        """A call that runs the collective to its end on (input, output)."""

    def array(self, tensor: torch.Tensor) -> Any:
        """What `operation` takes: the tensor, or a view of it in the interface's own kind."""

    def barrier(self) -> None:
        """Returns once every rank has called it."""

    def close(self) -> None:
        """Frees the group."""


def _torch_op(case: Case) -> Any:
    if case.op == "premul":
        return _newest("_make_nccl_premul_sum")(PREMUL_FACTOR)
    name = {"prod": "PRODUCT"}.get(case.op, case.op.upper())
    return getattr(dist.ReduceOp, name)


def _newest(*names: str) -> Callable[..., Any]:
    """The first of torch.distributed's functions that this version has (names changed in 2.13)."""
    for name in names:
        if hasattr(dist, name):
            function: Callable[..., Any] = getattr(dist, name)
            return function
    raise BenchError(f"this torch.distributed has none of {', '.join(names)}")


class TorchBackend:
    """Any backend of torch.distributed, through the functions that users call."""

    def __init__(self, spec: BackendSpec, group: dist.ProcessGroup) -> None:
        self.spec = spec
        self.group = group

    def placements(self, case: Case) -> tuple[str, ...]:
        if case.collective in ("all_reduce", "broadcast"):
            return (IN_PLACE,)  # torch.distributed has no other form
        if case.collective == "all_gather_list":
            return (OUT_OF_PLACE,)
        return (OUT_OF_PLACE, IN_PLACE)

    def operation(self, case: Case) -> Operation:
        group = self.group
        if case.collective == "all_reduce":
            return _on_output(functools.partial(dist.all_reduce, op=_torch_op(case), group=group))
        if case.collective == "broadcast":
            return _on_output(functools.partial(dist.broadcast, src=case.root, group=group))
        if case.collective == "all_gather":
            gather = _newest("all_gather_single", "all_gather_into_tensor")
            return lambda input, output: gather(output, input, group=group)
        if case.collective == "all_gather_list":
            return lambda input, output: dist.all_gather(
                list(output.chunk(case.world_size)), input, group=group
            )
        scatter = _newest("reduce_scatter_single", "reduce_scatter_tensor")
        op = _torch_op(case)
        return lambda input, output: scatter(output, input, op=op, group=group)

    def array(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def barrier(self) -> None:
        dist.barrier(group=self.group)

    def close(self) -> None:
        dist.destroy_process_group(self.group)


def _on_output(call: Callable[[torch.Tensor], object]) -> Operation:
    def run(_: torch.Tensor, output: torch.Tensor) -> object:
        return call(output)

    return run


class Fp16HookBackend:
    """A backend behind a cast to fp16 and back (all_reduce of 32-bit and 64-bit floats only)."""

    def __init__(self, inner: Backend) -> None:
        self.spec = inner.spec
        self._inner = inner

    def placements(self, case: Case) -> tuple[str, ...]:
        return (IN_PLACE,)

    def operation(self, case: Case) -> Operation:
        if case.collective != "all_reduce" or case.dtype not in (torch.float32, torch.float64):
            raise BenchError("the fp16 hook is for all_reduce of float and double")
        run = self._inner.operation(case)

        def hooked(_: torch.Tensor, output: torch.Tensor) -> None:
            half = output.to(torch.float16)
            run(half, half)
            output.copy_(half)

        return hooked

    def array(self, tensor: torch.Tensor) -> Any:
        return self._inner.array(tensor)

    def barrier(self) -> None:
        self._inner.barrier()

    def close(self) -> None:
        self._inner.close()


def create_backend(spec: BackendSpec, wire_links: str, timeout_s: float) -> Backend:
    """Makes the backend's process group. Collective.

    Raises:
        BenchError: for a name that torch.distributed does not know or has no CPU tensors for.
    """
    inner: Backend
    if spec.base == "communicator":
        inner = _communicator(spec, wire_links, timeout_s)
    else:
        _check_name(spec.base)
        options = _dpcomm_options(spec, wire_links) if spec.base in WITH_OPTIONS else None
        inner = TorchBackend(spec, _new_group(spec, options, timeout_s))
    return Fp16HookBackend(inner) if spec.name.endswith(HOOK_SUFFIX) else inner


def _new_group(spec: BackendSpec, options: Any, timeout_s: float) -> dist.ProcessGroup:
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        group: dist.ProcessGroup = dist.new_group(
            backend=spec.base, pg_options=options, timeout=timeout
        )
    except (ImportError, UsageError) as error:  # its library is missing, or an option is wrong
        raise BenchError(f"{spec.label}: {error}") from error
    return group


def _check_name(name: str) -> None:
    if name == "dpcomm":  # known already where dpcomm is installed; not in a bare source tree
        dpcomm_backend.register()
    known = [n for n in dist.Backend.backend_list if n not in ("undefined", "fake")]
    usable = [n for n in known if "cpu" in dist.Backend.backend_capability.get(n, ["cpu"])]
    usable = [n for n in usable if dist.is_backend_available(n)]
    if name not in usable:
        reason = "works on CPU tensors" if name in known else "is known"
        raise BenchError(
            f"no backend {name!r} {reason} here; --backends takes {', '.join(usable)}, "
            f"communicator, and each of them with {HOOK_SUFFIX}"
        )


def _dpcomm_options(spec: BackendSpec, wire_links: str) -> Any:
    import dpcomm

    try:
        return dpcomm.Options(
            wire=spec.wire,
            algorithm=spec.algo,
            wire_links=wire_links,
            shared_buckets=spec.shared_buckets,
        )
    except UsageError as error:
        raise BenchError(str(error)) from error


class CommunicatorBackend:
    """dpcomm.Communicator, which needs no torch, on NumPy arrays (bfloat16: on tensors)."""

    def __init__(self, spec: BackendSpec, wire_links: str, timeout_s: float) -> None:
        import dpcomm

        self.spec = spec
        self._comm = dpcomm.Communicator(
            dist.get_rank(),
            dist.get_world_size(),
            dist.distributed_c10d._get_default_store(),
            name=f"bench/{spec.label}",
            wire=spec.wire,
            wire_links=wire_links,
            algorithm=spec.algo,
            timeout=timeout_s,
        )

    def placements(self, case: Case) -> tuple[str, ...]:
        if case.collective == "broadcast":
            return (IN_PLACE,)
        return (OUT_OF_PLACE, IN_PLACE)

    def operation(self, case: Case) -> Operation:
        comm = self._comm
        op = {"prod": "product", "premul": "premul_sum"}.get(case.op, case.op)
        if case.collective == "all_reduce":
            factor = PREMUL_FACTOR if op == "premul_sum" else 1.0
            return lambda input, output: comm.all_reduce(input, op, out=output, factor=factor)
        if case.collective == "broadcast":
            return lambda _, output: comm.broadcast(output, case.root)
        if case.collective == "all_gather":
            return lambda input, output: comm.all_gather(input, out=output)
        if case.collective == "reduce_scatter":
            factor = PREMUL_FACTOR if op == "premul_sum" else 1.0
            return lambda input, output: comm.reduce_scatter(input, op, out=output, factor=factor)
        raise BenchError(f"the communicator has no {case.collective}")

    def array(self, tensor: torch.Tensor) -> Any:
        return tensor if tensor.dtype == torch.bfloat16 else tensor.numpy()

    def barrier(self) -> None:
        self._comm.barrier()

    def close(self) -> None:
        self._comm.close()


def _communicator(spec: BackendSpec, wire_links: str, timeout_s: float) -> Backend:
    try:
        return CommunicatorBackend(spec, wire_links, timeout_s)
    except (ImportError, RuntimeError, ValueError) as error:
        raise BenchError(f"{spec.label}: {error}") from error


def unsupported_reason(backend: Backend, case: Case) -> str:
    """Why the backend does not run this collective on this dtype and op; empty if it does.

    Tries it on the smallest size that has an element per rank. An error counts on whichever rank
    it comes; every rank gets the same answer from its own attempt, so no message is left over.
    """
    small = Case(
        case.collective,
        case.dtype_name,
        case.op,
        case.world_size * case.dtype.itemsize,
        case.world_size,
        case.root,
    )
    try:
        run = backend.operation(small)
        output = backend.array(torch.ones(small.output_elems, dtype=small.dtype))
        if OUT_OF_PLACE in backend.placements(small):
            run(backend.array(torch.ones(small.input_elems, dtype=small.dtype)), output)
        else:
            run(output, output)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, BenchError) as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ""
