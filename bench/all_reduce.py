"""Makes the README's table: all_reduce of float32, dpcomm against gloo, 2 and 4 ranks.

    python bench/all_reduce.py                 prints the table (Markdown)
    python bench/all_reduce.py --check         and fails if a figure is missed

A thin wrapper of `torchrun ... -m dpcomm.bench`, one run for each number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from dpcomm.bench.units import format_size, parse_size

SIZES = "8,1K,32K,256K,1M,4M,25M,100M"
# Times faster than gloo, at least: (up to this size, ratio) in order; above the last size, 1.
GOALS = {2: ((2**15, 20.0), (2**20, 8.0), (25 * 2**20, 5.0)), 4: ()}


def run(ranks: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of the benchmark; returns its JSON."""
    target = arguments.output / f"all_reduce_{ranks}.json"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    command += ["-m", "dpcomm.bench", "--backends", arguments.backends, "--sizes", arguments.sizes]
    command += ["--rounds", str(arguments.rounds), "--loop-ms", str(arguments.loop_ms)]
    command += ["--cpu", "--output", str(target)]
    subprocess.run(
        command,
        check=True,
        timeout=arguments.deadline,
        env={"OMP_NUM_THREADS": "1", **os.environ},
        stdout=None if arguments.verbose else subprocess.DEVNULL,
    )
    result: dict[str, Any] = json.loads(target.read_text())
    return result


def goal(ranks: int, size_bytes: int) -> float:
    """The ratio that has to be reached."""
    return next((ratio for limit, ratio in GOALS.get(ranks, ()) if size_bytes <= limit), 1.0)


def table(results: dict[int, dict[str, Any]], fast: str, slow: str) -> list[str]:
    """Markdown: a row for each size; times of both and the ratio, for each number of ranks."""
    heads = [f"{n} ranks: {slow} | {fast} | ratio" for n in results]
    lines = [f"| size | {' | '.join(heads)} |", "|---:|" + "---:|" * (3 * len(results))]
    sizes = list(dict.fromkeys(row["size_bytes"] for row in next(iter(results.values()))["rows"]))
    for size in sizes:
        cells = [format_size(size)]
        for result in results.values():
            rows = {r["backend"]: r for r in result["rows"] if r["size_bytes"] == size}
            cells += [_time(rows[slow]["time_us"]), _time(rows[fast]["time_us"])]
            cells.append(f"**{rows[fast]['ratio']:.1f}x**")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _time(microseconds: float) -> str:
    if microseconds >= 1000:
        return f"{microseconds / 1000:.3g} ms"
    return f"{microseconds:.3g} µs"


def misses(results: dict[int, dict[str, Any]], fast: str) -> list[str]:
    """What falls short of a goal or is wrong."""
    found = []
    for ranks, result in results.items():
        for row in result["rows"]:
            what = f"{row['backend']}, {ranks} ranks, {format_size(row['size_bytes'])}"
            if row["wrong"] != 0:
                found.append(f"{what}: {row['wrong']} wrong elements")
            if row["backend"] == fast and row["ratio"] < goal(ranks, row["size_bytes"]):
                found.append(f"{what}: {row['ratio']}x, not {goal(ranks, row['size_bytes'])}x")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", default="2,4", help="numbers of ranks (2,4)")
    parser.add_argument("--backends", default="dpcomm,gloo", help="two of dpcomm.bench's")
    parser.add_argument("--sizes", default=SIZES, help=f"({SIZES})")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--loop-ms", type=float, default=50)
    parser.add_argument("--deadline", type=float, default=600, help="seconds of one run (600)")
    parser.add_argument("--output", type=Path, default=Path("bench_output"), help="folder of JSON")
    parser.add_argument("--check", action="store_true", help="fail if a figure is missed")
    parser.add_argument("--verbose", action="store_true", help="show the benchmark's own tables")
    arguments = parser.parse_args()
    for size in arguments.sizes.split(","):
        parse_size(size)
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        results = {n: run(n, arguments) for n in map(int, arguments.ranks.split(","))}
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 2
    fast, slow = arguments.backends.split(",")
    print("\n".join(table(results, fast, slow)))
    record = next(iter(results.values()))
    print(
        f"\nfloat32, in place, `dist.all_reduce`, median of {arguments.rounds} interleaved rounds, "
        f"slowest rank; {record['cores']} cores ({record['cpu']}), torch {record['torch']}."
    )
    short = misses(results, fast)
    for line in short:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if short and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
