"""Spin models of the flag protocols: protocol.pml with the blocks of real schedules, packets.pml.

A block's steps come from the generator that the kernels read (dpcomm.schedule.plan), so what is
searched is the protocol under the very order of messages that ring, two-shot and trees have.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dpcomm import schedule

HERE = Path(__file__).parent
PROTOCOL = (HERE / "protocol.pml").read_text()
PACKETS = (HERE / "packets.pml").read_text()
TIMEOUT_S = 110
MEMORY_MIB = 2000

Channel = tuple[int, int, int]
"""Source, target, lane."""


@dataclass(frozen=True)
class Operation:
    """One kernel launch; all ranks of one, unless `ranks` says that only some run it."""

    algorithm: str
    collective: str = "all_reduce"
    rounds: int = 1
    slices: int = 1
    root: int = 0
    tag: int = 0
    lanes: tuple[int, ...] = ()
    """Only these lanes of the schedule; () is all. (The two trees of the double tree have no
    channel in common, and both at once are more states than can be searched.)"""

    def plan(self, world: int) -> list[schedule.PlanStep]:
        steps = schedule.plan(
            self.algorithm,
            world,
            collective=self.collective,
            root=self.root,
            slices=self.slices,
            rounds=self.rounds,
        )
        return [s for s in steps if not self.lanes or s.lane in self.lanes]


@dataclass
class Verdict:
    """What spin found."""

    error: str
    """"" if the whole space was searched and nothing found."""
    states: int
    depth: int
    seconds: float
    """Of the search, without making and compiling it."""


def missing() -> str:
    """Programs that the models need and that are not there, as text; "" if all are."""
    return ", ".join(name for name in ("spin", "gcc") if shutil.which(name) is None)


@dataclass
class _Block:
    """The text of one process, and what it has counted."""

    lines: list[str] = field(default_factory=list)
    received: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)


def _step(
    block: _Block, step: schedule.PlanStep, channels: Mapping[Channel, int], leave: str, name: str
) -> None:
    """The order of things within a step (csrc/cuda/kernels.cuh)."""
    incoming, outgoing = [], []
    for peer in step.recv_peers:
        channel = channels[peer, step.rank, step.recv_lane]
        block.received[channel] = block.received.get(channel, 0) + 1
        incoming.append(f"({channel}, {block.received[channel]}")
    for peer in step.send_peers:
        channel = channels[step.rank, peer, step.send_lane]
        block.sent[channel] = block.sent.get(channel, 0) + 1
        outgoing.append(f"({channel}, {block.sent[channel]}")
    block.lines.append(f"  /* {step} */")
    block.lines += [f"  WAIT_ARRIVAL{i}, {leave})" for i in incoming]
    block.lines += [f"  WAIT_CREDIT{o}, {leave})" for o in outgoing]
    begin = [f"BEGIN_READ{i})" for i in incoming] + [f"BEGIN_WRITE{o})" for o in outgoing]
    end = [f"END_READ{i})" for i in incoming] + [f"END_WRITE{o})" for o in outgoing]
    block.lines += [f"  atomic {{ {' '.join(begin)} }}", f"  atomic {{ {' '.join(end)} }}"]
    block.lines.append(f"publish_{name}:")
    block.lines += [f"  PUBLISH_ARRIVAL{o})" for o in outgoing]
    block.lines += [f"  PUBLISH_CREDIT{i})" for i in incoming]


def _process(
    rank: int,
    lane: int,
    plans: Sequence[tuple[Operation, list[schedule.PlanStep]]],
    channels: Mapping[Channel, int],
) -> str:
    """All that one block does, operation after operation."""
    lines = [f"active proctype rank{rank}_lane{lane}() {{"]
    before = 0
    for number, (operation, steps) in enumerate(plans):
        own = [s for s in steps if s.rank == rank]
        if any(s.lane == lane for s in own):
            block = _Block()
            lines += [f"#define RANK {rank}", f"#define TAG {operation.tag}"]
            leave = f"leave_{number}"
            lines.append(f"  START({before}, {leave})")
            for index, step in enumerate(s for s in own if s.lane == lane):
                _step(block, step, channels, leave, f"{number}_{index}")
            lines += block.lines
            counts = [f"KEEP_RECEIVED({c}, {k})" for c, k in block.received.items()]
            counts += [f"KEEP_SENT({c}, {k})" for c, k in block.sent.items()]
            lines.append(f"  atomic {{ {' '.join([*counts, 'skip'])} }}")
            lines += [f"{leave}:", "  LEFT", "#undef RANK", "#undef TAG"]
        before += len({s.lane for s in own})
    return "\n".join([*lines, "}"])


def blocks(
    world: int,
    slots: int,
    operations: Sequence[Operation],
    *,
    others: Sequence[Operation] | None = None,
    aborts: Sequence[int] = (),
) -> str:
    """The model of `operations` back to back.

    Args:
        world: ranks.
        slots: of each channel.
        operations: what all ranks run.
        others: what all ranks but rank 0 run instead, to model ranks that disagree.
        aborts: ranks whose abort word is set at any time, one after the other in any order.
    """
    plans = {}
    for rank in range(world):
        own = operations if rank == 0 or others is None else others
        plans[rank] = [(o, o.plan(world)) for o in own]
    channels: dict[Channel, int] = {}
    for rank, own in plans.items():
        for step in (s for _, steps in own for s in steps if s.rank == rank):
            for peer in step.recv_peers:
                channels.setdefault((peer, rank, step.recv_lane), len(channels))
            for peer in step.send_peers:
                channels.setdefault((rank, peer, step.send_lane), len(channels))
    lanes = {
        r: {s.lane for _, steps in own for s in steps if s.rank == r} for r, own in plans.items()
    }
    tags = 1 + max(o.tag for own in plans.values() for o, _ in own)
    text = [f"#define RANKS {world}", f"#define SLOTS {slots}", f"#define CHANNELS {len(channels)}",
            f"#define TAGS {tags}", PROTOCOL]  # fmt: skip
    text += [_process(r, lane, plans[r], channels) for r in plans for lane in sorted(lanes[r])]
    text += [f"active proctype host{r}() {{ abort_word[{r}] = true }}" for r in aborts]
    return "\n".join(text) + "\n"


def planted(text: str, old: str, new: str) -> str:
    """The text with a fault: `old`, which must occur once, replaced."""
    if text.count(old) != 1:
        raise ValueError(f"{old!r} occurs {text.count(old)} times")
    return text.replace(old, new)


def search(text: str, folder: Path, limit_s: float = TIMEOUT_S) -> Verdict:
    """Searches all states. Takes some seconds, two files of a few hundred KiB in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pml").write_text(text)

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=limit_s, check=False
        )
        output = done.stdout + done.stderr
        if done.returncode != 0 and command[0] != "./pan":
            raise RuntimeError(f"{' '.join(command)}:\n{output}")
        return output

    translated = run("spin", "-a", "model.pml")
    if "error" in translated.lower():
        raise RuntimeError(f"spin:\n{translated}")
    run("gcc", "-w", "-DSAFETY", "-DNOFAIR", "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}",
        "-o", "pan", "pan.c")  # fmt: skip
    start = time.monotonic()
    output = run("./pan", "-m200000", "-w22")
    seconds = time.monotonic() - start
    states = re.search(r"(\d+) states, stored", output)
    depth = re.search(r"depth reached (\d+)", output)
    errors = re.search(r"errors: (\d+)", output)
    if not (states and depth and errors) or "max search depth too small" in output:
        raise RuntimeError(f"pan:\n{output}")
    if errors.group(1) != "0":
        found = re.search(r"pan:\d+: (.*) \(at depth", output)
        error = found.group(1) if found else output
    else:
        error = "search not completed" if "Search not completed" in output else ""
    return Verdict(error, int(states.group(1)), int(depth.group(1)), seconds)
