"""Programs of messages between two ranks: what all ranks draw alike, and what each makes of it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpcomm import Communicator

POISON = 0xA5
GUARD = 64
SIZES = (0, 1, 63, 700, 4000, 8192, 8193, 32768, 70_001, 500_000)


@dataclass(frozen=True)
class Message:
    """The `number`-th message of its pair and tag."""

    sender: int
    receiver: int
    tag: int
    number: int
    nbytes: int
    from_any: bool = False  # how it is received


def content(message: Message) -> Any:
    """Bytes that no other message of the program has in its place."""
    salt = (message.sender, message.receiver, message.tag, message.number)
    block = np.random.default_rng(salt).integers(0, 256, min(message.nbytes, 65521), np.uint8)
    return np.resize(block, message.nbytes)  # a prime: no two slots hold the same


def draw(world: int, count: int, seed: int) -> list[Message]:
    """A program. A tag below 100 is received from a named rank; one of 100 and more from any, and
    has one size.
    """
    rng = random.Random(seed)
    numbers: dict[tuple[int, int, int], int] = {}
    program = []
    for _ in range(count):
        sender, receiver = rng.sample(range(world), 2)
        from_any = rng.random() < 0.3
        tag = rng.choice((100, 101) if from_any else (0, 1, 2, 99))
        nbytes = SIZES[tag % 100 + 3] if from_any else rng.choice(SIZES)
        key = (sender, receiver, tag)
        numbers[key] = numbers.get(key, -1) + 1
        program.append(Message(sender, receiver, tag, numbers[key], nbytes, from_any))
    return program


class _Received:
    """A poisoned buffer between guards."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self.memory = np.full(message.nbytes + 2 * GUARD, POISON, np.uint8)
        self.array = self.memory[GUARD : GUARD + message.nbytes]
        self.work: Any = None

    def guards_hold(self) -> bool:
        return bool(
            (self.memory[:GUARD] == POISON).all() and (self.memory[-GUARD:] == POISON).all()
        )


def _problem(each: _Received, source: int, numbers: dict[tuple[int, int], int]) -> str:
    """What is wrong with what was received; `numbers` counts what came from any, by sender, tag."""
    message = each.message
    if message.from_any:
        key = (source, message.tag)
        numbers[key] = numbers.get(key, -1) + 1
        message = replace(message, sender=source, number=numbers[key])
    if source != message.sender:
        return f"{message} came from {source}"
    if not np.array_equal(each.array, content(message)):
        return f"{message}: wrong bytes"
    return "" if each.guards_hold() else f"{message}: bytes outside were written"


def run(made: Communicator, program: list[Message], seed: int, collectives: int) -> str:
    """Runs a program; what is wrong with its results.

    Each rank posts in an order of its own, but for what has to keep its order: sends to one rank
    with one tag, receives from one rank with one tag, receives from any rank with one tag.
    """
    rank = made.rank
    rng = random.Random(seed * 1000 + rank)
    queues: dict[tuple[Any, ...], list[Message]] = {}
    for message in program:
        if message.sender == rank:
            queues.setdefault(("send", message.receiver, message.tag), []).append(message)
        if message.receiver == rank:
            sender = None if message.from_any else message.sender
            queues.setdefault(("recv", sender, message.tag), []).append(message)
    sums = np.full((collectives, 5000), rank + 1, np.int32)
    queues[("sum",)] = [Message(0, 0, 0, number, 0) for number in range(collectives)]
    sends: list[tuple[Any, Any]] = []
    received: list[_Received] = []
    others: list[Any] = []
    while queues:
        key = rng.choice(list(queues))
        message = queues[key].pop(0)
        if not queues[key]:
            del queues[key]
        if key[0] == "send":
            array = content(message)
            sends.append((array, made.send(array, key[1], message.tag, async_op=True)))
        elif key[0] == "recv":
            each = _Received(message)
            each.work = made.recv(each.array, key[1], message.tag, async_op=True)
            received.append(each)
        else:
            others.append(made.all_reduce(sums[message.number], async_op=True))
    numbers: dict[tuple[int, int], int] = {}
    problems = [_problem(each, each.work.wait(), numbers) for each in received]
    for work in [*others, *(work for _, work in sends)]:
        work.wait()
    total = made.world_size * (made.world_size + 1) // 2
    if (sums != total).any():
        problems.append("a sum is wrong")
    return "; ".join(problem for problem in problems if problem)
