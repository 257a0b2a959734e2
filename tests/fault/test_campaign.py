"""Random kills and stops in random phases of random work; what must hold, holds every time.

The short form runs in `make test`; `make campaign` runs more. FAULT_CASES sets the number of cases
and FAULT_SEED the first seed (each case has a seed of its own, which a failure shows).
"""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
from ranks import LATE_S, Group, Outcome, Rank, Stage, expect_error, named_segments

SHORT_CASES, LONG_CASES = 10, 150
LIMIT = 1.5
COLLECTIVES = {
    "all_reduce": ["auto", "ring", "double_tree", "two_shot", "one_shot"],
    "broadcast": ["auto", "ring", "tree", "direct"],
    "reduce": ["auto", "ring", "tree", "direct"],
    "all_gather": ["auto", "ring", "tree", "direct"],
    "reduce_scatter": ["auto", "ring", "tree", "direct"],
    "gather": ["auto"],
    "scatter": ["auto"],
    "all_to_all": ["auto"],
    "barrier": ["auto"],
}
PHASES = ["between", "before its call", "in a message", "at a random time"]


@dataclass
class Tally:
    """What a run of the campaign has seen."""

    cases: int = 0
    survivors: int = 0
    raised: int = 0
    named: int = 0
    seconds: list[float] = field(default_factory=list)
    descriptors: int = 0
    threads: int = 0
    segments: int = 0

    def __str__(self) -> str:
        times = sorted(self.seconds) or [0.0]
        return (
            f"campaign: {self.cases} cases, {self.survivors} survivors, {self.raised} raised, "
            f"{self.named} named the rank and its pid; {times[len(times) // 2]:.2f} s in the "
            f"middle and {times[-1]:.2f} s at most; left over: {self.descriptors} descriptors, "
            f"{self.threads} threads, {self.segments} segments"
        )


class Case:
    """One group, one victim, one fault; all drawn from the seed."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.world = draw.choice([2, 2, 3, 4])
        self.victim = draw.randrange(self.world)
        self.stop = draw.random() < 0.3
        self.phase = draw.choice(PHASES)
        self.message = draw.randrange(1, 9)
        self.delay = draw.uniform(0, 0.05)
        self.workers = draw.random() < 0.3
        self.manner = draw.choice(["collective", "submit"])
        self.collective = draw.choice(list(COLLECTIVES))
        self.options: dict[str, Any] = {"algorithm": draw.choice(COLLECTIVES[self.collective])}
        if self.collective in ("broadcast", "reduce", "gather", "scatter"):
            self.options["root"] = draw.randrange(self.world)
        self.count = draw.choice([1, 1000, 50_000, 1_000_000]) // self.world + 1
        self.text = f"seed {seed}: " + ", ".join(f"{k}={v}" for k, v in vars(self).items())

    def run(self, stage: Stage, tally: Tally) -> None:
        with stage.group(self.world) as group:
            victim = group[self.victim]
            before = {rank.number: rank.do("leftovers")["fds"] for rank in group}
            worker = victim.do("fork", "sleep") if self.workers else 0
            verb = "stop" if self.stop else "kill"
            faults = f"rank={self.victim},{verb}={self.message}"
            in_message = self.phase == "in a message"
            group.start(timeout=LIMIT, environment={"DPCOMM_FAULTS": faults} if in_message else {})
            try:
                outcomes, since = self.strike(group, victim)
                self.judge(group, outcomes, since, tally)
                self.clean(group, before, tally)
            finally:
                if worker:
                    os.kill(worker, signal.SIGKILL)

    def strike(self, group: Group, victim: Rank) -> tuple[list[Outcome], float]:
        """The survivors' first errors, and when the victim was last seen well."""
        number = signal.SIGSTOP if self.stop else signal.SIGKILL
        since = time.monotonic()
        if self.phase in ("between", "before its call"):
            group.do("collective", "barrier")
        if self.phase == "between":
            since = time.monotonic()
            victim.signal(number)
        elif self.phase != "before its call":
            victim.begin("collective", self.collective, self.count, **self.options)
        survivors = group.others(self.victim)
        for rank in survivors:
            rank.begin(self.manner, self.collective, self.count, **self.options)
        if self.phase in ("before its call", "at a random time"):
            time.sleep(self.delay)
            since = time.monotonic()
            victim.signal(number)
        outcomes = [self.finished(rank) for rank in survivors]
        if self.phase == "in a message":
            # It may have had fewer messages to send than it takes.
            victim.signal(number)
        assert victim.stopped() if self.stop else victim.ended()
        victim.dead = not self.stop
        return outcomes, since

    def finished(self, rank: Rank) -> Outcome:
        outcome = rank.end()
        if self.manner == "submit" and outcome.error is None:
            return rank.do_outcome("wait", outcome.value)
        return outcome

    def judge(self, group: Group, outcomes: list[Outcome], since: float, tally: Tally) -> None:
        """Who could finish has the right result; the others, and the next calls, one same error."""
        victim = group[self.victim]
        error = "TimeoutError" if self.stop else "PeerError"
        survivors = group.others(self.victim)
        first = [outcome for outcome in outcomes if outcome.error is not None]
        if not first:
            since = time.monotonic()
        for rank in survivors:
            rank.begin("collective", "all_reduce", 100)
        outcomes = first + [rank.end() for rank in survivors]
        took = time.monotonic() - since
        text = expect_error(outcomes, error)
        assert took < LATE_S + (2 * LIMIT if self.stop else 0), f"{took:.2f} s"
        tally.cases += 1
        tally.survivors += len(survivors)
        tally.raised += len({outcome.rank for outcome in outcomes})
        tally.named += len(survivors) * (victim.name in text)
        tally.seconds.append(took)

    def clean(self, group: Group, before: dict[int, int], tally: Tally) -> None:
        if self.stop:
            group[self.victim].signal(signal.SIGKILL)
            assert group[self.victim].ended()
            group[self.victim].dead = True
        group.do("close")
        group.do("forget")
        for rank in group:
            left = rank.do("leftovers")
            tally.descriptors += left["fds"] - before[rank.number]
            tally.threads += len(left["threads"])
        group.restart()


def campaign(stage: Stage, cases: int, first_seed: int) -> None:
    named = named_segments()
    tally = Tally()
    for seed in range(first_seed, first_seed + cases):
        case = Case(seed)
        try:
            case.run(stage, tally)
        except Exception as error:
            raise AssertionError(case.text) from error
    tally.segments = len(named_segments() - named)
    print(tally)
    assert tally.raised == tally.named == tally.survivors, tally
    assert tally.descriptors == tally.threads == tally.segments == 0, tally


def test_some_random_faults(stage: Stage) -> None:
    campaign(stage, SHORT_CASES, 1)


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_many_random_faults(stage: Stage) -> None:
    seed = int(os.environ.get("FAULT_SEED", "0")) or random.randrange(1, 1 << 30)
    campaign(stage, int(os.environ.get("FAULT_CASES", LONG_CASES)), seed)
