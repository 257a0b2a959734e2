"""PTX instructions with effects: memory, barriers, warp functions, control; and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ptx.harness import HEADER, Program, build, entry, without_address_randomisation
from ptx.syntax import PtxError, parse
from ptx.translate import translate

ALL_LANES = "0xffffffff"
FIRST = """
    .reg .b32 %i, %n, %r<32>;
    .reg .b64 %x, %out, %rd<16>;
    .reg .b16 %h<8>;
    .reg .f32 %f<8>;
    .reg .pred %p<8>;
    mov.u32 %i, %tid.x;
    mul.wide.u32 %x, %i, 4;
    ld.param.u64 %out, [p0];
    add.s64 %out, %out, %x;
"""
LAST = """
    st.global.u32 [%out], %r0;
    ret;
"""


def per_thread(name: str, body: str, parameters: int = 2) -> str:
    """Thread i stores %r0 to element i of the array p0."""
    return entry(name, parameters, FIRST + body + LAST)


KERNELS = [
    # 16 bytes at p1 + 16 * i, moved as a vector; then their sum.
    per_thread(
        "vectors",
        """
    ld.param.u64 %rd0, [p1];
    mul.wide.u32 %rd1, %i, 16;
    add.s64 %rd0, %rd0, %rd1;
    ld.global.L1::no_allocate.v4.b32 {%r1, %r2, %r3, _}, [%rd0];
    ld.global.nc.v2.u64 {%rd2, %rd3}, [%rd0];
    add.u32 %r0, %r1, %r2;
    add.u32 %r0, %r0, %r3;
    shr.u64 %rd3, %rd3, 32;
    cvt.u32.u64 %r4, %rd3;
    add.u32 %r0, %r0, %r4;
    st.global.v4.b32 [%rd0+0], {%r4, %r3, %r2, 77};
        """,
    ),
    # Sign and zero extension into wider registers, and truncation on the way back.
    per_thread(
        "widths",
        """
    ld.param.u64 %rd0, [p1];
    ld.global.s8 %r1, [%rd0];
    ld.global.u8 %r2, [%rd0];
    ld.global.s16 %r3, [%rd0+2];
    ld.global.s32 %rd1, [%rd0+4];
    cvt.u32.u64 %r4, %rd1;
    shr.u64 %rd1, %rd1, 32;
    cvt.u32.u64 %r5, %rd1;
    st.global.u8 [%rd0+8], %r3;
    add.s32 %r0, %r1, %r2;
    add.s32 %r0, %r0, %r3;
    add.s32 %r0, %r0, %r4;
    add.s32 %r0, %r0, %r5;
        """,
    ),
    # Thread i takes what thread (i + 1) % n put into shared memory, by three kinds of address.
    per_thread(
        "shared",
        """
    .shared .align 4 .b8 first[4];
    .shared .align 16 .b8 tile[2048];
    mov.u32 %n, %ntid.x;
    shl.b32 %r1, %i, 2;
    mov.u32 %r2, tile;
    add.u32 %r2, %r2, %r1;
    mul.lo.u32 %r3, %i, 3;
    st.shared.u32 [%r2], %r3;
    setp.eq.u32 %p1, %i, 0;
    @%p1 st.shared.u32 [first], 1000;
    bar.sync 0;
    add.u32 %r4, %i, 1;
    rem.u32 %r4, %r4, %n;
    mul.wide.u32 %rd0, %r4, 4;
    mov.u64 %rd1, tile;
    add.u64 %rd2, %rd1, %rd0;
    ld.shared.u32 %r5, [%rd2];
    cvta.shared.u64 %rd3, %rd2;
    ld.u32 %r6, [%rd3];
    cvta.to.shared.u64 %rd4, %rd3;
    ld.shared.u32 %r7, [%rd4];
    ld.shared.u32 %r8, [tile+8];
    ld.shared.u32 %r9, [first];
    add.u32 %r0, %r5, %r6;
    add.u32 %r0, %r0, %r7;
    add.u32 %r0, %r0, %r8;
    add.u32 %r0, %r0, %r9;
        """,
    ),
    # A struct parameter read at fixed and at computed offsets, and through a generic address.
    f""".visible .entry parameters(.param .align 8 .b8 whole[40]) {{
{FIRST.replace("[p0]", "[whole]")}
    mov.b64 %rd0, whole;
    and.b32 %r1, %i, 3;
    mul.wide.u32 %rd1, %r1, 8;
    add.s64 %rd2, %rd0, %rd1;
    ld.param.u32 %r2, [%rd2+8];
    ld.param.u8 %h0, [whole+12];
    cvta.param.u64 %rd3, %rd2;
    ld.u32 %r3, [%rd3+8];
    cvt.u32.u16 %r4, %h0;
    add.u32 %r0, %r2, %r3;
    add.u32 %r0, %r0, %r4;
{LAST}}}
""",
    # Local memory.
    per_thread(
        "locals",
        """
    .local .align 8 .b8 depot[16];
    .reg .b64 %SP, %SPL;
    mov.u64 %SPL, depot;
    cvta.local.u64 %SP, %SPL;
    st.local.u32 [%SPL+4], %i;
    ld.u32 %r0, [%SP+4];
        """,
    ),
    # Memory of the module.
    ".global .align 8 .b8 table[12] = {1, 0, 0, 0, 2, 0, 0, 0, 3};\n"
    ".const .align 4 .u32 numbers[3] = {10, 20, 0x1E};\n"
    + per_thread(
        "module_memory",
        """
    rem.u32 %r1, %i, 3;
    mul.wide.u32 %rd0, %r1, 4;
    mov.u64 %rd1, table;
    cvta.global.u64 %rd2, %rd1;
    add.s64 %rd2, %rd2, %rd0;
    ld.u32 %r2, [%rd2];
    mov.u64 %rd3, numbers;
    add.s64 %rd3, %rd3, %rd0;
    ld.const.u32 %r3, [%rd3];
    ld.global.u32 %r4, [table+4];
    add.u32 %r0, %r2, %r3;
    add.u32 %r0, %r0, %r4;
        """,
    ),
    # Where a thread is.
    per_thread(
        "places",
        """
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ctaid.y;
    mov.u32 %r3, %nctaid.x;
    mov.u32 %n, %ntid.x;
    mad.lo.u32 %r4, %r2, %r3, %r1;
    mul.lo.u32 %r4, %r4, %n;
    mul.wide.u32 %rd0, %r4, 4;
    add.s64 %out, %out, %rd0;
    add.u32 %r0, %r4, %i;
    mov.u32 %r5, %laneid;
    shl.b32 %r5, %r5, 16;
    or.b32 %r0, %r0, %r5;
        """,
    ),
    # A switch: 0, 1, 2 by table, anything else skips it.
    per_thread(
        "tables",
        """
    rem.u32 %r1, %i, 4;
    mov.u32 %r0, 9;
    setp.gt.u32 %p0, %r1, 2;
    @%p0 bra $end;
$table: .branchtargets $zero, $one, $zero;
    brx.idx %r1, $table;
$zero:
    mov.u32 %r0, 100;
    bra.uni $end;
$one: mov.u32 %r0, 101;
$end:
        """,
    ),
    # A loop, a guard, and two scopes with a register and a label of the same name.
    per_thread(
        "loops",
        """
    mov.u32 %r0, 0;
    mov.u32 %r1, 0;
again:
    add.u32 %r0, %r0, %r1;
    add.u32 %r1, %r1, 1;
    setp.le.u32 %p0, %r1, %i;
    @%p0 bra again;
    { .reg .b32 one; .reg .pred %p0; mov.u32 one, 1; setp.eq.u32 %p0, %i, 3; @%p0 bra skip;
      add.u32 %r0, %r0, one; skip: }
    { .reg .b32 one; mov.u32 one, 1000; bra skip; add.u32 %r0, %r0, one; skip:
      add.u32 %r0, %r0, one; }
    @!%p0 add.u32 %r0, %r0, 5;
        """,
    ),
    per_thread("never", "trap;"),
    per_thread("half_a_warp", f"vote.sync.ballot.b32 %r0, %p0, {0xFFFF};"),
    per_thread("misaligned", "ld.global.u32 %r0, [%out+2];"),
    per_thread("misaligned_vector", "ld.global.v2.u32 {%r0, %r1}, [%out+4];"),
    per_thread(
        "beyond_shared",
        ".shared .align 4 .b8 tile[64]; shl.b32 %r1, %i, 2; ld.shared.u32 %r0, [%r1];",
    ),
    # Each lane: its value by four shuffles, and whether the source was in range.
    *(
        per_thread(
            f"shuffle_{mode}_{amount}_{clamp:x}",
            f"""
    mul.lo.u32 %r1, %i, 10;
    shfl.sync.{mode}.b32 %r2|%p1, %r1, {amount}, {clamp:#x}, {ALL_LANES};
    selp.u32 %r3, 1000, 0, %p1;
    add.u32 %r0, %r2, %r3;
            """,
        )
        for mode, amount, clamp in [
            ("up", 3, 0),
            ("down", 5, 0x1F),
            ("bfly", 7, 0x1F),
            ("idx", 2, 0x1F),
            ("bfly", 9, 0x181F),
            ("up", 2, 0x1800),
            ("down", 2, 0x181F),
            ("idx", 3, 0x181F),
        ]
    ),
    per_thread(
        "votes",
        f"""
    setp.eq.u32 %p0, %i, 5;
    vote.sync.any.pred %p1, %p0, {ALL_LANES};
    vote.sync.all.pred %p2, %p0, {ALL_LANES};
    vote.sync.all.pred %p3, !%p2, {ALL_LANES};
    vote.sync.uni.pred %p4, %p0, {ALL_LANES};
    vote.sync.ballot.b32 %r1, %p0, {ALL_LANES};
    selp.u32 %r2, 1000, 0, %p1;
    selp.u32 %r3, 2000, 0, %p2;
    selp.u32 %r4, 4000, 0, %p3;
    selp.u32 %r5, 8000, 0, %p4;
    add.u32 %r0, %r1, %r2;
    add.u32 %r0, %r0, %r3;
    add.u32 %r0, %r0, %r4;
    add.u32 %r0, %r0, %r5;
        """,
    ),
    *(
        per_thread(
            f"redux_{operation}_{t}",
            f"""
    mad.lo.s32 %r1, %i, 7919, -100000;
    redux.sync.{operation}.{t} %r0, %r1, {ALL_LANES};
            """,
        )
        for operation, t in [
            ("add", "u32"),
            ("min", "s32"),
            ("max", "s32"),
            ("min", "u32"),
            ("and", "b32"),
            ("or", "b32"),
            ("xor", "b32"),
        ]
    ),
]

# Block 0 writes data and then a flag, block 1 waits for the flag and takes the data. p1: 0 or more
# words; word 0 is the data, words 8 and 9 the flag.
HANDSHAKE = """
    ld.param.u64 %rd0, [p0];
    mov.u32 %r1, %ctaid.x;
    setp.ne.u32 %p0, %r1, 0;
    mov.u32 %r0, 0;
    setp.ne.u32 %p1, %i, 0;
    @%p0 bra taker;
    @%p1 bra met;
    st.global.u32 [%rd0], 4711;
met:
    {publish}
    @%p1 bra end;
    st.relaxed.sys.global.u64 [%rd0+128], 1;
    bra end;
taker:
    @%p1 bra wait_over;
poll:
    ld.relaxed.sys.global.u64 %rd1, [%rd0+128];
    {pause}
    setp.ne.s64 %p2, %rd1, 1;
    @%p2 bra poll;
    {acquire}
wait_over:
    bar.sync 0;
    ld.global.u32 %r0, [%rd0];
    add.s64 %out, %out, 256;
    st.global.u32 [%out], %r0;
end:
    ret;
"""
FENCE = "fence.acq_rel.sys;"
ACQUIRE = "ld.acquire.sys.global.u64 %rd1, [%rd0+128];"


def handshake(name: str, publish: str, pause: str, acquire: str) -> str:
    body = HANDSHAKE.format(publish=publish, pause=pause, acquire=acquire)
    return entry(name, 1, FIRST + body)


HANDSHAKES = [
    handshake("sound", "bar.sync 0; " + FENCE, "nanosleep.u32 32;", ACQUIRE),
    handshake("no_pause", "bar.sync 0; membar.sys;", "", ACQUIRE),
    handshake("no_fence", "bar.sync 0;", "nanosleep.u32 32;", ACQUIRE),
    handshake("fence_before_barrier", FENCE + " bar.sync 0;", "nanosleep.u32 32;", ACQUIRE),
    handshake("fence_of_the_block", "bar.sync 0; fence.acq_rel.cta;", "", ACQUIRE),
    handshake("no_acquire", "bar.sync 0; " + FENCE, "nanosleep.u32 32;", ""),
    handshake(
        "store_after_fence",
        "bar.sync 0; " + FENCE + " @!%p1 st.global.u32 [%rd0], 4712;",
        "nanosleep.u32 32;",
        ACQUIRE,
    ),
]


@pytest.fixture(scope="module")
def program() -> Program:
    return Program("effects", HEADER + "".join(KERNELS) + "".join(HANDSHAKES[:2]))


def threads_of(program: Program, kernel: str, *arguments: Any, threads: int = 64) -> Any:
    """What each thread stored."""
    result = np.full(threads, 0xDEADBEEF, dtype=np.uint32)
    assert program.run(kernel, [result, *arguments], threads=threads) == ""
    return result


def test_vectors(program: Program) -> None:
    data = np.arange(100, 100 + 64 * 4, dtype=np.uint32)
    before = data.reshape(64, 4).copy()
    aligned = np.zeros(64 * 4 + 4, dtype=np.uint32)
    offset = -aligned.ctypes.data % 16 // 4
    view = aligned[offset : offset + 256]
    view[:] = data
    result = threads_of(program, "vectors", view)
    assert (result == before.sum(axis=1)).all()
    after = view.reshape(64, 4)
    assert (after[:, :3] == before[:, [3, 2, 1]]).all()
    assert (after[:, 3] == 77).all()


def test_widths(program: Program) -> None:
    data = np.zeros(2, dtype=np.uint64)
    content = data.view(np.uint8)
    content[:8] = [0xFE, 0, 0x34, 0x92, 0xFD, 0xFF, 0xFF, 0xFF]
    result = threads_of(program, "widths", data)
    wanted = (-2 + 0xFE + (0x9234 - 0x10000) - 3 - 1) % (1 << 32)
    assert (result == wanted).all()
    assert content[8] == 0x34


def test_shared(program: Program) -> None:
    for threads in (32, 96, 512):
        result = threads_of(program, "shared", 0, threads=threads)
        behind = (np.arange(threads) + 1) % threads
        assert (result == 9 * behind + 6 + 1000).all()


def test_parameters(program: Program) -> None:
    result = np.zeros(64, dtype=np.uint32)
    words = [0x0000_0007_0000_0001, 2, 3, 4]
    assert program.run("parameters", [result, *words], threads=64) == ""
    assert (result == np.tile([2, 4, 6, 8], 16) + 7).all()


def test_locals_tables_loops(program: Program) -> None:
    i = np.arange(64)
    assert (threads_of(program, "locals", 0) == i).all()
    assert (threads_of(program, "tables", 0) == np.tile([100, 101, 100, 9], 16)).all()
    sums = i * (i + 1) // 2 + (i != 3) + 1000 + 5
    assert (threads_of(program, "loops", 0) == sums).all()


def test_module_memory(program: Program) -> None:
    i = np.arange(64)
    assert (threads_of(program, "module_memory", 0) == (i % 3 + 1) * 11 + 2).all()


def test_places(program: Program) -> None:
    result = np.zeros(3 * 2 * 64, dtype=np.uint32)
    assert program.run("places", [result, 0], blocks=(3, 2), threads=64, seed=3) == ""
    i = np.arange(len(result))
    assert (result == i | (i % 32) << 16).all()


def shuffled(mode: str, amount: int, clamp: int, lane: int) -> tuple[int, bool]:
    """Source lane and validity, as the PTX ISA's pseudo code has them."""
    segment, limit = clamp >> 8 & 31, clamp & 31
    last, first = lane & segment | limit & ~segment & 31, lane & segment
    source = {
        "up": lane - amount,
        "down": lane + amount,
        "bfly": lane ^ amount,
        "idx": first | amount & ~segment & 31,
    }[mode]
    valid = source >= last if mode == "up" else source <= last
    return (source if valid else lane), valid


def test_shuffles(program: Program) -> None:
    names = [match for text in KERNELS for match in re.findall(r"\.entry (shuffle_\w+)", text)]
    assert len(names) == 8
    for name in names:
        _, mode, amount, clamp = name.split("_")
        result = threads_of(program, name, 0)
        for i in range(64):
            source, valid = shuffled(mode, int(amount), int(clamp, 16), i % 32)
            assert result[i] == (i // 32 * 32 + source) * 10 + 1000 * valid, (name, i)


def test_votes(program: Program) -> None:
    result = threads_of(program, "votes", 0)
    assert (result[:32] == (1 << 5) + 1000 + 4000).all()
    assert (result[32:] == 4000 + 8000).all()


def test_reductions(program: Program) -> None:
    values = [[i * 7919 - 100000 for i in range(w, w + 32)] for w in (0, 32)]
    functions: dict[str, Any] = {
        "add_u32": sum,
        "min_s32": min,
        "max_s32": max,
        "min_u32": lambda v: min(x % (1 << 32) for x in v),
        "and_b32": np.bitwise_and.reduce,
        "or_b32": np.bitwise_or.reduce,
        "xor_b32": np.bitwise_xor.reduce,
    }
    for name, function in functions.items():
        result = threads_of(program, f"redux_{name}", 0)
        for warp in range(2):
            wanted = int(function(values[warp])) % (1 << 32)
            assert (result[warp * 32 : warp * 32 + 32] == wanted).all(), name


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        ("never", "trap"),
        ("half_a_warp", "without all lanes"),
        ("misaligned", "misaligned"),
        ("misaligned_vector", "misaligned"),
        ("beyond_shared", "outside of the block's shared memory"),
    ],
)
def test_what_a_device_forbids(program: Program, kernel: str, problem: str) -> None:
    result = np.zeros(66, dtype=np.uint64)
    said = program.run(kernel, [result, 0], threads=64)
    assert problem in said
    assert re.search(r"line \d+ of the PTX", said)


@pytest.mark.parametrize("kernel", ["sound", "no_pause"])
def test_handshake(program: Program, kernel: str) -> None:
    """In every order, and a poll without a pause lets others run, too."""
    for seed in range(20):
        memory = np.zeros(1024, dtype=np.uint32)
        assert program.run(kernel, [memory], blocks=(2, 1), threads=32, seed=seed) == ""
        assert memory[0] == 4711
        assert (memory[64:96] == 4711).all()


# --- thread sanitizer ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def sanitized() -> Path:
    return build("handshakes", HEADER + "".join(HANDSHAKES), thread_sanitizer=True)


@pytest.mark.parametrize(
    ("kernel", "races"),
    [
        ("sound", False),
        ("no_pause", False),
        ("no_fence", True),
        ("fence_before_barrier", True),
        ("fence_of_the_block", True),
        ("no_acquire", True),
        ("store_after_fence", True),
    ],
)
def test_races(sanitized: Path, kernel: str, races: bool) -> None:
    reported = 0
    for seed in (1, 2, 3):
        done = subprocess.run(
            [*without_address_randomisation(), str(sanitized), kernel, str(seed), "2"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "TSAN_OPTIONS": "exitcode=66"},
        )
        assert done.returncode in (0, 66), done.stdout + done.stderr
        reported += "data race" in done.stderr
    assert reported == (3 if races else 0)


# --- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.u32 %r0, %r1;",
        "add.ftz.f32 %f0, %f1, %f2;",
        "add.rz.f32 %f0, %f1, %f2;",
        "div.approx.f32 %f0, %f1, %f2;",
        "div.full.f32 %f0, %f1, %f2;",
        "sqrt.approx.f32 %f0, %f1;",
        "ex2.approx.f32 %f0, %f1;",
        "add.s32 %r0, %r1;",
        "add.s32 %r0, %r1, %rd1;",
        "add.s32 %r0, %r1, %f1, %f2;",
        "add.f32 %f0, %f1, 1;",
        "add.s32 %r0, %r1, 0x1ffffffff;",
        "add.s32 %r0, %r1, %nobody;",
        "mov.u32 %r0, %clock;",
        "atom.global.add.u32 %r0, [%x], 1;",
        "red.global.add.u32 [%x], 1;",
        "ld.global.sys.u32 %r0, [%x];",
        "ld.relaxed.global.u32 %r0, [%x];",
        "ld.relaxed.sys.global.v4.u32 {%r0, %r1, %r2, %r3}, [%x];",
        "ld.relaxed.sys.global.u8 %r0, [%x];",
        "ld.global.L1::forget.u32 %r0, [%x];",
        "ld.global.v4.u32 {%r0, %r1, %r2}, [%x];",
        "ld.shared.u32 %r0, [elsewhere];",
        "cp.async.ca.shared.global [%x], [%x], 16;",
        "bar.sync 1;",
        "bar.sync 0, 64;",
        "bar.arrive 0, 64;",
        "fence.proxy.async;",
        "fence.acq_rel;",
        "vote.any.pred %p0, %p1;",
        "shfl.up.b32 %r0, %r1, 1, 0;",
        "shfl.sync.up.b64 %r0, %r1, 1, 0, -1;",
        "setp.lt.b32 %p0, %r0, %r1;",
        "setp.less.s32 %p0, %r0, %r1;",
        "setp.lt.ftz.f32 %p0, %f0, %f1;",
        "cvt.u32.f32 %r0, %f0;",
        "cvt.f32.s32 %f0, %r0;",
        "cvt.rz.f32.f64 %f0, %rd0;",
        "cvt.rn.e4m3x2.f32 %h0, %f0, %f1;",
        "bra nowhere;",
        "call helper;",
        "prmt.f4e.b32 %r0, %r1, %r2, %r3;",
        "@%r0 mov.u32 %r0, 0;",
    ],
)
def test_unknown_is_refused(instruction: str) -> None:
    text = HEADER + per_thread("refused", "\n\n" + instruction)
    wanted_line = text[: text.index(instruction)].count("\n") + 1
    module = parse(text, "some.ptx")
    with pytest.raises(PtxError) as refused:
        translate(module, module.entries[0])
    assert str(refused.value).startswith(f"some.ptx:{wanted_line}: ")
    assert str(refused.value).endswith(instruction.rstrip(";"))


@pytest.mark.parametrize(
    "text",
    [
        ".func helper() { ret; }",
        ".extern .shared .align 16 .b8 dynamic[];",
        ".address_size 32",
        ".visible .entry unfinished() { ret;",
        ".visible .entry odd() { .reg .quad %q; ret; }",
        ".visible .entry odd() { mov.u32 %r0, 3 4; ret; }",
        ".visible .entry odd() { .section .debug; ret; }",
    ],
)
def test_unreadable_is_refused(text: str) -> None:
    with pytest.raises(PtxError, match=r"^some\.ptx:\d+: "):
        parse(text, "some.ptx")


# --- with nvcc -----------------------------------------------------------------------------------
CUDA = """
struct Arguments { unsigned* out; float scale; short steps[5]; };
__constant__ int weights[4] = {1, -2, 3, -4};

extern "C" __global__ void mixture(const __grid_constant__ Arguments a) {
  __shared__ float tile[128];
  const unsigned i = threadIdx.x;
  tile[i] = a.scale * i;
  __syncthreads();
  float sum = 0;
  for (int s = 0; s < 5; ++s) {
    const float x = tile[(i + a.steps[s]) % blockDim.x];
    switch ((i + s) % 7) {
      case 0: sum += x; break;
      case 1: sum -= x; break;
      case 2: sum = fmaxf(sum, x); break;
      case 3: sum = fminf(sum, x); break;
      case 4: sum = sum * 0.5f + x; break;
      case 5: sum += weights[(i + s) & 3]; break;
      default: sum = x / 3.0f; break;
    }
  }
  long long wide = static_cast<long long>(sum * 1000) * -12345 / 77;
  wide ^= __popc(i) + (static_cast<unsigned long long>(wide) >> 40);
  a.out[i] = static_cast<unsigned>(wide) + static_cast<unsigned char>(__float2int_rn(sum));
}
"""


def mixture(scale: float, steps: list[int], threads: int) -> list[int]:
    f = np.float32
    tile = [f(scale) * f(i) for i in range(threads)]
    weights, results = [1, -2, 3, -4], []
    for i in range(threads):
        total = f(0)
        for s in range(5):
            x = tile[(i + steps[s]) % threads]
            choices: list[Any] = [
                lambda t, x: t + x,
                lambda t, x: t - x,
                max,
                min,
                lambda t, x: t * f(0.5) + x,
                lambda t, x, k=(i + s) & 3: t + f(weights[k]),
                lambda t, x: x / f(3),
            ]
            total = choices[(i + s) % 7](total, x)
        product = int(total * f(1000)) * -12345
        wide = abs(product) // 77 * (1 if product >= 0 else -1)
        wide ^= bin(i).count("1") + ((wide % (1 << 64)) >> 40)
        results.append((wide + round(float(total)) % 256) % (1 << 32))
    return results


@pytest.mark.parametrize("arch", ["75", "90", "120"])
def test_cuda_source(tmp_path: Path, arch: str) -> None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("nvcc is missing: PTX cannot be made from CUDA source")
    (tmp_path / "mixture.cu").write_text(CUDA)
    target = tmp_path / "mixture.ptx"
    command = [nvcc, "-O3", "--fmad=false", f"-arch=compute_{arch}", "-ptx"]
    subprocess.run([*command, str(tmp_path / "mixture.cu"), "-o", str(target)], check=True)
    program = Program(f"mixture_{arch}", target.read_text())
    result = np.zeros(128, dtype=np.uint32)
    steps = [1, 5, 17, 100, 64]
    packed = np.array([0, *([0] * 2)], dtype=np.uint64)
    packed[0] = result.ctypes.data
    packed.view(np.float32)[2] = 0.37
    packed.view(np.int16)[6:11] = steps
    assert program.run("mixture", [int(word) for word in packed], threads=128) == ""
    assert result.tolist() == mixture(0.37, steps, 128)
