"""dpcomm.launch() in a real Jupyter kernel: cells run as a notebook runs them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest

try:
    import nbclient
    import nbformat
except ImportError:
    nbclient = None

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.timeout(200),
    pytest.mark.skipif(nbclient is None, reason="nbclient is not installed: make frameworks"),
]

FIRST = """
import os, pathlib, time
import torch
import torch.distributed as dist
import dpcomm
"""


class Notebook:
    """A kernel, and cells that are run in it one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.client = nbclient.NotebookClient(
            nbformat.v4.new_notebook(),
            timeout=90,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        )

    async def cell(self, source: str) -> str:
        """Output of a cell. Raises CellExecutionError."""
        cell = nbformat.v4.new_code_cell(source)
        self.client.nb.cells.append(cell)
        await self.client.async_execute_cell(cell, len(self.client.nb.cells) - 1)
        return "".join(
            output.get("text", "") + output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )


def in_a_notebook(folder: Path, *sources: str) -> str:
    """The output of the last of some cells; ends the kernel."""

    async def run() -> str:
        notebook = Notebook(folder)
        async with notebook.client.async_setup_kernel(cleanup_kc=True):
            output = ""
            for source in (FIRST, *sources):
                output = await notebook.cell(source)
            return output

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def dpcomm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path(__file__).resolve().parents[2])
    found = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{home}{os.pathsep}{found}" if found else home)


def test_a_function_of_a_cell(tmp_path: Path) -> None:
    """It uses what other cells have made, and what a rank prints arrives."""
    output = in_a_notebook(
        tmp_path,
        "weights = torch.arange(4.0)\ndef scaled(x, by): return x * by",
        "def train(base):\n"
        "    place = dpcomm.init(timeout=60)\n"
        "    x = scaled(weights + base, place.rank + 1)\n"
        "    dist.all_reduce(x)\n"
        "    print(f'rank {place.rank} was here', flush=True)\n"
        "    return place.rank, x.tolist()",
        "print('before'); dpcomm.launch(train, 2, (1.0,), timeout=60)",
    )
    assert "before" in output
    assert "[(0, [3.0, 6.0, 9.0, 12.0]), (1, [3.0, 6.0, 9.0, 12.0])]" in output
    for rank in range(2):
        assert output.count(f"rank {rank} was here\n") == 1, output


def test_again_after_computing_in_the_kernel(tmp_path: Path) -> None:
    """torch's threads of the kernel's own computations do not exist in the ranks."""
    output = in_a_notebook(
        tmp_path,
        "torch.set_num_threads(2)\n"
        "layer = torch.nn.Linear(512, 512)\n"
        "layer(torch.ones(512, 512)).sum().backward()",
        "def train():\n"
        "    dpcomm.init(timeout=60)\n"
        "    grad = layer.bias.grad.clone()\n"
        "    layer(torch.ones(512, 512)).sum().backward()\n"
        "    dist.all_reduce(grad)\n"
        "    return float(grad[0])",
        "[dpcomm.launch(train, 2, timeout=60) for _ in range(3)]",
    )
    assert output == str([[1024.0, 1024.0]] * 3)


def test_an_error_of_a_rank(tmp_path: Path) -> None:
    with pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
        in_a_notebook(
            tmp_path,
            "def train():\n"
            "    place = dpcomm.init(timeout=60)\n"
            "    dist.barrier()\n"
            "    if place.rank == 1:\n"
            "        raise LookupError('no such digit')\n"
            "    dist.barrier()",
            "dpcomm.launch(train, 2, timeout=60)",
        )
    assert (caught.value.ename, caught.value.evalue) == ("LookupError", "no such digit")
    assert "on rank 1" in caught.value.traceback
    assert "raise LookupError" in caught.value.traceback  # the line of the cell


def test_interrupt(tmp_path: Path) -> None:
    """The notebook's stop button: all ranks end, the kernel goes on."""

    async def run() -> tuple[str, list[int], str]:
        notebook = Notebook(tmp_path)
        async with notebook.client.async_setup_kernel(cleanup_kc=True):
            await notebook.cell(FIRST)
            await notebook.cell(
                "def sleep():\n"
                "    dpcomm.init(timeout=60)\n"
                "    pathlib.Path(f'{os.getpid()}.pid').touch()\n"
                "    time.sleep(600)"
            )
            cell = asyncio.ensure_future(notebook.cell("dpcomm.launch(sleep, 2)"))
            while len(list(tmp_path.glob("*.pid"))) < 2 and not cell.done():
                await asyncio.sleep(0.05)
            pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
            await interrupted(notebook.client.km)
            with pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
                await cell
            after = await notebook.cell("dpcomm.launch(lambda: dpcomm.init(timeout=60).rank, 2)")
            return caught.value.ename, pids, after

    name, pids, after = asyncio.run(run())
    assert name == "KeyboardInterrupt"
    assert after == "[0, 1]"
    assert len(pids) == 2
    deadline = time.monotonic() + 5
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))


async def interrupted(manager: Any) -> None:
    done = manager.interrupt_kernel()
    if asyncio.iscoroutine(done) or asyncio.isfuture(done):
        await done


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
