"""What the kernels do to memory and links, counted, against the formulas.

S is the bytes of the tensor, c the payload bytes of the wire format for each byte of the tensor, N
the number of ranks. Exponents (with their padding), epochs of packets and padding of packets are
counted apart from the payload, each by a formula of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from emulate import BLOCKED, REDUCING, Case, Emulation, Operation, problems

from dpcomm.oracle import wire as codecs
from dpcomm.schedule.plans import Algorithm, PlanStep, Primitive, algorithms, find, plan

pytestmark = pytest.mark.timeout(600)

SLOT_ELEMS = 4096  # whole tiles of every wire format
ROUNDS = 2
CTAS = 2
SLICES = 2
PACKET_BYTES = 12
ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "int8": 1}
FORMATS = [
    ("float32", "native"),
    ("float32", "fp16"),
    ("float32", "bf16"),
    ("float32", "int8"),
    ("float16", "fp16"),
    ("bfloat16", "native"),
    ("int64", "native"),
]


@dataclass(frozen=True)
class Counted:
    """One operation, cut so that nothing is left over, and what each rank did."""

    collective: str
    world: int
    algorithm: str
    dtype: str
    wire: str
    count: int
    ranks: list[dict[str, int]]

    @property
    def tensor_bytes(self) -> int:
        return self.count * codecs.tensor_dtype(self.dtype).itemsize

    @property
    def payload_bytes(self) -> int:
        """c S: of the whole tensor on the wire."""
        element = ELEMENT_BYTES.get(self.wire, codecs.tensor_dtype(self.dtype).itemsize)
        return self.count * element

    @property
    def header_bytes(self) -> int:
        """Of one message."""
        return codecs.slice_bytes(self.wire, self.dtype, SLOT_ELEMS) - (
            self.payload_bytes * SLOT_ELEMS // self.count
        )

    def steps(self, rank: int) -> list[PlanStep]:
        found = plan(
            self.algorithm, self.world, collective=self.collective, slices=SLICES, rounds=ROUNDS
        )
        return [step for step in found if step.rank == rank] * CTAS

    def sent(self, rank: int) -> int:
        """Messages."""
        return sum(len(step.send_peers) for step in self.steps(rank))


def count_one(
    emulation: Emulation,
    world: int,
    algorithm: str,
    dtype: str,
    wire: str,
    collective: str = "all_reduce",
) -> Counted:
    chunks = 1 if collective in BLOCKED else find(algorithm, collective).chunks(world)
    count = chunks * SLICES * SLOT_ELEMS * ROUNDS * CTAS
    case = Case(
        world=world,
        operations=(Operation(collective, algorithm, dtype, "sum", wire, count, ctas=CTAS),),
        ctas=CTAS,
        slots=4,
        slot_bytes=codecs.slice_bytes(wire, dtype, SLOT_ELEMS),
        count=True,
    )
    (result,) = emulation.run([case])
    assert not problems(case, result)
    return Counted(collective, world, algorithm, dtype, wire, count, result.counts())


ALGORITHMS = ("ring", "two_shot", "one_shot", "double_tree")


@pytest.fixture(
    scope="module",
    params=[(a, n, f) for a in ALGORITHMS for n, f in zip((8, 3, 2, 4) * 2, FORMATS, strict=False)],
    ids=lambda p: f"{p[0]}-{p[1]}-{p[2][0]}-{p[2][1]}",
)
def counted(request: pytest.FixtureRequest, source: Emulation) -> Counted:
    algorithm, world, (dtype, wire) = request.param
    return count_one(source, world, algorithm, dtype, wire)


def test_bytes_on_the_links(counted: Counted) -> None:
    """Ring and two-shot 2(N-1)/N cS, one-shot (N-1)cS, tree at most 2cS, and exponents."""
    world, whole = counted.world, counted.payload_bytes
    for rank, did in enumerate(counted.ranks):
        written = did["staging_remote_written_bytes"]
        payload = written - counted.header_bytes * counted.sent(rank)
        if counted.algorithm == "one_shot":
            assert payload == (world - 1) * whole
        elif counted.algorithm == "double_tree":
            assert payload <= 2 * whole
        else:
            assert payload * world == 2 * (world - 1) * whole
        assert "staging_remote_read_bytes" not in did or did["staging_remote_read_bytes"] == 0
        assert "tensor_remote_read_bytes" not in did


def test_bytes_of_memory(counted: Counted) -> None:
    """Reads of the tensor, and of slots, and writes of the tensor: nothing is touched twice."""
    world, whole, tensor = counted.world, counted.payload_bytes, counted.tensor_bytes
    for rank, did in enumerate(counted.ranks):
        assert did["tensor_written_bytes"] == tensor
        # One-shot sends the own input in one step and adds it in another.
        assert did["tensor_read_bytes"] == tensor * (2 if counted.algorithm == "one_shot" else 1)
        assert did.get("staging_written_bytes", 0) == 0
        forwarded = sum(
            len(step.recv_peers)
            for step in counted.steps(rank)
            if Primitive.RECV | Primitive.SEND in step.primitive
            and Primitive.REDUCE not in step.primitive
        )
        payload = did["staging_wide_reads"] * 16 - forwarded * counted.header_bytes
        received = sum(len(step.recv_peers) for step in counted.steps(rank))
        assert payload == received * whole * SLOT_ELEMS // counted.count
        if counted.algorithm in ("ring", "two_shot"):
            assert payload * world == 2 * (world - 1) * whole


def test_accesses_are_of_16_bytes(counted: Counted) -> None:
    """All but exponents: a byte for each block that is encoded, one for each lane that decodes."""
    blocks = SLOT_ELEMS // codecs.BLOCK_ELEMS[counted.wire] if counted.header_bytes else 0
    for rank, did in enumerate(counted.ranks):
        assert did["tensor_small_reads"] == did["tensor_small_writes"] == 0
        received = sum(len(step.recv_peers) for step in counted.steps(rank))
        assert did["staging_small_reads"] <= 32 * blocks * received
        assert did["staging_remote_small_writes"] <= counted.header_bytes * counted.sent(rank)


def test_one_fence_for_all_that_a_step_publishes(counted: Counted) -> None:
    for rank, did in enumerate(counted.ranks):
        steps = counted.steps(rank)
        flags = sum(len(step.send_peers) + len(step.recv_peers) for step in steps)
        assert did["fences"] == len(steps)
        assert did["flag_stores"] == flags
        assert did["acquires"] == flags  # one for each wait: an arrival, or a credit


def test_a_fused_fp16_ring_moves_few_bytes(source: Emulation) -> None:
    """At most 3.75 S of a rank's memory at N = 8: own reads and writes, slots written and read."""
    counted = count_one(source, 8, "ring", "float32", "fp16")
    headers = counted.header_bytes * counted.sent(0)
    for rank, did in enumerate(counted.ranks):
        incoming = counted.ranks[rank - 1]["staging_remote_written_bytes"]
        moved = did["tensor_read_bytes"] + did["tensor_written_bytes"] + incoming
        moved += did["staging_wide_reads"] * 16
        exponents = headers * 2
        assert moved - exponents <= 3.75 * counted.tensor_bytes


OTHERS = [
    (algorithm, wire)
    for algorithm in algorithms()
    if algorithm.on_devices
    for wire in ("native", "fp16")
    if algorithm.collective != "all_reduce"
    and (wire == "native" or algorithm.collective in REDUCING)
]


@pytest.mark.parametrize(
    ("algorithm", "wire"), OTHERS, ids=[f"{a.collective}-{a.name}-{wire}" for a, wire in OTHERS]
)
def test_other_collectives(source: Emulation, algorithm: Algorithm, wire: str) -> None:
    """Every step reads what it sends or adds, and writes what it keeps, once. N-1 blocks go over a
    rank's link for all_gather and reduce_scatter."""
    world, dtype = 4, "float32" if algorithm.collective in REDUCING else "uint8"
    counted = count_one(source, world, algorithm.name, dtype, wire, algorithm.collective)
    slice_bytes = SLOT_ELEMS * codecs.tensor_dtype(dtype).itemsize
    on_wire = SLOT_ELEMS * counted.payload_bytes // counted.count
    for rank, did in enumerate(counted.ranks):
        steps = counted.steps(rank)
        recv, reduce, copy = Primitive.RECV, Primitive.REDUCE, Primitive.COPY
        own = sum(recv not in step.primitive or reduce in step.primitive for step in steps)
        kept = sum(copy in step.primitive for step in steps)
        assert did.get("tensor_read_bytes", 0) == own * slice_bytes
        assert did.get("tensor_written_bytes", 0) == kept * slice_bytes
        message = on_wire + counted.header_bytes
        assert did.get("staging_remote_written_bytes", 0) == counted.sent(rank) * message
        received = sum(len(step.recv_peers) for step in steps)
        assert did.get("staging_wide_reads", 0) * 16 == received * on_wire
        assert did["fences"] == len(steps)
        if algorithm.collective in BLOCKED:
            assert counted.sent(rank) * on_wire == (world - 1) * counted.payload_bytes


@pytest.mark.parametrize("wire", ["native", "fp16", "int8"])
@pytest.mark.parametrize("count", [2048 * 3, 1234])
def test_packets(source: Emulation, wire: str, count: int) -> None:
    """(N-1) times a greeting and the own slices, 12 bytes in a packet of 16; no flag, no fence."""
    world = 5
    tile = 256 if wire == "native" else 512
    case = Case(
        world=world,
        operations=(Operation("all_reduce", "one_shot", wire=wire, count=count),),
        packets=4096,
        count=True,
    )
    (result,) = source.run([case])
    assert not problems(case, result)
    tiles = [min(tile, count - first) for first in range(0, count, tile)]
    header = 0 if wire == "native" else 16
    itemsize = ELEMENT_BYTES.get(wire, 4)
    packets = sum(math.ceil((header + itemsize * elems) / PACKET_BYTES) for elems in tiles)
    for did in result.counts():
        assert did["packet_stores"] == (world - 1) * (1 + packets)
        assert did["fences"] == did["flag_stores"] == did["acquires"] == 0
        assert did["tensor_read_bytes"] == did["tensor_written_bytes"] == 4 * count
