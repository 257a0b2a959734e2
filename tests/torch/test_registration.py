"""How torch learns the name, what importing does not do, options and environment."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import launch

import dpcomm
import dpcomm.backend

PACKAGE = Path(dpcomm.__file__).resolve().parents[1]


def python(code: str, *, path: tuple[Path, ...] = (), **env: str) -> str:
    """Runs code in a fresh interpreter and returns what it prints."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in (*path, PACKAGE)),
        **env,
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_entry_point_alone(tmp_path: Path) -> None:
    """`import torch` makes the name known, loads no library and starts no thread."""
    info = tmp_path / "dpcomm-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dpcomm\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ndpcomm = dpcomm._autoload:register\n")
    printed = python(
        "import torch, sys, os\n"
        "import torch.distributed as dist\n"
        "print(dist.Backend.DPCOMM, dist.Backend.backend_capability['dpcomm'])\n"
        "print('dpcomm._torch' in sys.modules, 'dpcomm._core' in sys.modules)\n"
        "print(sorted(dist.Backend.default_device_backend_map.items())[:2])\n",
        path=(tmp_path,),
    )
    assert printed.splitlines() == [
        "dpcomm ['cpu', 'cuda']",
        "False False",
        "[('cpu', 'gloo'), ('cuda', 'nccl')]",
    ]


def test_autoload_never_raises() -> None:
    """Also where dpcomm cannot be imported at all or torch has no torch.distributed."""
    python(
        "import sys, types\n"
        "sys.modules['torch'] = types.ModuleType('torch')\n"
        "from dpcomm import _autoload\n"
        "_autoload.register()\n"
        "sys.modules['dpcomm.backend'] = None\n"
        "_autoload.register()\n"
    )


def test_import_starts_nothing_and_needs_no_torch() -> None:
    printed = python(
        "import sys, os\n"
        "sys.modules['torch'] = None\n"
        "threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = threads()\n"
        "import dpcomm\n"
        "import dpcomm.backend, dpcomm.options\n"
        "print(threads() - before)\n"
        "print(dpcomm.Options(wire='fp16').wire)\n"
        "try:\n"
        "    with dpcomm.wire('fp16'): pass\n"
        "except ImportError as error: print('torch' in str(error))\n"
    )
    assert printed.splitlines() == ["0", "fp16", "True"]
    printed = python(
        "import torch, os, sys\n"
        "threads = lambda: len(os.listdir('/proc/self/task'))\n"
        "before = threads()\n"
        "import dpcomm, dpcomm.backend\n"
        "print(threads() - before, 'dpcomm._torch' in sys.modules)\n"
        "dpcomm.backend.binding()\n"
        "print(threads() - before)\n"
        "import torch.distributed as dist\n"
        "first = dist.Backend._plugins['DPCOMM']\n"
        "dpcomm.backend.register()\n"
        "backend = dist.Backend\n"
        "print(backend._plugins['DPCOMM'] is first, backend.backend_list.count('dpcomm'))\n"
    )
    assert printed.splitlines() == ["0 False", "0", "True 1"]


def test_options_are_checked() -> None:
    refused = {
        "wire='fp8' is none of native, fp16, bf16, int8": {"wire": "fp8"},
        "wire_links='some' is none of network, all": {"wire_links": "some"},
        "transport='tcp' is none of": {"transport": "tcp"},
        "is not a positive time": {"timeout": 0},
        "is not a positive": {"timeout": float("inf")},
        "neither seconds nor": {"timeout": "soon"},
        "is not a name": {"algorithm": 3},
    }
    for text, arguments in refused.items():
        with pytest.raises(dpcomm.UsageError, match=text):
            dpcomm.Options(**arguments)
    with pytest.raises(TypeError):
        dpcomm.Options(wires="fp16")  # type: ignore[call-arg]
    options = dpcomm.Options(wire="fp16", timeout=timedelta(seconds=1.5))
    assert copy.deepcopy(options) == options
    assert options.chosen() == {"wire": "fp16", "timeout_ms": 1500}
    assert dpcomm.Options().chosen() == {}
    with pytest.raises(AttributeError):
        options.wire = "native"  # type: ignore[misc]
    with pytest.raises(dpcomm.UsageError), dpcomm.wire("fp8"):
        pass


def test_options_name_what_the_library_has() -> None:
    from dpcomm import options

    assert list(options._WIRES) == dpcomm.backend.binding().wires()
    assert "auto" in dpcomm.backend.binding().algorithms()


def in_use(group: dist.ProcessGroup | None = None) -> dict[str, object]:
    backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
    return {**dpcomm.backend.binding().options(backend)}


def choices(rank: int, world: int) -> None:
    """The environment, pg_options and torch's timeout; pg_options win."""
    dist.init_process_group("dpcomm", timeout=timedelta(seconds=40))
    assert (in_use()["wire"], in_use()["wire_links"]) == ("native", "network")
    assert (in_use()["algorithm"], in_use()["timeout_ms"]) == ("auto", 40_000)
    os.environ.update(DPCOMM_WIRE="bf16", DPCOMM_WIRE_LINKS="all", DPCOMM_ALGO="ring")
    os.environ["DPCOMM_TIMEOUT"] = "50"
    group = dist.new_group(timeout=timedelta(seconds=40))
    assert (in_use(group)["wire"], in_use(group)["wire_links"]) == ("bf16", "all")
    assert (in_use(group)["algorithm"], in_use(group)["timeout_ms"]) == ("ring", 50_000)
    options = dpcomm.Options(wire="fp16", wire_links="network", algorithm="two_shot", timeout=60)
    group = dist.new_group(pg_options=options)
    assert (in_use(group)["wire"], in_use(group)["wire_links"]) == ("fp16", "network")
    assert (in_use(group)["algorithm"], in_use(group)["timeout_ms"]) == ("two_shot", 60_000)
    os.environ["DPCOMM_WIRE"] = "fp4"
    with pytest.raises(dpcomm.UsageError, match=r"DPCOMM_WIRE 'fp4'.*native, fp16, bf16, int8"):
        dist.new_group()
    os.environ["DPCOMM_WIRE"] = "native"
    dist.distributed_c10d._world.group_count = 100  # torch counts the group that was refused
    with pytest.raises(dpcomm.UsageError, match=r"algorithm.*nonsense.*two_shot"):
        dist.new_group(pg_options=dpcomm.Options(algorithm="nonsense"))
    with pytest.raises(dpcomm.UsageError, match=r"is a dpcomm.Options"):
        dist.new_group(pg_options={"wire": "fp16"})
    per_thread_wire(world)
    dist.destroy_process_group()


def per_thread_wire(world: int) -> None:
    import threading

    value = 0.7  # no bf16, no fp16
    group = dist.new_group(pg_options=dpcomm.Options(wire="native", wire_links="all"))

    def error_of(dtype: torch.dtype = torch.float32) -> float:
        x = torch.full((5000,), value, dtype=dtype)
        dist.all_reduce(x, group=group, async_op=dtype == torch.float64) and dist.barrier(group)
        return abs(float(x[0]) / (value * world) - 1)

    exact = error_of()
    assert exact < 2**-22
    with dpcomm.wire("bf16"):
        assert error_of() > 2**-12
        with dpcomm.wire("native"):
            assert error_of() == exact
        assert error_of() > 2**-12
        assert error_of(torch.float64) < 2**-50  # never lossy
        elsewhere: list[float] = []
        thread = threading.Thread(target=lambda: elsewhere.append(error_of()))
        thread.start()
        thread.join()
        assert elsewhere == [exact]  # another thread is not concerned
        x = torch.full((5000,), value)
        dist.broadcast(x, 0, group=group)
        assert float(x[0]) == float(torch.full((), value))
    assert error_of() == exact
    with pytest.raises(ZeroDivisionError), dpcomm.wire("bf16"):
        raise ZeroDivisionError
    assert error_of() == exact


def test_options_and_environment() -> None:
    launch(choices, 2)
