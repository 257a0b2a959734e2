"""One fault in one phase of a group's life, through one surface, and what has to hold after it."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from ranks import PROMISE_S, Outcome, Rank, Stage, late
from surfaces import Surface, draw_call, end_all

# Seconds that an operation may take, and a start with a fault; one without has PATIENCE.
LIMIT = float(os.environ.get("FAULT_LIMIT", "1.5"))
START_LIMIT = 2 * LIMIT
PATIENCE = 20.0
PHASES = ["start-up", "mid-message", "between operations", "in an operation", "shutdown"]
KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)
# A forked child of a rank, as a DataLoader has: made before the group or in it, it lives on; or it
# dies at once.
WORKERS = [None, None, None, "before", "in the group", "dies"]


@dataclass
class Row:
    """What was seen of one phase and fault."""

    cases: int = 0
    survivors: int = 0
    raised: int = 0
    named: int = 0
    same: int = 0  # cases in which all survivors had the same text
    seconds: list[float] = field(default_factory=list)  # beyond the limit, for one that is stopped
    late: int = 0  # cases later than promised, also without the time that ranks had no core
    leaks: int = 0  # descriptors, threads, mappings


class Table:
    """What a run of cases has seen."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], Row] = defaultdict(Row)

    def perfect(self) -> bool:
        return all(
            row.raised == row.named == row.survivors
            and row.same == row.cases
            and row.late == row.leaks == 0
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
        return (
            f"{row.cases:6}{row.survivors:10}{row.raised:8}{row.named:7}{row.same:9}"
            f"{times[len(times) // 2]:7.2f} s{times[-1]:6.2f} s{row.late:6}{row.leaks:7}"
        )


class Case:
    """A case; what is not given is drawn from the seed.

    Args:
        fault: "kill", "stop", "mismatch" (the victim calls something else) or "absent" (it does
            not call).
    """

    def __init__(self, seed: int, surface: Surface, **given: Any) -> None:
        draw = self._draw = random.Random(seed)
        self._made_of = (seed, surface, given)
        self.surface = surface
        self.world: int = draw.choice([2, 3, 4])
        self.phase: str = draw.choice(PHASES)
        self.fault: str = draw.choice(["kill", "kill", "stop"])
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
        self.worker = draw.choice(WORKERS)
        self.parent = draw.choice([self.victim, draw.randrange(self.world)])
        shown = {
            key: each for key, each in vars(self).items() if key[0] != "_" and key != "surface"
        }
        self.text = f"seed {seed}, {surface.name}: {shown}"

    def again(self) -> Case:
        """The same case, from its beginning."""
        seed, surface, given = self._made_of
        return Case(seed, surface, **given)

    def run(self, stage: Stage, table: Table) -> None:
        self.row = table.rows[self.surface.name, self.phase, self.fault]
        with stage.group(self.world) as group:
            self.group = group
            self.ranks = list(group)
            self.survivors = group.others(self.victim)
            self.surface.prepare(group)
            self.before = {rank.number: rank.do("leftovers") for rank in group}
            self.since = time.monotonic()
            if self.worker == "before":
                self.fork_worker()
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
        if self.worker in ("in the group", "dies"):
            self.fork_worker()

    def fork_worker(self) -> None:
        worker = self.group[self.parent].do("fork", "sleep")
        self.group[self.parent].remember_workers()
        if self.worker == "dies":
            os.kill(worker, KILL)

    def strike(self) -> None:
        """Kills or stops the victim, if the fault is one of these."""
        if self.fault not in ("kill", "stop"):
            return
        self.target.remember_workers()
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
            for rank in self.survivors:
                self.surface.begin(rank, {"name": "all_reduce", "count": 100})
            outcomes = end_all(self.survivors)
        error = {"kill": None, "mismatch": "UsageError"}.get(self.fault, "TimeoutError")
        if self.fault == "mismatch":
            outcomes += [self.target.end()]
            self.since = max(outcome.began for outcome in outcomes)
        self.judge(outcomes, error, in_start=True)

    def worlds(self) -> dict[int, int]:
        return {rank.number: self.world for rank in self.ranks}

    def odd_worlds(self) -> dict[int, int]:
        return self.worlds() | {self.victim: self.world + 1}

    def strike_in_start(self) -> None:
        if self.key is None:
            time.sleep(self.delay * 2)
            self.strike()
        else:
            assert self.target.ended() if self.fault == "kill" else self.target.stopped()
            self.target.dead = self.fault == "kill"
            self.since = time.monotonic()

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
        submitted = {}
        for rank in callers:
            if self.later:
                submitted[rank.number] = self.surface.submit(rank, self.call)
            else:
                self.surface.begin(rank, self.call)
        if self.phase != "between operations":
            time.sleep(self.delay)
            self.strike()  # also in a message, if it had fewer to send
        self.finish(callers, submitted)

    def finish(self, callers: list[Rank], submitted: dict[int, float]) -> None:
        """The callers' errors. Who could finish has its own in the next call."""
        if self.later:
            for rank in callers:
                self.surface.begin_wait(rank)
        outcomes = [outcome for outcome in end_all(callers) if outcome.error is not None]
        if self.fault in ("stop", "absent"):  # the time limit counts from the call
            for outcome in outcomes:
                outcome.began = submitted.get(outcome.rank, outcome.began)
        for rank in callers:
            self.surface.begin(rank, {"name": "all_reduce", "count": 100})
        outcomes += end_all(callers)
        if self.fault == "mismatch":
            odd = self.target.end()
            self.since = max(self.since, odd.began)
            outcomes += [odd] if odd.error is not None else []
        error = {"kill": "PeerError", "mismatch": "UsageError"}.get(self.fault, "TimeoutError")
        self.judge(outcomes, error)

    def in_shutdown(self) -> None:
        """The victim dies or stops while all leave, with an operation in flight for the others.

        Whoever leaves waits for nobody; what was in flight ends with one text on all. A victim that
        leaves alone ("mismatch") is everybody's PeerError.
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
        left = end_all(self.survivors)
        for outcome in left:
            assert outcome.error is None, outcome
        self.count_time(left, self.since)
        for rank in self.survivors:
            self.surface.begin_wait(rank)
        outcomes = end_all(self.survivors)
        text = self.only_text(outcomes, "PeerError")
        self.expect_end_in_shutdown(text)
        self.count_told(outcomes)

    def expect_end_in_shutdown(self, text: str) -> None:
        """It names the victim that is dead or has closed; one that is stopped or does nothing may
        come back, and the first rank that leaves ends the operation. The lines tell of all."""
        first = text.split("\n")[0]
        gone = [f"{self.target.name} has closed its communicator (no operation yet); noticed by "]
        if self.fault == "kill":
            gone.append(f"{self.target.name} died (no operation yet); noticed by ")
        else:
            call = "all_reduce #1 (1000 x float32, sum, "
            gone += [
                f"{rank.name} has closed its communicator with {call}" for rank in self.survivors
            ]
        assert any(first.startswith(each) for each in gone), f"{gone} does not begin {text}"
        self.expect_whole(text)
        line = text.split("\n")[1 + self.victim]
        state = {"kill": "(, died|, closed)", "stop": "(|, closed)", "absent": ""}[self.fault]
        assert re.search(f"did not arrive{state}; no operation yet$", line), text

    # --- what has to hold ----------------------------------------------------------------------

    def only_text(self, outcomes: list[Outcome], *errors: str) -> str:
        for outcome in outcomes:
            assert outcome.error in errors, outcome
        texts = {outcome.text for outcome in outcomes}
        assert len(texts) == 1, "not one text:\n" + "\n".join(sorted(texts))
        return texts.pop()

    def count_told(self, outcomes: list[Outcome]) -> None:
        told = {outcome.rank for outcome in outcomes} - {self.victim}
        self.row.raised += len(told)
        self.row.named += len(told)
        self.row.same += 1

    def count_time(self, outcomes: list[Outcome], since: float, limit: float = 0.0) -> None:
        seconds = max(outcome.took(since) for outcome in outcomes) - limit
        self.row.seconds.append(max(seconds, 0.0))
        in_time = late(outcomes, since, limit) < PROMISE_S
        self.row.late += not in_time
        assert in_time, f"{seconds:.2f} s: {outcomes}"

    def judge(self, outcomes: list[Outcome], error: str | None, in_start: bool = False) -> None:
        errors = ["PeerError", "TimeoutError", "UsageError"] if error is None else [error]
        text = self.only_text(outcomes, *errors)
        absent = in_start and "did not come" in text  # also if it was killed before it had come
        if self.fault in ("stop", "absent") or (absent and self.fault == "kill"):
            # The time limit counts from each rank's call.
            begins = in_start and not self.in_start_over
            self.count_time(outcomes, 0.0, START_LIMIT if begins else LIMIT)
        else:
            self.count_time(outcomes, self.since)
        known = f"rank {self.victim} " if absent and self.fault != "mismatch" else self.target.name
        if absent and f"ranks {self.victim}" in text:
            known = "ranks"
        assert known in text, f"{known} is not in {text!r}"
        if not in_start:
            self.expect_whole(text)
        self.told = text
        self.count_told(outcomes)

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
        """Nothing is left, and the survivors make another group, whatever the victim does: one that
        was stopped goes on with the old group in the middle of that."""
        straggles = self.fault == "stop" and self.straggler
        if self.fault == "stop" and not straggles:
            self.target.signal(KILL)
            assert self.target.ended()
            self.target.dead = True
        self.leave()
        self.surface.begin_start(self.group, self.survivors, PATIENCE)
        if straggles:
            self.target.signal(signal.SIGCONT)
        for outcome in end_all(self.survivors):
            assert outcome.error is None, outcome
        for call in ("all_reduce", "broadcast", "barrier"):
            for rank in self.survivors:
                self.surface.begin(rank, {"name": call, "count": 3000})
            for outcome in end_all(self.survivors):
                assert outcome.error is None, outcome
            if straggles and call == "all_reduce":
                self.straggle()
        self.leave()
        if straggles:
            self.expect_told(self.target.end())

    def straggle(self) -> None:
        """What the victim was stopped in ends, and it begins one more."""
        if self.phase != "between operations":
            outcome = self.target.end()
            if outcome.error is not None:
                self.expect_told(outcome)
        self.surface.begin(self.target, {"name": "all_reduce", "count": 500})

    def expect_told(self, outcome: Outcome) -> None:
        assert outcome.error not in (None, "hangs", "died"), outcome
        if self.phase not in ("start-up", "shutdown"):
            assert outcome.text == self.told, f"{outcome} was told {self.told}"

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
