"""Rows, ratios, the table, files and the picture, from made-up measurements."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from dpcomm.bench.backends import BackendSpec, expand  # noqa: E402
from dpcomm.bench.cases import Case  # noqa: E402
from dpcomm.bench.cli import main  # noqa: E402
from dpcomm.bench.options import make_parser  # noqa: E402
from dpcomm.bench.report import Row, Table, make_rows, run_record, save  # noqa: E402
from dpcomm.bench.runner import POOL_BYTES, Measurement, pool_buffers  # noqa: E402
from dpcomm.bench.units import BenchError  # noqa: E402


class NamedBackend:
    """As much of a backend as a report looks at."""

    def __init__(self, label: str) -> None:
        self.spec = BackendSpec(label, label=label)


def measurement(label: str, placement: str, rounds_us: list[float], wrong: int) -> Measurement:
    return Measurement(NamedBackend(label), placement, 10, rounds_us, 3.5, wrong)


def rows_of(sizes: list[int], wrong: int = 0) -> list[Row]:
    rows = []
    for size in sizes:
        cells = [
            measurement("fast", "out-of-place", [6.0, 5.0, 50.0], 0),
            measurement("fast", "in-place", [2.0 + size / 1000, 2.0, 90.0], wrong),
            measurement("slow", "in-place", [100.0 + size / 100] * 3, 0),
        ]
        rows += make_rows(Case("all_reduce", "float", "sum", size, 2), cells, "slow")
    return rows


def test_rows() -> None:
    out, inside, slow = rows_of([1000])
    assert (out["time_us"], out["min_us"]) == (6.0, 5.0)
    assert inside["time_us"] == 3.0
    assert inside["algbw_gbps"] == inside["busbw_gbps"] == pytest.approx(1 / 3, abs=1e-5)
    assert inside["ratio"] == pytest.approx(110 / 3, abs=1e-3)
    assert out["ratio"] == pytest.approx(110 / 6, abs=1e-3)  # the reference has in-place only
    assert slow["ratio"] == 1.0
    assert (out["root"], out["op"], out["count"], out["iterations"]) == (-1, "sum", 250, 10)


def test_there_is_no_ratio_without_the_reference() -> None:
    case = Case("all_reduce", "float", "sum", 8, 2)
    rows = make_rows(case, [measurement("fast", "in-place", [1.0], 0)], "slow")
    assert rows[0]["ratio"] is None
    assert " n/a  fast" in Table(["fast", "slow"], False, False).line(rows)


@pytest.mark.parametrize("show_cpu", [False, True])
@pytest.mark.parametrize("show_min", [False, True])
def test_the_table_has_the_columns_of_nccl_tests(show_cpu: bool, show_min: bool) -> None:
    table, rows = Table(["fast", "slow"], show_cpu, show_min), rows_of([4096], wrong=7)
    header = table.header()[1]
    block = ["time", "algbw", "busbw", "#wrong"] + show_min * ["min"] + show_cpu * ["cpu"]
    names = ["size", "count", "type", "redop", "root", *block, *block, "ratio", "backend"]
    assert header.strip("# ").split() == names
    line, other = table.line(rows[:2]), table.line(rows[2:])
    assert len(line.split()) == len(other.split()) == len(names)
    assert line.split()[:5] == ["4096", "1024", "float", "sum", "-1"]
    values = dict(zip(names[5 + len(block) :], line.split()[5 + len(block) :], strict=True))
    assert (values["#wrong"], values["backend"]) == ("7", "fast")
    assert other.split()[5:9] == ["n/a"] * 4
    # Columns end where their names end, up to the last one, which is aligned to the left.
    for text in (line, other):
        assert text.rindex(" ") == header.rindex(" ")


def test_the_footer_tells_wrong_results() -> None:
    assert "0 OK" in Table(["fast", "slow"], False, False).footer(rows_of([8]))[0]
    assert "7 FAILED" in Table(["fast", "slow"], False, False).footer(rows_of([8], wrong=7))[0]


def test_json_and_csv_hold_rows_and_circumstances(tmp_path: Path) -> None:
    rows, record = rows_of([8, 4096]), run_record(2, 1, {"wire": ["native"]})
    save(tmp_path / "x.json", record, rows)
    save(tmp_path / "x.csv", record, rows)
    loaded = json.loads((tmp_path / "x.json").read_text())
    assert loaded["rows"] == rows
    for key in ("host", "world_size", "cpu", "cores", "torch", "dpcomm", "python", "options"):
        assert loaded[key] not in ("", None)
    with (tmp_path / "x.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert [float(line["time_us"]) for line in lines] == [row["time_us"] for row in rows]
    assert {line["world_size"] for line in lines} == {"2"}
    assert json.loads(lines[0]["options"]) == {"wire": ["native"]}


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_plot_draws(tmp_path: Path, suffix: str) -> None:
    image = pytest.importorskip("matplotlib.image")
    save(tmp_path / "x.json", run_record(2, 1, {}), rows_of([8, 4096, 2**20, 25 * 2**20]))
    target = tmp_path / f"y{suffix}"
    assert main(["plot", str(tmp_path / "x.json"), "-o", str(target)]) == 0
    assert 10_000 < target.stat().st_size < 1_000_000
    if suffix == ".png":
        pixels = image.imread(target)
        height, width = pixels.shape[:2]
        assert 400 < height < 1500
        assert 1000 < width < 3000
        assert 0.005 < (pixels[..., :3].mean(2) < 0.9).mean() < 0.5  # something is drawn


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "rows": []}', '{"format": 99}'])
def test_plot_refuses_other_files(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.json").write_text(text)
    assert main(["plot", str(tmp_path / "x.json")]) == 2
    assert "x.json" in capsys.readouterr().err


def test_help_fits_a_terminal() -> None:
    text = make_parser().format_help()
    for letter in "befionwcdr":
        assert f"\n  -{letter} " in text
    for name in ("--backends", "--wire", "--algo", "--wire-links", "--output", "torchrun", "plot"):
        assert name in text
    assert max(map(len, text.splitlines())) <= 100


def test_labels_tell_backends_apart() -> None:
    specs = expand(["dpcomm", "gloo"], ["native", "fp16"], ["auto"])
    assert [spec.label for spec in specs] == ["dpcomm/native", "dpcomm/fp16", "gloo"]
    assert [s.label for s in expand(["dpcomm", "gloo"], ["native"], ["auto"])] == ["dpcomm", "gloo"]
    with pytest.raises(BenchError, match="different"):
        expand(["gloo", "gloo"], ["native"], ["auto"])


def test_buffers_outgrow_the_caches() -> None:
    for size_bytes in (2**16, 2**20, 25 * 2**20, 2**30):
        assert pool_buffers(size_bytes) * size_bytes > POOL_BYTES
    for size_bytes in (1, 8, 2**15, 2**16 - 1):
        assert 1 <= pool_buffers(size_bytes) <= 64
        assert pool_buffers(size_bytes) * size_bytes <= 2**18
