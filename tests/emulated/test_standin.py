"""The stand-in device itself: a device for torch that finds what it has to find."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "torch")]

import fake_runtime  # noqa: E402
import standin  # noqa: E402
from harness import launch  # noqa: E402

DEVICE = "standin:0"
pytestmark = pytest.mark.timeout(900)  # with what has to be compiled
POISON = torch.tensor([0xFB] * 4, dtype=torch.uint8).view(torch.float32).item()


@pytest.fixture(scope="module")
def device_env() -> dict[str, str]:
    if why := fake_runtime.missing(nvcc=False):
        pytest.skip(why)
    return {standin.VARIABLE: str(standin.build(fake_runtime.fake_cudart()))}


def device(rank: int, world: int) -> None:
    module = standin.load()
    check_tensors()
    check_training()
    check_streams(module)
    check_memory(module)
    check_graph(module)


def check_tensors() -> None:
    assert torch.accelerator.current_accelerator() == torch.device("standin")
    assert torch.accelerator.device_count() >= 2
    tensor = torch.arange(6.0).to(DEVICE)
    assert tensor.device == torch.device(DEVICE)
    assert (tensor.view(2, 3).t().contiguous() + 1).cpu().tolist() == [[1, 4], [2, 5], [3, 6]]
    assert tensor.sum().item() == 15
    assert torch.equal(tensor[::2].cpu(), torch.tensor([0.0, 2.0, 4.0]))
    assert torch.equal(torch.cat([tensor, tensor]).cpu(), torch.arange(6.0).repeat(2))
    assert tensor.resize_(9)[:6].cpu().tolist() == [0, 1, 2, 3, 4, 5]


def check_training() -> None:
    """Forward, backward and the optimizer give what they give on the CPU."""

    def train(where: str) -> list[torch.Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).to(where)
        optimizer = torch.optim.Adam(model.parameters())
        images, labels = torch.randn(20, 5).to(where), torch.randint(0, 3, (20,)).to(where)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    for there, here in zip(train(DEVICE), train("cpu"), strict=True):
        assert torch.equal(there, here)


def check_streams(module: Any) -> None:
    """A missing event shows as a wrong result, a right one does not."""
    side = torch.Stream(device=DEVICE)
    event = torch.Event(device=DEVICE)
    tensor = torch.zeros(4, device=DEVICE)
    module.synchronize()
    module.sleep_ms(100)
    tensor.fill_(3)
    event.record()
    assert not event.query()
    with side:
        assert torch.accelerator.current_stream() == side
        early = tensor.clone()
        side.synchronize()
        assert early.cpu().tolist() == [0] * 4
        side.wait_event(event)
        late = tensor.clone()
        assert late.cpu().tolist() == [3] * 4
    assert event.query()


def check_memory(module: Any) -> None:
    """What another stream uses has to be recorded, or it is overwritten."""
    side = torch.Stream(device=DEVICE)
    for recorded in [False, True]:
        tensor = torch.full((64,), 5.0, device=DEVICE)
        with side:
            copy = torch.empty(64, device=DEVICE)
        module.synchronize()
        with side:
            module.sleep_ms(100)
            copy.copy_(tensor)
            if recorded:
                tensor.record_stream(side)
        assert len(module.recorded_streams(tensor)) == recorded
        del tensor
        module.synchronize()
        assert copy.cpu().tolist() == [5.0 if recorded else POISON] * 64


def check_graph(module: Any) -> None:
    side = torch.Stream(device=DEVICE)
    source, target = torch.zeros(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    module.synchronize()
    with side:
        module.begin_capture()
        target.copy_(torch.empty_like(source).copy_(source))
        graph = module.end_capture()
        side.synchronize()
        assert target.cpu().tolist() == [0] * 3
        for value in [1, 2]:
            source.fill_(value)
            module.replay(graph)
            assert target.cpu().tolist() == [value] * 3
        module.begin_capture()
        with pytest.raises(RuntimeError, match="captur"):
            target.cpu()
        with pytest.raises(RuntimeError, match="captur"):
            module.end_capture()


def test_device(device_env: dict[str, str]) -> None:
    launch(device, 1, env=device_env)
