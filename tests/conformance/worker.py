"""A process of the pool: one rank, or several as threads. Runs what the tests send through a pipe.

Usage: worker.py FIRST_RANK LAST_RANK. Requests and answers are pickles on stdin and stdout.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import flush_denormals
import numpy as np
import programs
from cases import (
    GATHERS,
    REDUCING,
    SCATTERS,
    Array,
    Case,
    block_sizes,
    canonical,
    counts_of,
    digest,
    has_input,
    has_output,
    input_elems,
    make_input,
    output_elems,
    own_block,
)
from dlpack import BFloat16

from dpcomm import Communicator, _core
from dpcomm.oracle import wire as codecs

GUARD = 128  # bytes before and after an array; the array starts at a 64-byte boundary + offset
GUARD_BYTE, POISON = 0x5A, 0xA5


class Buffer:
    """An array of the case's dtype at an offset, between guards."""

    def __init__(self, case: Case, elems: int) -> None:
        kind = codecs.tensor_dtype(case.dtype)
        self.memory = np.full(elems * kind.itemsize + 2 * GUARD + 64, GUARD_BYTE, np.uint8)
        address = self.memory.ctypes.data
        self.first = GUARD + (-address - GUARD) % 64 + case.offset % 64
        self.last = self.first + elems * kind.itemsize
        self.array: Array = self.memory[self.first : self.last].view(kind)
        self.dtype = case.dtype

    def poison(self) -> None:
        self.memory[self.first : self.last] = POISON

    def guards_hold(self) -> bool:
        outside = (self.memory[: self.first], self.memory[self.last :])
        return all((part == GUARD_BYTE).all() for part in outside)

    def part(self, first: int, count: int) -> Any:
        """What the communicator is given: elements [first, first + count)."""
        bits = self.array[first : first + count]
        if self.dtype == "bfloat16":
            return BFloat16(bits)
        return bits.view(np.bool_) if self.dtype == "bool" else bits


class Trial:
    """One case on this rank: buffers, the call, the checks that need no other rank."""

    def __init__(self, case: Case, rank: int, world: int) -> None:
        self.case, self.rank, self.world = case, rank, world
        self.input = Buffer(case, input_elems(case, rank, world))
        self.input.array[:] = make_input(case, rank, world)
        self.output = Buffer(case, output_elems(case, rank, world))
        self.output.poison()
        self.in_place = (
            case.in_place
            and has_input(case, rank)
            and has_output(case, rank)
            and case.collective != "all_to_all"
        )
        self._arrange()
        self.before = self.input.memory.copy()
        self.result = np.empty(0, np.uint8)

    def _arrange(self) -> None:
        case = self.case
        whole = self.input.part(0, self.input.array.size)
        self.source: Any = whole if has_input(case, self.rank) else None
        self.target: Any = None
        self.where: Array = self.output.array
        if has_output(case, self.rank):
            self.target = self.output.part(0, self.output.array.size)
        if not self.in_place:
            return
        if case.collective in GATHERS:
            first, count = own_block(case, self.rank, self.world)
            self.output.array[first : first + count] = self.input.array
            self.source = self.output.part(first, count)
        elif case.collective in SCATTERS:
            first, count = own_block(case, self.rank, self.world)
            self.target = self.input.part(first, count)
            self.where = self.input.array[first : first + count]
        else:
            self.target, self.where = whole, self.input.array

    def start(self, communicator: Communicator, async_op: bool) -> Any:
        """Through the binding itself, which also has what the public calls leave out."""
        case = self.case
        reduces = case.collective in REDUCING
        wire = case.wire if reduces else None
        counts, recv_counts = counts_of(case, self.rank, self.world)
        return getattr(communicator._core, case.collective)(
            self.source,
            self.target,
            op=case.op if reduces else "sum",
            factor=case.factor,
            root=case.root,
            settings=_core.Settings(wire, case.algorithm, None, async_op),
            counts=counts,
            recv_counts=recv_counts,
        )

    def finish(self, scribble: bool) -> dict[str, str]:
        """Keeps the result and checks; then the caller's memory may be overwritten (law 9)."""
        problems = []
        if not (self.input.guards_hold() and self.output.guards_hold()):
            problems.append("bytes outside the arrays were written")
        if has_output(self.case, self.rank):
            self.result = self.where.copy()
        if (self._input_stays() != self._input_was()).any():
            problems.append("the input was changed")
        if scribble:
            for buffer in (self.input, self.output):
                buffer.memory[:] = 0xFF
        return {
            "problem": "; ".join(problems),
            "bits": digest(self.result),
            "canonical": digest(canonical(self.case, self.result)),
        }

    def _input_was(self) -> Array:
        return self._outside_of_own_block(self.before)

    def _input_stays(self) -> Array:
        return self._outside_of_own_block(self.input.memory)

    def _outside_of_own_block(self, memory: Array) -> Array:
        """Bytes of the input's memory that no operation may change."""
        kept = memory.copy()
        if self.in_place:
            if self.case.collective in SCATTERS:
                first, count = own_block(self.case, self.rank, self.world)
                size = self.input.array.itemsize
                kept[self.input.first + first * size :][: count * size] = 0
            elif self.case.collective not in GATHERS:
                kept[self.input.first : self.input.last] = 0
        return kept


def _run_all(made: Communicator, trials: list[Trial], mode: str) -> list[dict[str, str]]:
    if mode == "sync":
        answers = []
        for trial in trials:
            trial.start(made, False)
            answers.append(trial.finish(True))
        return answers
    works = []
    for index, trial in enumerate(trials):
        blocks = mode == "mixed" and index % 3 == 2
        handle = trial.start(made, not blocks)
        if not blocks:
            works.append(handle)
    for work in reversed(works):
        work.wait()
    return [trial.finish(False) for trial in trials]


class Rank:
    """What a rank does on request."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.communicators: dict[str, Communicator] = {}
        self.trials: dict[str, list[Trial]] = {}

    def open(self, name: str, world: int, options: dict[str, Any]) -> list[tuple[int, int]]:
        """Makes a communicator; its geometry by lane."""
        made = Communicator(self.rank, world, name=name, **options)
        self.communicators[name] = made
        lanes = []
        with contextlib.suppress(RuntimeError):
            while True:
                lanes.append(made._core.geometry(len(lanes)))
        return lanes

    def close(self, name: str) -> None:
        self.communicators.pop(name).close()
        self.trials.pop(name, None)

    def choices(self, name: str, cases: list[Case]) -> list[tuple[str, str]]:
        """Algorithm and wire format that each case takes."""
        core = self.communicators[name]._core
        world = self.communicators[name].world_size

        def count(case: Case) -> int:
            """Of the largest block; the wire format hangs on it."""
            return max(block_sizes(case, world)) if case.unequal else case.count

        return [
            core.choice(
                case.collective,
                count(case),
                case.dtype,
                case.op if case.collective in REDUCING else "sum",
                _core.Settings(case.wire, case.algorithm),
            )
            for case in cases
        ]

    def run(
        self, name: str, cases: list[Case], mode: str = "sync", flush: bool = False
    ) -> list[dict[str, str]]:
        """Runs the cases one after another.

        sync: each to its end, then its memory is overwritten. async: all in flight, waited for from
        the last to the first. mixed: every third one blocks, while others are in flight. With
        `flush` the calling thread flushes denormals to zero (law 13).
        """
        made = self.communicators[name]
        trials = [Trial(case, self.rank, made.world_size) for case in cases]
        self.trials[name] = trials
        with flush_denormals.flushing() if flush else contextlib.nullcontext():
            answers = _run_all(made, trials, mode)
            assert not flush or flush_denormals.is_flushing(), "the caller's state is not restored"
        return answers

    def run_at_once(self, cases: dict[str, list[Case]]) -> dict[str, list[dict[str, str]]]:
        """Several communicators, each in a thread of its own."""
        answers: dict[str, Any] = {}

        def work(name: str) -> None:
            try:
                answers[name] = self.run(name, cases[name])
            except BaseException as error:
                answers[name] = error

        threads = [threading.Thread(target=work, args=(name,)) for name in cases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answer in answers.values():
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def result(self, name: str, index: int) -> Array:
        """The result of a case of the last run."""
        return self.trials[name][index].result

    def program(self, name: str, program: list[programs.Message], seed: int, sums: int) -> str:
        """Runs a program of messages beside `sums` all-reduces; what is wrong with its results."""
        return programs.run(self.communicators[name], program, seed, sums)

    def ring(self, name: str, rounds: int) -> str:
        """Every rank's value goes around, one neighbour at a time."""
        made = self.communicators[name]
        world = made.world_size
        value, got = np.full(1000, self.rank), np.empty(1000, int)
        for _ in range(rounds):
            if self.rank % 2 == 0:
                made.send(value, (self.rank + 1) % world)
                made.recv(got, (self.rank - 1) % world)
            else:
                made.recv(got, (self.rank - 1) % world)
                made.send(value, (self.rank + 1) % world)
            value[:] = got
        expected = (self.rank - rounds) % world
        return "" if (value == expected).all() else f"{value[0]} in place of {expected}"

    def barrier(self, name: str) -> None:
        self.communicators[name].barrier()

    def big(self, name: str, count: int) -> str:
        """An all-reduce of `count` elements of int8 in place; what is wrong with its result."""
        made = self.communicators[name]
        step = 1 << 24
        array = np.empty(count, np.int8)
        pattern = (np.arange(step, dtype=np.int64) % 61).astype(np.int8)
        for first in range(0, count, step):
            part = array[first : first + step]
            part[:] = pattern[: part.size]
            part += np.int8(self.rank + first // step % 5)
        made.all_reduce(array)
        world = made.world_size
        for first in range(0, count, step):
            part = array[first : first + step]
            added = np.int8(world * (first // step % 5) + world * (world - 1) // 2)
            expected = pattern[: part.size] * np.int8(world) + added
            if not np.array_equal(part, expected):
                return f"wrong at {first + int(np.argmax(part != expected))}"
        return ""


def read(stream: BinaryIO) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        return None
    (size,) = struct.unpack("!Q", header)
    return pickle.loads(stream.read(size))


def write(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(struct.pack("!Q", len(data)) + data)
    stream.flush()


def perform(rank: Rank, request: tuple[str, tuple[Any, ...]]) -> tuple[bool, Any]:
    try:
        return True, getattr(rank, request[0])(*request[1])
    except BaseException:
        return False, f"rank {rank.rank}:\n{traceback.format_exc()}"


def serve(first: int, last: int) -> None:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    answers_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not mix with the answers
    ranks = [Rank(rank) for rank in range(first, last + 1)]
    while (message := read(sys.stdin.buffer)) is not None:
        environment, requests = message
        for variable, text in environment.items():
            os.environ[variable] = text
        answers: dict[int, Any] = {}

        def work(index: int, requests: Any = requests, answers: dict[int, Any] = answers) -> None:
            if requests[index] is not None:
                answers[index] = perform(ranks[index], requests[index])

        if len(ranks) == 1:
            work(0)
        else:
            threads = [threading.Thread(target=work, args=(i,)) for i in range(len(ranks))]
            start: Callable[[threading.Thread], None] = threading.Thread.start
            for thread in threads:
                start(thread)
            for thread in threads:
                thread.join()
        write(answers_to, answers)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
