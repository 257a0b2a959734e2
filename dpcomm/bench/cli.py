"""The command line: `torchrun ... -m dpcomm.bench [options]` and `python -m dpcomm.bench plot`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpcomm.bench.options import LAUNCH, make_parser, make_plot_parser
from dpcomm.bench.progress import Progress
from dpcomm.bench.units import BenchError, format_size, sweep

if TYPE_CHECKING:
    from dpcomm.bench.backends import Backend
    from dpcomm.bench.cases import Case
    from dpcomm.bench.report import Row

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark or a subcommand; returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments[:1] == ["plot"]:
            return _plot(make_plot_parser().parse_args(arguments[1:]))
        options = make_parser().parse_args(arguments)
        _check_environment(arguments)
        return _run(options)
    except BenchError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"dpcomm.bench: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(0.5)  # torchrun ends the others at the first that fails: let rank 0 speak
        return 2


def _plot(options: argparse.Namespace) -> int:
    from dpcomm.bench.plot import plot

    output = options.output or options.input.with_suffix(".png")
    plot(options.input, output)
    print(f"wrote {output}")
    return 0


def _check_environment(arguments: list[str]) -> None:
    if importlib.util.find_spec("torch") is None:
        raise BenchError("the benchmark runs under torchrun and needs torch: pip install torch")
    missing = [
        n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ
    ]
    if missing:
        command = f"{LAUNCH} {shlex.join(arguments)}".strip()
        raise BenchError(
            f"{', '.join(missing)} not in the environment: ranks are started by torchrun, as in\n"
            f"  {command}"
        )


def _run(options: argparse.Namespace) -> int:
    import datetime

    import torch.distributed as dist

    from dpcomm.bench import backends as bench_backends

    try:
        sizes = options.sizes or sweep(
            options.minbytes, options.maxbytes, options.stepfactor, options.stepbytes
        )
    except ValueError as error:
        raise BenchError(str(error)) from error
    specs = bench_backends.expand(options.backends, options.wire, options.algo)
    timeout = datetime.timedelta(seconds=options.timeout)
    dist.init_process_group("gloo", timeout=timeout)  # for control only; idle while the clock runs
    try:
        if not 0 <= options.root < dist.get_world_size():
            raise BenchError(f"-r {options.root}: there are {dist.get_world_size()} ranks")
        backends = [
            bench_backends.create_backend(spec, options.wire_links, options.timeout)
            for spec in specs
        ]
        rows = _sweep(options, sizes, backends)
        for backend in backends:
            backend.close()
    finally:
        dist.destroy_process_group()
    return 1 if any(row["wrong"] for row in rows) else 0


def _sweep(options: argparse.Namespace, sizes: list[int], backends: list[Backend]) -> list[Row]:
    """All sizes of all dtypes and operations; rank 0 prints the table as it grows."""
    import torch.distributed as dist

    from dpcomm.bench import report, runner

    talks = dist.get_rank() == 0
    plan = runner.Plan(
        options.iters, options.loop_ms * 1e-3, options.warmup_iters, options.rounds, options.check
    )
    table = report.Table([b.spec.label for b in backends], options.cpu, options.min)
    reference = backends[-1].spec.label
    record = _record(options)
    work, notes = _supported(options, sizes, backends)
    if talks:
        report.print_out([*_about(record, options), *notes, "#", *table.header()])
    loops = sum(plan.rounds * len(b.placements(case)) for case, able in work for b in able)
    progress = Progress(loops, on=talks)
    rows: list[Row] = []
    try:
        for case, able in work:
            progress.describe(f"{case.collective} {case.dtype_name} {format_size(case.size_bytes)}")
            new = report.make_rows(case, runner.measure(case, able, plan, progress.tick), reference)
            rows += new
            if talks:
                with progress.hidden():
                    for backend in able:
                        mine = [row for row in new if row["backend"] == backend.spec.label]
                        report.print_out([table.line(mine)])
    finally:
        progress.close()
    if talks:
        report.print_out(table.footer(rows))
        if options.output is not None:
            report.save(options.output, record, rows)
            report.print_out([f"# wrote {options.output}"])
    return rows


def _supported(
    options: argparse.Namespace, sizes: list[int], backends: list[Backend]
) -> tuple[list[tuple[Case, list[Backend]]], list[str]]:
    """The cases with the backends that can run them, and a note on each pair that is skipped."""
    import torch.distributed as dist

    from dpcomm.bench.backends import unsupported_reason
    from dpcomm.bench.cases import Case

    ops = options.op if options.collective in ("all_reduce", "reduce_scatter") else ["none"]
    work: list[tuple[Case, list[Backend]]] = []
    skipped: dict[tuple[str, str], dict[str, list[str]]] = {}  # by backend and reason: op, dtypes
    for dtype in options.datatype:
        for op in ops:
            cases = [
                Case(options.collective, dtype, op, size, dist.get_world_size(), options.root)
                for size in sizes
            ]
            able = []
            for backend in backends:
                reason = unsupported_reason(backend, cases[0])
                if reason:
                    by_op = skipped.setdefault((backend.spec.label, reason), {})
                    by_op.setdefault(op, []).append(dtype)
                else:
                    able.append(backend)
            if able:
                work += [(case, able) for case in cases]
    notes = [f"# skipped: {label}, {_listed(by)}: {why}" for (label, why), by in skipped.items()]
    if not work:
        raise BenchError("nothing to measure:\n" + "\n".join(notes))
    return work, notes


def _listed(dtypes_by_op: dict[str, list[str]]) -> str:
    parts = []
    for op, dtypes in dtypes_by_op.items():
        parts.append(("" if op == "none" else f"{op} of ") + " ".join(dtypes))
    return "; ".join(parts)


def _record(options: argparse.Namespace) -> dict[str, Any]:
    import torch.distributed as dist

    from dpcomm.bench import report

    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, os.uname().nodename)
    shown = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    return report.run_record(dist.get_world_size(), len(set(hosts)), shown)


def _about(record: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """The lines over the table: where, what, and how to read it."""
    iterations = f"{options.iters} operations" if options.iters else f"{options.loop_ms:g} ms"
    lines = [
        f"# dpcomm {record['dpcomm']}, torch {record['torch']}, {options.collective}, "
        f"{record['world_size']} ranks on {record['hosts']} host(s)",
        f"# {record['host']}: {record['cpu']}, {record['cores']} cores, {record['system']}",
        f"# {options.rounds} rounds, in each of which the backends take turns in rotating order, "
        f"loops of {iterations}",
        "# time: slowest rank, median over rounds; n/a: the interface has no such form",
    ]
    if len(options.backends) > 1 or len(options.wire) > 1 or len(options.algo) > 1:
        lines.append("# ratio: time of the last backend over time of this one")
    if options.wire != ["native"]:
        lines.append("# #wrong: outside the documented error bound (lossy wire allowed)")
        if options.wire_links == "network" and record["hosts"] == 1:
            lines.append(
                "# one host: its links stay native; --wire-links all forces the wire format"
            )
    else:
        lines.append("# #wrong: not exactly the expected small integers")
    return lines
