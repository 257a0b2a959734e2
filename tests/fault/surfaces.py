"""The two ways in which puppets use a group: dpcomm.Communicator, and torch.distributed."""

from __future__ import annotations

import random
from typing import Any

from ranks import Group, Outcome, Rank, Stage

ALGORITHMS = {
    "all_reduce": ["auto", "ring", "double_tree", "two_shot", "one_shot"],
    "broadcast": ["auto", "ring", "tree", "direct"],
    "reduce": ["auto", "ring", "tree", "direct"],
    "all_gather": ["auto", "ring", "tree", "direct"],
    "reduce_scatter": ["auto", "ring", "tree", "direct"],
    "barrier": ["auto"],
}
# What Torch below has no call for.
MORE = {"gather": ["auto"], "scatter": ["auto"], "all_to_all": ["auto"]}


class Direct:
    """dpcomm.Communicator."""

    name = "Communicator"
    algorithms = ALGORITHMS | MORE

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._limit: dict[str, float] = {}

    def prepare(self, group: Group) -> None:
        """Before anything is counted."""

    def begin_start(
        self,
        group: Group,
        ranks: list[Rank],
        timeout: float,
        limit: float | None = None,
        worlds: dict[int, int] | None = None,
        deadly: dict[int, tuple[str, bool, int]] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Begins the start of a group of these ranks; `limit` is that of operations."""
        self._limit = {} if limit is None else {"timeout": limit}
        init = group.init()
        for number, rank in enumerate(ranks):
            rank.begin(
                "start",
                number if len(ranks) < len(group.ranks) else rank.number,
                (worlds or {}).get(rank.number, len(ranks)),
                init,
                timeout=timeout,
                deadly=(deadly or {}).get(rank.number),
                environment=environment,
            )

    def start_keys(self, victim: int) -> list[tuple[str, bool]]:
        """Places in a rank's start: a key of the store, and whether behind it."""
        keys = ["here/0", "offer/0", "verdict/0"] if victim == 0 else []
        keys = keys or [f"here/{victim}", f"answer/0/{victim}"]
        return [(key, behind) for key in keys for behind in (False, True)]

    def begin(self, rank: Rank, call: dict[str, Any]) -> None:
        rank.begin("collective", **call, **self._limit)

    def submit(self, rank: Rank, call: dict[str, Any]) -> float:
        """Begins an asynchronous call; the rank's time in front of it."""
        outcome = rank.do_outcome("submit", **call, **self._limit)
        assert outcome.error is None, outcome
        return outcome.began

    def begin_wait(self, rank: Rank) -> None:
        rank.begin("wait", -1)

    def begin_close(self, rank: Rank) -> None:
        rank.begin("close")

    def forget(self, rank: Rank) -> None:
        rank.do("forget")


START = """
import datetime, os, torch, torch.distributed as dist
os.environ.update(environment)
try:
    dist.init_process_group("dpcomm", store=dist.PrefixStore(name, puppet.store), rank=rank,
                            world_size=world, timeout=datetime.timedelta(seconds=timeout))
    if limit is not None:
        group = dist.distributed_c10d._get_default_group()
        backend = group._get_backend(torch.device("cpu"))
        backend.set_timeout(datetime.timedelta(seconds=limit))
        del group, backend
finally:
    for each in environment:
        del os.environ[each]
"""
CALL = """
import torch, torch.distributed as dist
world, rank = dist.get_world_size(), dist.get_rank()
x = torch.arange(count, dtype=torch.float32) % 31 + rank
every = torch.full((count * world,), -1.0)
calls = {
    "all_reduce": lambda: dist.all_reduce(x, async_op=later),
    "broadcast": lambda: dist.broadcast(x, root, async_op=later),
    "reduce": lambda: dist.reduce(x, root, async_op=later),
    "all_gather": lambda: dist.all_gather_into_tensor(every, x, async_op=later),
    "reduce_scatter": lambda: dist.reduce_scatter_tensor(x, every, async_op=later),
    "barrier": lambda: dist.barrier(async_op=later),
}
work = calls[name]()
if later:
    puppet.works.append(work)
elif name == "all_reduce":
    own = torch.arange(count, dtype=torch.float32) % 31
    assert torch.equal(x, own * world + sum(range(world))), "a wrong result"
elif name == "broadcast":
    assert torch.equal(x, torch.arange(count, dtype=torch.float32) % 31 + root), "a wrong result"
"""
CONNECT = """
import torch.distributed as dist
puppet.store = dist.TCPStore("127.0.0.1", port, is_master=False, use_libuv=True)
puppet.store.set(f"puppet{rank}", "1")
"""
# An error's traceback holds tensors and the store until it is collected.
FORGET = "import gc; puppet.works.clear(); gc.collect()"
DESTROY = "import torch.distributed as dist; dist.destroy_process_group()"


class Torch:
    """torch.distributed with the backend dpcomm; the store is the test's, so no rank keeps it."""

    name = "torch"
    algorithms = ALGORITHMS

    def __init__(self, stage: Stage) -> None:
        from torch.distributed import TCPStore

        self.stage = stage
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._groups = 0

    def prepare(self, group: Group) -> None:
        for rank in group:
            rank.do("run", CONNECT, port=self._store.port, rank=rank.number)

    def begin_start(
        self,
        group: Group,
        ranks: list[Rank],
        timeout: float,
        limit: float | None = None,
        worlds: dict[int, int] | None = None,
        deadly: dict[int, tuple[str, bool, int]] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._groups += 1
        for number, rank in enumerate(ranks):
            rank.begin(
                "run",
                START,
                name=f"group{self._groups}",
                rank=number if len(ranks) < len(group.ranks) else rank.number,
                world=(worlds or {}).get(rank.number, len(ranks)),
                timeout=timeout,
                limit=limit,
                environment=environment or {},
            )

    def start_keys(self, victim: int) -> list[tuple[str, bool]]:
        return []  # at a random time

    def begin(self, rank: Rank, call: dict[str, Any]) -> None:
        options = {"root": 0, **call, "later": False}
        options.pop("algorithm", None)
        rank.begin("run", CALL, **options)

    def submit(self, rank: Rank, call: dict[str, Any]) -> float:
        options = {"root": 0, **call, "later": True}
        options.pop("algorithm", None)
        outcome = rank.do_outcome("run", CALL, **options)
        assert outcome.error is None, outcome
        return outcome.began

    def begin_wait(self, rank: Rank) -> None:
        rank.begin("run", "puppet.works[-1].wait()")

    def begin_close(self, rank: Rank) -> None:
        rank.begin("run", DESTROY)

    def forget(self, rank: Rank) -> None:
        rank.do("run", FORGET)


Surface = Direct | Torch


def draw_call(draw: random.Random, surface: Surface, world: int) -> dict[str, Any]:
    """A collective with its arguments."""
    name = draw.choice(list(surface.algorithms))
    call: dict[str, Any] = {"name": name, "algorithm": draw.choice(surface.algorithms[name])}
    call["count"] = draw.choice([1, 1000, 50_000, 1_000_000]) // world + 1
    if name in ("broadcast", "reduce", "gather", "scatter"):
        call["root"] = draw.randrange(world)
    return call


def end_all(ranks: list[Rank]) -> list[Outcome]:
    return [rank.end() for rank in ranks]
