"""``python -m dpcomm.info``: what this copy of dpcomm is, and what it finds here.

Under torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) also which
ranks share a host; all ranks have to run it, and rank 0 prints.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpcomm import __version__, _build, _job, _report
from dpcomm.errors import DpcommError

__all__ = ["collect", "main"]

# Of the CPU, those that the kernels use.
_FEATURES = ("avx2", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "asimd", "fphp")
_TIMEOUT_S = 60.0


def collect() -> dict[str, dict[str, Any]]:
    """Everything but the topology, by section; values as JSON can hold them."""
    sections: dict[str, dict[str, Any]] = {"dpcomm": _package()}
    try:
        from dpcomm import _core
    except ImportError as error:
        sections["dpcomm"]["core"] = f"missing: {error}"
        return sections
    sections["CPU"] = _cpu()
    sections["CUDA"] = _cuda()
    sections["transports"] = {name: _TRANSPORTS.get(name, "") for name in _core.transports()}
    sections["algorithms"] = _algorithms()
    sections["environment"] = _environment()
    return sections


_TRANSPORTS = {
    "shm": "processes of one host, through shared memory",
    "inproc": "threads of one process",
}


def _package() -> dict[str, Any]:
    record = _build.build_record()
    installed = _build.installed_torch()
    try:
        _build.check_torch()
        match = "yes"
    except _build.BuildMismatchError as error:
        match = f"no: {error}"
    return {
        "version": __version__,
        "folder": str(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "system": platform.platform(),
        "built with": "not built"
        if record is None
        else f"{record.compiler}, {record.build_type}, for {record.processor}",
        "built for torch": None if record is None else record.torch,
        "torch here": installed,
        "torch backend usable": match,
    }


def _cpu() -> dict[str, Any]:
    from dpcomm import _core

    model, flags = "", set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
    except OSError:
        pass
    return {
        "model": model or platform.machine(),
        "cores": os.cpu_count(),
        "cores of this process": len(os.sched_getaffinity(0)),
        "features": [name for name in _FEATURES if name in flags],
        "kernels built": _core.wire_isas(),
        "kernels chosen": _core.wire_best_isa(),
    }


def _cuda() -> dict[str, Any]:
    from dpcomm import cuda

    record = _build.build_record()
    count, reason = cuda.device_count()
    built = record is not None and record.cuda is not None
    return {
        "built with": record.cuda if record is not None and built else None,
        "architectures": list(record.architectures) if record is not None and built else [],
        "devices": count,
        **({"why none": reason} if count == 0 else {}),
    }


def _algorithms() -> dict[str, Any]:
    from dpcomm import _core

    by_collective: dict[str, list[str]] = {}
    for collective, name, *_ in _core.schedule_algorithms():
        by_collective.setdefault(collective, []).append(name)
    return dict(by_collective)


def _environment() -> dict[str, Any]:
    """The DPCOMM_* variables that are set."""
    from dpcomm import _core

    names = [name for name, _, _ in _core.environment()]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def topology(places: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Which ranks share a host, from what each said of itself; None: it did not come."""
    hosts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for place in places:
        if place is not None:
            hosts.setdefault((place["host"], place["boot"]), []).append(place)
    result: dict[str, Any] = {"ranks": len(places), "hosts": len(hosts)}
    for (host, _), here in hosts.items():
        ranks = ", ".join(f"{place['rank']} (pid {place['pid']})" for place in here)
        result[f"on {host}"] = f"{ranks}; {here[0]['cores']} cores"
    missing = [str(rank) for rank, place in enumerate(places) if place is None]
    if missing:
        result["did not come"] = ", ".join(missing)
    return result


def _topology(job: _job.Job) -> dict[str, Any]:
    store = job.open_store(_TIMEOUT_S)
    places = _job.exchange(job, store, "info", _job.whereabouts(job.rank), _TIMEOUT_S)
    _job.leave(job, store, _TIMEOUT_S)
    return topology(places)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(each) for each in value) or "none"
    return "none" if value is None else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status: 1 if the core is missing or ranks did not come."""
    parser = argparse.ArgumentParser(prog="python -m dpcomm.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    chosen = parser.parse_args(arguments)
    sections = collect()
    status = 1 if "core" in sections["dpcomm"] else 0
    job = _job.find_job(os.environ)
    if job is not None:
        try:
            sections["topology"] = _topology(job)
        except DpcommError as error:
            sections["topology"] = {"error": str(error)}
        status |= "error" in sections["topology"] or "did not come" in sections["topology"]
        if job.rank != 0:
            return status
    if chosen.json:
        _report.print_json(sections)
        return status
    for title, values in sections.items():
        rows = [(name, _text(value)) for name, value in values.items()]
        if rows:
            _report.print_table(title, ("", ""), rows)
    return status


if __name__ == "__main__":
    sys.exit(main())
