"""One fault in one phase of a group's life, through one surface, and what has to hold after it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ranks import LATE_S, Outcome, Rank, Stage
from surfaces import Surface, draw_call, end_all

# Seconds that an operation may take, and a start with a fault; one without has PATIENCE.
LIMIT = float(os.environ.get("FAULT_LIMIT", "1.5"))
START_LIMIT = 2 * LIMIT
PATIENCE = 20.0
PHASES = ["start-up", "mid-message", "between operations", "in an operation", "shutdown"]
KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)
# What the library promises after a death, and beyond the time limit for one that is stopped.
PROMISE_S = 1.0


@dataclass
class Row:
    """What was seen of one phase and fault."""

    cases: int = 0
    survivors: int = 0
    raised: int = 0
    named: int = 0
    same: int = 0  # cases in which all survivors had the same text
    seconds: list[float] = field(default_factory=list)  # beyond the limit, for one that is stopped
    leaks: int = 0  # descriptors, threads, mappings


class Table:
    """What a run of cases has seen."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], Row] = defaultdict(Row)

    def perfect(self) -> bool:
        return all(
            row.raised == row.named == row.survivors and row.same == row.cases and row.leaks == 0
            for row in self.rows.values()
        )

    def __str__(self) -> str:
        lines = [
            f"{'surface':13}{'phase':20}{'fault':10}{'cases':>6}{'survivors':>10}{'raised':>8}"
            f"{'named':>7}{'one text':>9}{'median':>9}{'max':>8}{'late':>6}{'leaks':>7}"
        ]
        total = Row()
        for key in sorted(self.rows):
            row = self.rows[key]
            lines.append(f"{key[0]:13}{key[1]:20}{key[2]:10}" + self._numbers(row))
            for name in vars(row):
                setattr(total, name, getattr(total, name) + getattr(row, name))
        return "\n".join([*lines, f"{'all':43}" + self._numbers(total)])

    @staticmethod
    def _numbers(row: Row) -> str:
        times = sorted(row.seconds) or [0.0]
        late = sum(each > PROMISE_S for each in times)
        return (
            f"{row.cases:6}{row.survivors:10}{row.raised:8}{row.named:7}{row.same:9}"
            f"{times[len(times) // 2]:7.2f} s{times[-1]:6.2f} s{late:6}{row.leaks:7}"
        )


class Case:
    """A case; what is not given is drawn from the seed.

    Args:
        fault: "kill", "stop", "mismatch" (the victim calls something else) or "absent" (it does
            not call).
    """

    def __init__(self, seed: int, surface: Surface, **given: Any) -> None:
        draw = self._draw = random.Random(seed)
        self.surface = surface
        self.world: int = draw.choice([2, 3, 4])
        self.phase: str = draw.choice(PHASES)
        self.fault: str = draw.choice(["kill", "kill", "stop"])
        self.late: float = LATE_S  # seconds after which an error has not come in time
        vars(self).update(given)
        self.victim = draw.randrange(self.world)
        self.call = draw_call(draw, surface, self.world)
        # Asynchronous calls; Communicator has no asynchronous barrier.
        self.later = draw.random() < 0.5 and (
            surface.name != "Communicator" or self.call["name"] != "barrier"
        )
        self.message = draw.randrange(1, 9)
        self.delay = draw.uniform(0, 0.05)
        self.in_start_over = False  # the fault of a start came too late for it
        self.key = draw.choice(surface.start_keys(self.victim) or [None])
        self.straggler = draw.random() < 0.5  # one that is stopped goes on while others begin anew
        shown = {key: each for key, each in vars(self).items() if key not in ("_draw", "surface")}
        self.text = f"seed {seed}, {surface.name}: {shown}"

    def run(self, stage: Stage, table: Table) -> None:
        self.row = table.rows[self.surface.name, self.phase, self.fault]
        with stage.group(self.world) as group:
            self.group = group
            self.ranks = list(group)
            self.survivors = group.others(self.victim)
            self.surface.prepare(group)
            self.before = {rank.number: rank.do("leftovers") for rank in group}
            self.since = time.monotonic()
            self.texts: dict[int, str] = {}
            {
                "start-up": self.in_start,
                "shutdown": self.in_shutdown,
            }.get(self.phase, self.in_operations)()
            self.row.cases += 1
            self.row.survivors += len(self.survivors)
            self.clean()

    # --- faults --------------------------------------------------------------------------------

    @property
    def target(self) -> Rank:
        return self.group[self.victim]

    def start(self, **options: Any) -> None:
        self.surface.begin_start(self.group, self.ranks, PATIENCE, LIMIT, **options)
        for outcome in end_all(self.ranks):
            assert outcome.error is None, outcome

    def strike(self) -> None:
        """Kills or stops the victim, if the fault is one of these."""
        if self.fault not in ("kill", "stop"):
            return
        self.target.signal(KILL if self.fault == "kill" else STOP)
        assert self.target.ended() if self.fault == "kill" else self.target.stopped()
        self.target.dead = self.fault == "kill"
        self.since = time.monotonic()

    def in_start(self) -> None:
        if self.fault == "absent":
            self.surface.begin_start(
                self.group, self.survivors, START_LIMIT, LIMIT, worlds=self.worlds()
            )
        elif self.fault == "mismatch":
            self.surface.begin_start(
                self.group, self.ranks, START_LIMIT, LIMIT, worlds=self.odd_worlds()
            )
        else:
            number = KILL if self.fault == "kill" else STOP
            deadly = None if self.key is None else {self.victim: (*self.key, number)}
            self.surface.begin_start(self.group, self.ranks, START_LIMIT, LIMIT, deadly=deadly)
            self.strike_in_start()
        outcomes = end_all(self.survivors)
        if all(outcome.error is None for outcome in outcomes):  # the start was over before
            self.in_start_over = True
            self.since = time.monotonic()
            for rank in self.survivors:
                self.surface.begin(rank, {"name": "all_reduce", "count": 100})
            outcomes = end_all(self.survivors)
        error = {"kill": None, "mismatch": None}.get(self.fault, "TimeoutError")
        if self.fault == "mismatch":
            outcomes += [self.target.end()]
        self.judge(outcomes, error, in_start=True)

    def worlds(self) -> dict[int, int]:
        return {rank.number: self.world for rank in self.ranks}

    def odd_worlds(self) -> dict[int, int]:
        return self.worlds() | {self.victim: self.world + 1}

    def strike_in_start(self) -> None:
        began = time.monotonic()
        if self.key is None:
            time.sleep(self.delay * 2)
            self.strike()
        else:
            assert self.target.ended() if self.fault == "kill" else self.target.stopped()
            self.target.dead = self.fault == "kill"
            self.since = time.monotonic()
        if self.fault == "stop":
            self.since = began

    def in_operations(self) -> None:
        verb = {"kill": "kill", "stop": "stop"}.get(self.fault)
        in_message = self.phase == "mid-message" and verb is not None
        faults = {"DPCOMM_FAULTS": f"rank={self.victim},{verb}={self.message}"}
        self.start(environment=faults if in_message else {})
        if not in_message:
            for rank in self.ranks:
                self.surface.begin(rank, {"name": "barrier", "count": 1})
            for outcome in end_all(self.ranks):
                assert outcome.error is None, outcome
        if self.phase == "between operations":
            self.strike()
        elif self.fault in ("kill", "stop"):
            self.surface.begin(self.target, self.call)
        callers = list(self.survivors)
        if self.fault == "mismatch":
            odd = {"name": "all_reduce", "count": 999 if self.phase != "mid-message" else 999_999}
            self.call = odd | {"count": odd["count"] + 1}
            self.surface.begin(self.target, odd)
        self.since = time.monotonic()
        for rank in callers:
            (self.surface.submit if self.later else self.surface.begin)(rank, self.call)
        if self.phase != "between operations":
            time.sleep(self.delay)
            self.strike()  # also in a message, if it had fewer to send
        self.finish(callers)

    def finish(self, callers: list[Rank]) -> None:
        """The callers' errors. Who could finish has its own in the next call."""
        if self.later:
            for rank in callers:
                self.surface.begin_wait(rank)
        outcomes = [outcome for outcome in end_all(callers) if outcome.error is not None]
        if not outcomes:
            self.since = time.monotonic()
        for rank in callers:
            self.surface.begin(rank, {"name": "all_reduce", "count": 100})
        outcomes += end_all(callers)
        if self.fault == "mismatch":
            outcomes += [outcome for outcome in [self.target.end()] if outcome.error is not None]
        error = {"kill": "PeerError", "mismatch": "UsageError"}.get(self.fault, "TimeoutError")
        self.judge(outcomes, error)

    def in_shutdown(self) -> None:
        """The victim dies or stops while all leave, with an operation in flight for the others.

        Whoever leaves waits for nobody; what was in flight ends with an error of its own. A victim
        that leaves alone ("mismatch") is everybody's PeerError.
        """
        self.start()
        if self.fault == "mismatch":
            self.surface.begin_close(self.target)
            assert self.target.end().error is None
            self.since = time.monotonic()
            for rank in self.survivors:
                self.surface.begin(rank, {"name": "all_reduce", "count": 100})
            self.judge(end_all(self.survivors), "PeerError")
            return
        for rank in self.survivors:
            self.surface.submit(rank, {"name": "all_reduce", "count": 1000})
        if self.fault != "absent":
            self.surface.begin_close(self.target)
            time.sleep(self.delay / 10)
            self.strike()
        self.since = time.monotonic()
        for rank in self.survivors:
            self.surface.begin_close(rank)
        for outcome in end_all(self.survivors):
            assert outcome.error is None, outcome
        took = time.monotonic() - self.since
        assert took < self.late, f"leaving took {took:.2f} s"
        for rank in self.survivors:
            self.surface.begin_wait(rank)
        outcomes = end_all(self.survivors)
        for outcome in outcomes:
            assert outcome.error == "PeerError", outcome
        self.row.raised += len(outcomes)
        self.row.named += len(outcomes)  # each tells of itself, or of the victim
        self.row.same += 1
        self.row.seconds.append(took)

    # --- what has to hold ----------------------------------------------------------------------

    def judge(self, outcomes: list[Outcome], error: str | None, in_start: bool = False) -> None:
        took = time.monotonic() - self.since
        limit = START_LIMIT if in_start and not self.in_start_over else LIMIT
        if self.fault in ("stop", "absent"):
            took -= limit
        for outcome in outcomes:
            assert outcome.error == error or (
                error is None and outcome.error in ("PeerError", "TimeoutError", "UsageError")
            ), outcome
        texts = {outcome.text for outcome in outcomes}
        assert len(texts) == 1, "not one text:\n" + "\n".join(sorted(texts))
        text = texts.pop()
        late = in_start and "did not come" in text  # it was killed before it had come
        if late and self.fault == "kill":
            took -= limit
        assert took < self.late, f"{took:.2f} s: {text}"
        known = f"rank {self.victim} " if late and self.fault != "mismatch" else self.target.name
        if late and f"ranks {self.victim}" in text:
            known = "ranks"
        assert known in text, f"{known} is not in {text!r}"
        if not in_start:
            self.expect_whole(text)
        raised = {outcome.rank for outcome in outcomes} - {self.victim}
        self.row.raised += len(raised)
        self.row.named += len(raised)
        self.row.same += 1
        self.row.seconds.append(max(took, 0.0))

    def expect_whole(self, text: str) -> None:
        """Every rank has its line: pid, host, whether it arrived, and what it finished last."""
        first, *lines = text.split("\n")
        assert " #" in first, first
        assert len(lines) == self.world, text
        for rank, line in zip(self.ranks, lines, strict=True):
            assert line.startswith(f"  {rank.name}: "), line
            assert "arrived" in line or "did not arrive" in line, line
            assert "finished last: " in line or "no operation yet" in line, line

    def clean(self) -> None:
        """Nothing is left, and the survivors make another group, whatever the victim does."""
        straggles = self.fault == "stop" and self.straggler
        if straggles:
            self.target.signal(signal.SIGCONT)
            self.target.end()  # it learns of its failure, or of the end of its start
            self.surface.begin(self.target, {"name": "all_reduce", "count": 500})
        elif self.fault == "stop":
            self.target.signal(KILL)
            assert self.target.ended()
        if not self.target.dead and self.fault in ("kill", "stop"):
            self.target.dead = self.fault == "kill" or not straggles
        self.leave()
        self.surface.begin_start(self.group, self.survivors, PATIENCE)
        for outcome in end_all(self.survivors):
            assert outcome.error is None, outcome
        for call in ("all_reduce", "broadcast", "barrier"):
            for rank in self.survivors:
                self.surface.begin(rank, {"name": call, "count": 3000})
            for outcome in end_all(self.survivors):
                assert outcome.error is None, outcome
        self.leave()
        if straggles:
            assert self.target.end().error != "hangs"

    def leave(self) -> None:
        for rank in self.survivors:
            self.surface.begin_close(rank)
        for outcome in end_all(self.survivors):
            # There is no group where the start has failed.
            assert outcome.error in (None, "AttributeError", "AssertionError", "ValueError"), (
                outcome
            )
        for rank in self.survivors:
            self.surface.forget(rank)
            left, before = rank.do("leftovers"), self.before[rank.number]
            self.row.leaks += abs(left["fds"] - before["fds"]) + len(left["threads"])
            self.row.leaks += max(0, left["maps"] - before["maps"])
