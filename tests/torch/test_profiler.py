"""What torch's profiler shows of calls on dpcomm."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from harness import launch

ELEMS = 1 << 20


def traced(rank: int, world: int) -> list[dict[str, Any]]:
    """The events of dpcomm in a trace of one synchronous and one asynchronous call, by time."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    import dpcomm  # noqa: F401

    dist.init_process_group("dpcomm")
    pair = dist.new_group(list(range(world)), group_desc="all of them")
    dist.all_reduce(torch.ones(1))  # nobody records this
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        dist.all_reduce(torch.ones(1000, dtype=torch.float64))
        dist.barrier(pair)
        dist.all_reduce(torch.ones(ELEMS), group=pair, async_op=True).wait()
        dist.reduce_scatter_tensor(torch.ones(5), torch.ones(5 * world))
    dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    ours = [
        event
        for event in events
        if event.get("ph") == "X"
        and (event["name"] == "record_param_comms" or event["name"].startswith("dpcomm:"))
    ]
    return sorted(ours, key=lambda event: float(event["ts"]))


def late_peer(rank: int, world: int) -> float:
    """Length in seconds of the event of an asynchronous call whose peer comes late."""
    import time

    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    import dpcomm  # noqa: F401

    dist.init_process_group("dpcomm")
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        dist.barrier()  # not before: the profiler takes its time to start, on each rank its own
        if rank > 0:
            time.sleep(0.4)
        dist.all_reduce(torch.ones(10), async_op=True).wait()
    dist.destroy_process_group()
    (event,) = [event for event in recorded.events() if event.name == "dpcomm:all_reduce"]
    return float(event.time_range.elapsed_us()) / 1e6


def test_events_have_name_elements_dtype_and_group() -> None:
    for events in launch(traced, 2).results:
        names = [
            (event["args"]["Collective name"], event["args"]["Is asynchronized op"])
            for event in events
            if event["name"] == "record_param_comms"
        ]
        assert names == [
            ("all_reduce", 0),
            ("barrier", 0),
            ("all_reduce", 1),
            ("reduce_scatter_tensor", 0),
        ]
        first, _, large, scatter = (
            event["args"] for event in events if event["name"] == "record_param_comms"
        )
        assert first["In msg nelems"] == first["Out msg nelems"] == 1000
        assert first["dtype"] == "Double"
        assert first["Process Group Description"] == "default_pg"
        assert large["In msg nelems"] == ELEMS
        assert large["dtype"] == "Float"
        assert large["Process Group Description"] == "all of them"
        assert large["Process Group Ranks"] == "[0, 1]"
        assert (scatter["In msg nelems"], scatter["Out msg nelems"]) == (10, 5)
        spans = [event["name"] for event in events if event["name"].startswith("dpcomm:")]
        assert spans == [
            "dpcomm:all_reduce",
            "dpcomm:barrier",
            "dpcomm:all_reduce",
            "dpcomm:reduce_scatter_tensor",
        ]


def test_an_asynchronous_event_is_as_long_as_the_operation() -> None:
    waited, late = launch(late_peer, 2).results
    assert waited > 0.3
    assert late < waited
