"""all_reduce on one host: dpcomm against every peer that is installed.

    make peers                                   installs them, each into its own environment
    python bench/peers.py --json x.json --plot x.png     all sizes, 2 and 4 ranks (minutes)
    python bench/peers.py --quick                a look, in less than a minute

Every peer has its own group of processes, which lives through the run. They take turns in rounds:
one measures, all others are stopped. docs/benchmark.md says what is measured and how to read it.

The exit status is 1 if a result was wrong or a peer failed, 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peer_report
from peer_groups import HOME, PEERS, Group, GroupError, Peer, end_processes
from peer_load import OthersLoad

import dpcomm
from dpcomm.bench.units import format_size, parse_size

SIZES = "8,1K,32K,256K,1M,4M,25M,100M"
QUICK_SIZES = "8,32K,1M,25M"
LEAST_ROUNDS = 3  # of a peer that is too slow for all of them
BUSY = 0.05  # other processes' share of the cores that is worth a note
LEAST_COPIED = 64 * 2**10  # below, copies do not leave the caches


@dataclass
class Plan:
    """How much is measured."""

    sizes: list[int]
    rounds: int
    batch_s: float  # how long one peer's loop in one round takes, about
    start_s: float = 60  # deadlines: of a group's start
    answer_s: float = 30  # of one order
    least_calls: int = 2
    pin: bool = False


class OutOfTimeError(Exception):
    """--limit is over."""


class Bench:
    """One run: groups of one number of ranks after another."""

    def __init__(self, peers: list[Peer], plan: Plan, environments: Path) -> None:
        self._peers, self._plan, self._environments = peers, plan, environments
        self._mark = uuid.uuid4().hex[:12]
        self._folder = Path(tempfile.mkdtemp(prefix="dpcomm-peers-"))
        self._groups: list[Group] = []
        self.failed = False

    def close(self) -> None:
        """Ends every process of the run and removes its files, whatever has happened."""
        for group in self._groups:
            with contextlib.suppress(Exception):
                group.kill()
        end_processes(self._mark)
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, ranks: int, record: dict[str, Any]) -> None:
        """All sizes with that many ranks; fills `record`, which holds what there is at any time."""
        record |= {"ranks": ranks, "cores": len(os.sched_getaffinity(0)), "rows": []}
        record |= {"peers": [], "skipped": []}
        groups = self._start(ranks, record["skipped"])
        record["peers"] = [{"peer": g.peer.name, "version": g.version} for g in groups]
        for size in self._plan.sizes:
            record["rows"] += self._measure(groups, size, record["skipped"])
        for group in groups:
            group.close()
        self._groups = []

    def _start(self, ranks: int, skipped: list[dict[str, str]]) -> list[Group]:
        started = []
        for i, peer in enumerate(self._peers):
            reason = peer.missing(self._environments)
            began = time.monotonic()
            if not reason:
                folder = self._folder / f"{ranks}-{i}"
                group = Group(peer, ranks, folder, self._environments, self._mark, self._plan.pin)
                self._groups.append(group)
                try:
                    group.start(self._plan.start_s, max(self._plan.sizes))
                    started.append(group)
                    _say(f"{peer.name}: started in {time.monotonic() - began:.1f} s")
                except GroupError as error:
                    group.kill()
                    reason = f"does not start: {error}"
                    self.failed = True
            if reason:
                skipped.append({"peer": peer.name, "reason": reason})
                _say(f"skipped: {peer.name}: {reason}")
        return started

    def _measure(
        self, groups: list[Group], size: int, skipped: list[dict[str, str]]
    ) -> list[dict[str, Any]]:
        began = time.monotonic()
        load = OthersLoad(pid for group in groups for pid in group.pids)
        turns = [Turn(group, size, self._plan) for group in groups if _fits(group.peer, size)]
        steps = [Turn.check, *[Turn.measure] * self._plan.rounds]
        for number, step in enumerate(steps):
            shift = number % max(1, len(turns))
            for turn in turns[shift:] + turns[:shift]:
                try:
                    with turn.group.running():
                        step(turn)
                except GroupError as error:
                    reason = f"failed at {format_size(size)}: {error}"
                    skipped.append({"peer": turn.group.peer.name, "reason": reason})
                    _say(f"{turn.group.peer.name} {reason}")
                    self.failed = True
                    turn.group.kill()
                    groups.remove(turn.group)
                    turns = [other for other in turns if other is not turn]
        for turn in turns:
            if turn.wrong:
                self.failed = True
                _say(f"wrong: {turn.group.peer.name}, {format_size(size)}: {turn.wrong} elements")
        others = load.share()
        note = f"; other work took {others:.0%} of the cores" if others and others > BUSY else ""
        _say(f"{format_size(size)}: {time.monotonic() - began:.1f} s{note}")
        return [{**turn.row(), "others_load": others} for turn in turns]


class Turn:
    """One peer at one size."""

    def __init__(self, group: Group, size: int, plan: Plan) -> None:
        self.group, self._size, self._plan = group, size, plan
        self._rounds: list[dict[str, float]] = []
        self._calls, self._warmup = plan.least_calls, 1
        self._limit, self._last, self._fastest = 0, float("inf"), float("inf")
        self._spent_s = 0.0
        self.wrong = 0

    def check(self) -> None:
        """One call's result against what it must be; then how many calls a loop gets."""
        answers = self._ask(do="check", seed=self._size % 1000)
        self.wrong += sum(answer["wrong"] for answer in answers)
        self._limit = min(answer["limit"] for answer in answers)
        for _ in range(6):  # the fastest of some loops, each longer than the last, tells how many
            calls = self._calls
            self._time()
            self._choose_calls()
            if self._calls < 2 * calls:
                break

    def measure(self) -> None:
        """One round; none where the first ones took ten times what all of them should."""
        allowed_s = 10 * self._plan.rounds * self._plan.batch_s
        if self.wrong or (self._spent_s > allowed_s and len(self._rounds) >= LEAST_ROUNDS):
            return
        began = time.monotonic()
        self._rounds.append(self._time())
        self._spent_s += time.monotonic() - began
        self._choose_calls()

    def _choose_calls(self) -> None:
        """As many as fill a batch by the fastest loop so far; in steps, as one loop may mislead."""
        if (
            self._last * self._calls > 3 * self._plan.batch_s
        ):  # the rule here, or somebody disturbed
            self._calls //= 4
        else:
            wanted = min(int(self._plan.batch_s / self._fastest), self._limit * 3 // 4)
            self._calls = max(self._calls, min(wanted, 10 * self._calls))
        self._calls = max(self._plan.least_calls, self._calls)
        # Caches, predictors and the scheduler find back into a group that stood still.
        self._warmup = max(1, self._calls // 5)

    def _time(self) -> dict[str, float]:
        answers = self._ask(do="time", calls=self._calls, warmup=self._warmup)
        self.wrong += sum(answer["wrong"] for answer in answers)
        if self.group.peer.calls == "copy":  # ranks do not wait for each other
            whole = max(a["ended"] for a in answers) - min(a["began"] for a in answers)
        else:
            whole = max(answer["ended"] - answer["began"] for answer in answers)
        seconds = max(whole, 1e-9) / self._calls
        self._last, self._fastest = seconds, min(self._fastest, seconds)
        cpu = max(answer["cpu"] for answer in answers)
        return {"seconds": seconds, "cpu": cpu / self._calls}

    def _ask(self, **order: Any) -> list[dict[str, Any]]:
        return self.group.ask({**order, "bytes": self._size}, self._plan.answer_s)

    def row(self) -> dict[str, Any]:
        """The result. Where an element was wrong there is no time."""
        name = self.group.peer.name
        if self.wrong:
            empty = dict.fromkeys(("time_us", "min_us", "cpu_us", "algbw_gbps", "busbw_gbps"))
            row = {"peer": name, "size_bytes": self._size, **empty, "calls": self._calls}
            return {**row, "wrong": self.wrong, "rounds_us": []}
        return peer_report.make_row(name, self._size, self.group.size, self._calls, self._rounds)


def _fits(peer: Peer, size: int) -> bool:
    return peer.calls != "copy" or size >= LEAST_COPIED


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Turns SIGTERM and the end of the time into exceptions, so that everything is ended."""

    def end(number: int, _: object) -> None:
        if number == signal.SIGALRM:
            raise OutOfTimeError
        raise SystemExit(f"ended by {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def benchmark(
    peers: list[Peer], ranks: list[int], plan: Plan, environments: Path, limit_s: float = 1200
) -> tuple[dict[str, Any], bool]:
    """The whole benchmark. Returns its JSON, and whether all was right and no peer failed."""
    bench = Bench(peers, plan, environments)
    record: dict[str, Any] = {
        "format": 1,
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "dpcomm": dpcomm.__version__,
        "options": {"rounds": plan.rounds, "batch_ms": plan.batch_s * 1e3, "pin": plan.pin},
        "runs": [],
    }
    with _limited(limit_s):
        try:
            for count in ranks:
                _say(f"{count} ranks")
                record["runs"].append({})
                bench.run(count, record["runs"][-1])
        except OutOfTimeError:
            _say(f"not finished in {limit_s:.0f} s (--limit)")
            bench.failed = True
        finally:
            bench.close()
    for run in record["runs"]:
        peer_report.add_comparisons(run)
    return record, not bench.failed


def _arguments() -> argparse.Namespace:
    known = ", ".join(repr(peer.name) for peer in PEERS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", help="numbers of ranks (2,4; with --quick 2)")
    parser.add_argument("--sizes", help=f"bytes, with K or M ({SIZES})")
    parser.add_argument("--peers", help=f"some of {known}; separated by ';' (all)")
    parser.add_argument("--rounds", type=int, help="(21)")
    parser.add_argument("--batch-ms", type=float, help="of one peer's loop in a round (30)")
    parser.add_argument("--quick", action="store_true", help=f"5 rounds of 10 ms, {QUICK_SIZES}")
    parser.add_argument(
        "--pin", action="store_true", help="each rank to a core, where they suffice"
    )
    parser.add_argument("--limit", type=float, default=1200, help="seconds of the whole (1200)")
    parser.add_argument("--json", type=Path, help="write everything, each round too")
    parser.add_argument("--plot", type=Path, help="draw time and ratio (PNG, SVG, PDF)")
    default = Path(os.environ.get("PEERS", HOME / "build/peers"))
    parser.add_argument("--environments", type=Path, default=default, help="where `make peers` put")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    quick = arguments.quick
    sizes = [
        parse_size(s) for s in (arguments.sizes or (QUICK_SIZES if quick else SIZES)).split(",")
    ]
    if any(size < 8 or size % 4 for size in sizes):
        print("--sizes takes whole numbers of float32, 8 bytes at least", file=sys.stderr)
        return 2
    plan = Plan(
        sizes,
        arguments.rounds or (5 if quick else 21),
        (arguments.batch_ms or (10 if quick else 30)) / 1e3,
        pin=arguments.pin,
    )
    names = [name.strip() for name in arguments.peers.split(";")] if arguments.peers else None
    unknown = set(names or ()) - {peer.name for peer in PEERS}
    if unknown:
        print(f"--peers: nobody is called {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    peers = [peer for peer in PEERS if names is None or peer.name in names]
    ranks = [int(text) for text in (arguments.ranks or ("2" if quick else "2,4")).split(",")]
    record, well = benchmark(peers, ranks, plan, arguments.environments, arguments.limit)
    for run in record["runs"]:
        print("\n".join(peer_report.tables(run)) + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.plot:
        peer_report.plot(record, arguments.plot)
    if not any(run["rows"] for run in record["runs"]):
        return 2
    return 0 if well else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
