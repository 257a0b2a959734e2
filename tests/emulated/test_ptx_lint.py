"""The lint of the PTX: it finds nothing in the kernels, and each planted fault."""

from __future__ import annotations

from pathlib import Path

import plants
import pytest
from ptx import kernels, lint
from ptx.harness import HEADER, entry
from ptx.syntax import parse

needs_nvcc = pytest.mark.skipif(bool(kernels.missing()), reason=kernels.missing() or "-")

BODY = """
    .reg .b64 %flag, %data, %rd<4>;
    .reg .b32 %r<4>;
    .reg .f32 %f<4>;
    .reg .pred %p<4>;
    .reg .b128 %packet;
    ld.param.u64 %flag, [p0];
    ld.param.u64 %data, [p1];
    ld.relaxed.sys.global.u64 %rd1, [%data+8];
    bar.sync 0;
poll:
    ld.relaxed.sys.global.u64 %rd0, [%flag];
    setp.ne.s64 %p0, %rd0, 1;
    nanosleep.u32 32;
    @%p0 bra poll;
    ld.acquire.sys.global.u64 %rd0, [%flag];
    bar.sync 0;
    ld.global.f32 %f0, [%data];
    add.rn.f32 %f0, %f0, %f0;
    st.global.f32 [%data], %f0;
    ld.relaxed.sys.global.b128 %packet, [%data+16];
    st.relaxed.sys.global.b128 [%data+32], %packet;
    bar.sync 0;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 bra leave;
    fence.acq_rel.sys;
    st.relaxed.sys.global.u64 [%flag+128], 1;
    st.shared.u32 [%r1], %r2;
    @%p0 bra leave;
    st.relaxed.sys.global.u64 [%flag+256], 1;
    @%p0 bra poll;
leave:
    bar.sync 0;
    st.relaxed.sys.global.u64 [%data+8], %rd1;
    ret;
"""

#: (text, what becomes of it, the rule that has to find it)
FAULTS = [
    (
        "st.relaxed.sys.global.u64 [%flag+128]",
        "st.relaxed.gpu.global.u64 [%flag+128]",
        "scope .sys",
    ),
    ("ld.relaxed.sys.global.u64", "ld.relaxed.gpu.global.u64", "scope .sys"),
    ("ld.acquire.sys", "ld.acquire.cta", "scope .sys"),
    ("st.relaxed.sys.global.b128", "st.relaxed.gpu.global.b128", "scope .sys"),
    ("fence.acq_rel.sys", "fence.acq_rel.gpu", "fence.acq_rel.sys"),
    ("fence.acq_rel.sys", "fence.sc.sys", "fence.acq_rel.sys"),
    ("fence.acq_rel.sys", "membar.sys", "fence.acq_rel.sys"),
    ("    fence.acq_rel.sys;\n", "", "no fence right before"),
    ("    fence.acq_rel.sys;\n", "@%p0 fence.acq_rel.sys;\n", "no fence right before"),
    ("fence.acq_rel.sys;", "fence.acq_rel.sys; bar.sync 0;", "no fence right before"),
    ("fence.acq_rel.sys;", "fence.acq_rel.sys; st.global.u32 [%data], %r0;", "no fence right"),
    ("fence.acq_rel.sys;", "fence.acq_rel.sys; st.u32 [%data], %r0;", "no fence right before"),
    ("@%p1 bra leave;", "@%p1 bra second;", "no fence right before"),
    ("@%p0 bra leave;", "fence.acq_rel.sys;", "a second fence"),
    ("ld.acquire.sys.global.u64 %rd0, [%flag];", "", "never acquired"),
    (
        "ld.acquire.sys.global.u64 %rd0, [%flag];",
        "ld.acquire.sys.global.u64 %rd0, [%data];",
        "never",
    ),
    ("ld.global.f32", "ld.global.nc.f32", "read-only"),
    ("ld.global.f32", "ld.const.f32", "read-only"),
    ("ld.global.f32", "ld.volatile.global.f32", "volatile"),
    ("st.global.f32", "st.volatile.global.f32", "volatile"),
    ("add.rn.f32", "add.ftz.f32", "flushing"),
    ("add.rn.f32", "add.rz.f32", "nearest"),
    ("add.rn.f32 %f0,", "fma.rn.f32 %f0, %f1,", "fused"),
    ("add.rn.f32", "div.approx.f32", "approximation"),
    ("add.rn.f32", "div.full.f32", "approximation"),
    ("bar.sync 0;", "bar.sync 0, 64;", "all threads"),
    ("bar.sync 0;", "red.global.add.u32 [%data], 1;", "one writer"),
    (
        "ld.relaxed.sys.global.b128 %packet,",
        "ld.relaxed.sys.global.v4.b32 {%r0, %r1, %r2, %r3},",
        "several accesses",
    ),
]


def findings(body: str) -> list[lint.Finding]:
    return lint.lint(parse(HEADER + entry("sample", 2, body), "sample.ptx"))


def test_the_sample_is_clean() -> None:
    assert findings(BODY) == []


@pytest.mark.parametrize(("old", "new", "rule"), FAULTS)
def test_faults_in_the_sample(old: str, new: str, rule: str) -> None:
    assert old in BODY
    body = BODY.replace(old, new, 1)
    body = body.replace(
        "    st.relaxed.sys.global.u64 [%flag+256]",
        "second:\n    st.relaxed.sys.global.u64 [%flag+256]",
    )
    found = findings(body)
    assert any(rule in finding.rule for finding in found), found
    line = (HEADER + entry("sample", 2, body)).splitlines()[found[0].line - 1]
    assert found[0].text.rstrip(";") in line


def test_a_fence_for_no_flag() -> None:
    found = findings("    fence.acq_rel.sys;\n    ret;\n")
    assert [finding.rule for finding in found] == ["a fence, and no flag that it is for"]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", lint.ARCHITECTURES)
def test_the_kernels_are_clean(arch: str) -> None:
    module = kernels.module_of(arch, kernels.FEW)
    assert not lint.lint(module)
    for kernel in module.entries:
        counts = lint.summary(kernel)
        if kernel.name.startswith("packets_"):
            assert counts["packets"] > 1
            assert counts["fences"] == counts["flag stores"] == counts["polls"] == 0
        else:
            assert counts["fences"] == 1  # a step publishes in one place
            assert counts["flag stores"] == counts["acquires"] == 2  # arrivals and credits
            assert counts["polls"] >= 2


@needs_nvcc
@pytest.mark.campaign
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("arch", lint.ARCHITECTURES)
def test_all_kernels_are_clean(arch: str) -> None:
    assert not lint.lint(kernels.module_of(arch, kernels.all_kernels()))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("flag_scope_of_the_device", "scope .sys"),
        ("fence_left_out", "no fence right before"),
        ("acquire_left_out", "never acquired"),
    ],
)
def test_faults_in_the_kernels(name: str, rule: str) -> None:
    (plant,) = (plant for plant in plants.PLANTS if plant.name == name)
    module = kernels.module_of("90", (kernels.COPIES,), [plants.planted(plant)])
    assert any(rule in finding.rule for finding in lint.lint(module))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, odd = (tmp_path / f"{name}.ptx" for name in ("good", "bad", "odd"))
    good.write_text(HEADER + entry("sample", 2, BODY))
    bad.write_text(HEADER + entry("sample", 2, BODY.replace("relaxed.sys", "relaxed.gpu")))
    odd.write_text(".func helper() { ret; }")
    assert lint.main([str(good)]) == 0
    assert "1 fences, 2 flag stores" in capsys.readouterr().out
    assert lint.main([str(bad)]) == 1
    line = bad.read_text().splitlines().index("    ld.relaxed.gpu.global.u64 %rd1, [%data+8];") + 1
    assert f"bad.ptx:{line}: sample: what peers see needs scope .sys" in capsys.readouterr().out
    assert lint.main([str(odd)]) == 2
