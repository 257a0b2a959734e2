"""Space-time pictures of schedules: ranks across, time down, arrows for messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dpcomm.errors import UsageError
from dpcomm.schedule.plans import PlanStep, Primitive, plan

__all__ = ["draw"]

#: Colours of chunks, told apart also by colour-blind readers (after Okabe and Ito, and two greys).
_COLOURS: Final = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#8a6d00",
    "#56b4e9",
    "#7a4fb5",
    "#5f6b73",
)
#: Of the algorithms that have several; others are numbered.
_LANE_NAMES: Final = {"double_tree": ("up 0", "down 0", "up 1", "down 1")}
_BOX_WIDTH: Final = 0.46
_BOX_HEIGHT: Final = 0.42


@dataclass
class _Placed:
    """A step with its place in the picture."""

    step: PlanStep
    time: int
    x: float = 0.0
    part: int = 0
    """Chooses the colour."""
    label: str = ""


@dataclass(frozen=True)
class _Message:
    sender: _Placed
    receiver: _Placed


def draw(
    algorithm: str,
    world: int,
    path: str | Path,
    *,
    collective: str = "all_reduce",
    root: int = 0,
    slices: int = 1,
) -> None:
    """Writes a space-time picture of one round in the format of the ending: png, svg or pdf.

    Every step takes one unit of time and starts as soon as its messages are there, with as many
    slots as that needs. A lane is a column. Meant for up to 8 ranks.

    Raises:
        UsageError: matplotlib is not installed, or the algorithm does not exist.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("draw needs matplotlib: pip install matplotlib") from error
    steps = plan(algorithm, world, collective=collective, root=root, slices=slices)
    placed, messages = _schedule(steps)
    _name_parts(placed, slices, world if collective == "all_to_all" else 0)
    columns = _place_columns(placed, world)
    end = max(p.time for p in placed) + 1
    row = 0.62 if columns <= 8 else 0.8
    figure = Figure(figsize=(2.0 + 1.05 * columns, 1.5 + row * end), layout="constrained")
    axes = figure.add_subplot()
    around = _direction(messages, world)
    for message in messages:
        _draw_message(axes, message, world, columns, around)
    for p in placed:
        _draw_step(axes, p)
    title = f"{collective.replace('_', '-')} by {algorithm.replace('_', '-')}, {world} ranks"
    if collective in ("broadcast", "reduce", "gather", "scatter"):
        title += f", root {root}"
    _draw_frame(axes, placed, end, columns, title, _LANE_NAMES.get(algorithm, ()))
    figure.savefig(str(path), dpi=110, metadata=_no_date(str(path)))


def _no_date(path: str) -> dict[str, Any]:
    """So that the same picture gives the same file."""
    return {"Date": None} if path.endswith("svg") else {}


def _schedule(steps: Sequence[PlanStep]) -> tuple[list[_Placed], list[_Message]]:
    """Runs the steps as early as they can, one unit of time each."""
    streams: dict[tuple[int, int], deque[PlanStep]] = {}
    for step in steps:
        streams.setdefault((step.rank, step.lane), deque()).append(step)
    channels: dict[tuple[int, int, int], deque[_Placed]] = {}
    free = dict.fromkeys(streams, 0)
    placed: list[_Placed] = []
    messages: list[_Message] = []
    moved = True
    while moved:
        moved = False
        for key, stream in streams.items():
            while stream:
                step = stream[0]
                incoming = [
                    channels.setdefault((peer, step.rank, step.recv_lane), deque())
                    for peer in step.recv_peers
                ]
                if not all(incoming):
                    break
                stream.popleft()
                senders = [queue.popleft() for queue in incoming]
                now = _Placed(step, max([free[key], *(s.time + 1 for s in senders)]))
                free[key] = now.time + 1
                placed.append(now)
                messages += [_Message(sender, now) for sender in senders]
                for peer in step.send_peers:
                    channels.setdefault((step.rank, peer, step.send_lane), deque()).append(now)
                moved = True
    return placed, messages


def _place_columns(placed: Sequence[_Placed], world: int) -> float:
    """Gives each rank a column, each of its lanes a narrow one; returns the width of all."""
    lanes = 1 + max(p.step.lane for p in placed)
    width = 1.0 if lanes == 1 else 0.52 * lanes + 0.4
    for p in placed:
        p.x = p.step.rank * width + (p.step.lane - (lanes - 1) / 2) * 0.52
    return world * width


def _name_parts(placed: Sequence[_Placed], slices: int, pairs_of: int = 0) -> None:
    """Labels: chunks, or slices where there is only one chunk; chunk.slice where there are both.

    Where a chunk is a pair of `pairs_of` ranks, "1>2" is what rank 1 has for rank 2.
    """
    one_chunk = all(p.step.chunk == 0 for p in placed)
    for p in placed:
        p.part = p.step.slice if one_chunk else p.step.chunk
        if pairs_of:
            source, destination = divmod(p.step.chunk, pairs_of)
            p.part = source
            p.label = f"{source}>{destination}" + (f".{p.step.slice}" if slices > 1 else "")
        elif slices == 1:
            p.label = f"c{p.step.chunk}"
        else:
            p.label = f"s{p.step.slice}" if one_chunk else f"c{p.step.chunk}.{p.step.slice}"


def _draw_step(axes: Any, p: _Placed) -> None:
    from matplotlib.patches import FancyBboxPatch

    kept = Primitive.COPY in p.step.primitive
    colour = _COLOURS[p.part % len(_COLOURS)]
    axes.add_patch(
        FancyBboxPatch(
            (p.x - _BOX_WIDTH / 2, p.time - _BOX_HEIGHT / 2),
            _BOX_WIDTH,
            _BOX_HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=colour if kept else "white",
            edgecolor=colour,
            linewidth=1.6,
            zorder=3,
        )
    )
    label = f"+{p.label}" if Primitive.REDUCE in p.step.primitive else p.label
    axes.text(
        p.x,
        p.time,
        label,
        ha="center",
        va="center",
        fontsize=9,
        fontweight="bold" if Primitive.REDUCE in p.step.primitive else "normal",
        color="white" if kept else colour,
        zorder=4,
    )


def _direction(messages: Sequence[_Message], world: int) -> int:
    """+1 or -1 where all messages go the same way round a circle of ranks, else 0.

    They do if all go to a neighbour, or if every rank sends by the same distances, none of them
    more than half way round.
    """
    hops: dict[int, set[int]] = {}
    for message in messages:
        rank = message.sender.step.rank
        hops.setdefault(rank, set()).add((message.receiver.step.rank - rank) % world)
    known = set().union(*hops.values())
    alike = len(hops) == world and all(each == known for each in hops.values())
    if known == {1} or (alike and 2 * max(known) <= world):
        return 1
    return -1 if alike and 2 * min(known) >= world else 0


def _draw_message(axes: Any, message: _Message, world: int, columns: float, around: int) -> None:
    sender, receiver = message.sender, message.receiver
    start = (sender.x, sender.time + _BOX_HEIGHT / 2)
    end = (receiver.x, receiver.time - _BOX_HEIGHT / 2)
    colour = _COLOURS[sender.part % len(_COLOURS)]
    hop = receiver.step.rank - sender.step.rank
    if world > 2 and hop * around < 0:
        # It leaves the picture on one side and comes in on the other, as on a cylinder.
        _arrow(axes, start, (end[0] + around * columns, end[1]), colour)
        _arrow(axes, (start[0] - around * columns, start[1]), end, colour)
    else:
        _arrow(axes, start, end, colour)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    from matplotlib.patches import FancyArrowPatch

    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=11,
            color=colour,
            linewidth=1.1,
            shrinkA=0,
            shrinkB=0,
            zorder=2,
        )
    )


def _draw_frame(
    axes: Any, placed: Sequence[_Placed], end: int, columns: float, title: str, lanes: Sequence[str]
) -> None:
    ranks = sorted({p.step.rank for p in placed})
    width = columns / len(ranks)
    margin = 0.4
    axes.set_xlim(-width / 2 - margin, columns - width / 2 + margin)
    axes.set_ylim(end - 0.5, -0.75)
    axes.set_xticks([rank * width for rank in ranks], [f"rank {rank}" for rank in ranks])
    axes.set_yticks(range(end))
    axes.set_ylabel("time")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if any(p.step.lane for p in placed):
        for x, lane in {(p.x, p.step.lane) for p in placed}:
            label = lanes[lane] if lanes else f"lane {lane}"
            axes.text(x, -0.5, label, ha="center", va="center", fontsize=7.5, color="#555555")
    for rank in ranks:
        axes.axvspan(
            rank * width - width / 2 + 0.04,
            rank * width + width / 2 - 0.04,
            color="#f3f3f0",
            zorder=0,
        )
    axes.set_title(title, fontsize=11, pad=14)
    axes.set_xlabel(
        "outlined: on its way   filled: kept in the output   +: the own input is added",
        fontsize=8.5,
        labelpad=8,
    )
