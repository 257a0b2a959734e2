"""Trains the digits of train_digits.py on gloo, on dpcomm, and on dpcomm with an fp16 wire.

    python examples/demo.py            (or `make demo`, which sets everything up first)

Two ranks under torchrun. The variants are replicas of one network in the same processes, each on a
process group of its own, and take turns at every step in rotating order: whatever else the machine
does meets all of them alike. Prints one table and writes demo_output/demo.png.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RANKS = 2
DEADLINE_S = 300
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "gloo": ("gloo", {}),
    "dpcomm": ("dpcomm", {}),
    "dpcomm, fp16 wire": ("dpcomm", {"wire": "fp16", "wire_links": "all"}),
}
Result = dict[str, Any]


class DemoError(Exception):
    """The demo cannot run, or what came out is wrong."""


# In each rank ------------------------------------------------------------------------------------


def train_variants(names: list[str], epochs: int, seed: int, pairs: int) -> dict[str, Result]:
    """Trains all variants step by step in turn, then measures their communication."""
    import torch
    import torch.distributed as dist
    from train_digits import Trainer, batches, datasets

    from dpcomm.bench.ddp import Replica, silent, step_costs
    from dpcomm.bench.progress import Progress

    dist.init_process_group("gloo")  # to gather the results
    torch.use_deterministic_algorithms(True)
    train, held_out = datasets()
    trainers = [Trainer(seed, _group(*VARIANTS[name])) for name in names]
    losses: list[list[float]] = [[] for _ in names]
    seconds: list[list[float]] = [[] for _ in names]
    progress = Progress(epochs, on=dist.get_rank() == 0)
    progress.describe("training")
    turn = 0
    for epoch in range(epochs):
        for batch in batches(train, epoch, seed):
            for i in _rotated(len(names), turn):
                start = time.perf_counter()
                losses[i].append(trainers[i].step(*batch))
                seconds[i].append(time.perf_counter() - start)
            turn += 1
        progress.tick()
    progress.describe("measuring")
    results = [
        {
            "accuracy": accuracy,
            "loss": loss,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "checksum": _checksum(trainer.model),
            "losses": losses[i],
            "step_ms": 1e3 * statistics.median(seconds[i][len(seconds[i]) // 10 :]),
        }
        for i, trainer in enumerate(trainers)
        for accuracy, loss in [trainer.evaluate(held_out)]
    ]
    results = _over_ranks(results)
    replicas = [Replica(t.model, functools.partial(t.backward, *batch)) for t in trainers]
    alone = Trainer(seed)  # what DDP itself costs, which is no backend's
    alone.model = silent(alone.model.module)
    alone.step(*batch)  # DDP rebuilds its buckets after the first step
    replicas.append(Replica(alone.model, functools.partial(alone.backward, *batch)))
    *costs, ddp = step_costs(replicas, pairs)
    for result, cost in zip(results, costs, strict=True):
        result["cpu_ms"] = cost.cpu_ms - ddp.cpu_ms
        result["cpu_error_ms"] = math.hypot(cost.cpu_error_ms, ddp.cpu_error_ms)
    progress.close()
    return dict(zip(names, results, strict=True))


def _group(backend: str, options: dict[str, str]) -> Any:
    import torch.distributed as dist

    import dpcomm

    pg_options = dpcomm.Options(**options) if options else None
    return dist.new_group(backend=backend, pg_options=pg_options)


def _rotated(n: int, turn: int) -> list[int]:
    return [(turn + i) % n for i in range(n)]


def _checksum(model: Any) -> int:
    """A hash of the bits of all parameters."""
    import hashlib

    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return int.from_bytes(digest.digest()[:6], "big")


def _over_ranks(results: list[Result]) -> list[Result]:
    """The slowest rank's step time, the mean loss, and whether all parameters are equal."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, results)
    merged = []
    for parts in zip(*gathered, strict=True):
        merged.append(
            {
                **parts[0],
                "same_on_all_ranks": len({part["checksum"] for part in parts}) == 1,
                "step_ms": max(part["step_ms"] for part in parts),
                "losses": [
                    statistics.mean(values)
                    for values in zip(*(part["losses"] for part in parts), strict=True)
                ],
            }
        )
    return merged


# In the command ----------------------------------------------------------------------------------


def launch(names: list[str], arguments: argparse.Namespace, result_file: Path) -> dict[str, Result]:
    """Runs the ranks under torchrun and reads what they found.

    Raises:
        DemoError: if a rank fails or the deadline passes.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={RANKS}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += [__file__, "--worker", str(result_file), "--variants", ";".join(names)]
    command += ["--epochs", str(arguments.epochs), "--seed", str(arguments.seed)]
    command += ["--pairs", str(arguments.pairs)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    result_file.unlink(missing_ok=True)
    process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        process.wait()
        raise DemoError(f"the ranks did not finish within {DEADLINE_S} s") from None
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status != 0:
        raise DemoError(f"a rank failed (torchrun's status {status}); its error is above")
    results: dict[str, Result] = json.loads(result_file.read_text())
    return results


def verify(results: dict[str, Result]) -> None:
    """Holds the results to what must be true.

    Raises:
        DemoError: naming the variant and what is wrong with it.
    """
    for name, result in results.items():
        if not all(math.isfinite(loss) for loss in result["losses"]):
            raise DemoError(f"{name}: the training loss is not finite")
        if not result["same_on_all_ranks"]:
            raise DemoError(f"{name}: the ranks ended with different parameters")
        if result["accuracy"] < 0.95:
            raise DemoError(f"{name}: only {result['accuracy']:.1%} of held-out digits are right")
    exact = {results[name]["checksum"] for name in ("gloo", "dpcomm") if name in results}
    if len(exact) > 1:
        raise DemoError("dpcomm's parameters differ from gloo's; with two ranks no bit may")


def print_table(results: dict[str, Result]) -> None:
    """One table on stdout."""
    base = next(iter(results.values()))
    header = ("", "accuracy", "loss", "step", "", "communication CPU", "")
    units = ("", "held out", "held out", "ms", "", "ms per step", "")
    lines = [header, units]
    for name, r in results.items():
        lines.append(
            (
                name,
                f"{r['accuracy']:.1%}",
                f"{r['loss']:.4f}",
                f"{r['step_ms']:.2f}",
                f"{r['step_ms'] / base['step_ms']:.2f}x",
                _cpu_text(r),
                _cpu_ratio(r, base),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    for number, line in enumerate(lines):
        if number in (0, 2):
            print(rule)
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
    print(rule)
    if any(_cpu_text(r).startswith("<") for r in results.values()):
        print("<: less than the noise of the measurement")
    print(
        f"x: times {next(iter(results))}'s; {RANKS} ranks, "
        f"{base['parameters'] / 1e6:.1f} M parameters, {len(base['losses'])} steps"
    )


def _at_most(result: Result) -> float:
    """The most that communication CPU may be. A difference of noisy times, it can come out as 0."""
    most: float = max(result["cpu_ms"], 0.0) + 2 * result["cpu_error_ms"]
    return most


def _is_seen(result: Result) -> bool:
    return bool(result["cpu_ms"] > 2 * result["cpu_error_ms"])


def _cpu_text(result: Result) -> str:
    if math.isinf(result["cpu_error_ms"]):
        return "-"  # too few pairs to know
    return f"{result['cpu_ms']:.2f}" if _is_seen(result) else f"<{_at_most(result):.2f}"


def _cpu_ratio(result: Result, base: Result) -> str:
    if not _is_seen(base) or math.isinf(result["cpu_error_ms"]):
        return "-"
    if _is_seen(result):
        return f"{result['cpu_ms'] / base['cpu_ms']:.2f}x"
    return f"<{_at_most(result) / base['cpu_ms']:.2f}x"


def draw(results: dict[str, Result], target: Path) -> None:
    """Loss curves, step time and communication CPU time, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = ("#d9822b", "#1b6ca8", "#3a8f5c")
    style: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), width_ratios=(1.6, 1, 1))
        for i, (name, result) in enumerate(results.items()):
            curve = _smooth(result["losses"])
            line = ("-", (0, (5, 4)), (0, (1, 2)))[i % 3]  # curves lie on each other
            axes[0].plot(curve, color=colors[i % 3], linestyle=line, linewidth=2, label=name)
        axes[0].set_yscale("log")
        axes[0].set_xlabel("step")
        axes[0].legend(frameon=False)
        axes[0].set_title("training loss (mean of 20 steps)", loc="left", fontsize=9)
        times = [result["step_ms"] for result in results.values()]
        _bars(axes[1], results, times, [f"{t:.2f}" for t in times], "step time (ms)", colors)
        costs = [r["cpu_ms"] if _is_seen(r) else _at_most(r) for r in results.values()]
        costs = [cost if math.isfinite(cost) else 0.0 for cost in costs]
        texts = [_cpu_text(result) for result in results.values()]
        _bars(axes[2], results, costs, texts, "communication CPU (ms per step)", colors)
        figure.tight_layout()
        figure.savefig(target, dpi=150)
        pyplot.close(figure)


def _smooth(losses: list[float], width: int = 20) -> list[float]:
    return [statistics.mean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]


def _bars(
    axis: Any,
    results: dict[str, Result],
    values: list[float],
    texts: list[str],
    title: str,
    colors: Any,
) -> None:
    labels = [name.replace(", ", ",\n") for name in results]
    bars = axis.bar(labels, values, color=colors[: len(values)], width=0.6)
    axis.bar_label(bars, labels=texts, padding=2)
    axis.set_title(title, loc="left", fontsize=9)
    axis.set_ylim(0, 1.15 * max(*values, 1e-3))
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.tick_params(axis="x", length=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=20, help="(20)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--pairs", type=int, default=60, help="steps with and without synchronisation (60)"
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="a folder")
    parser.add_argument("--variants", default=";".join(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.variants.split(";")
    if arguments.worker:
        import torch.distributed as dist

        results = train_variants(names, arguments.epochs, arguments.seed, arguments.pairs)
        if dist.get_rank() == 0:
            arguments.worker.write_text(json.dumps(results))
        dist.destroy_process_group()
        return 0
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        print(f"training {len(names)} variants on {RANKS} ranks, step by step in turn", flush=True)
        results = launch(names, arguments, arguments.output / "demo.json")
        verify(results)
        print_table(results)
        draw(results, arguments.output / "demo.png")
        print(f"wrote {arguments.output / 'demo.png'}")
    except DemoError as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
