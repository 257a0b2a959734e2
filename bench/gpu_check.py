"""First run on a machine with CUDA devices: everything that has to hold there, one after the other.

    python bench/gpu_check.py                     all that this machine can check
    python bench/gpu_check.py --json result.json  and the figures in a file
    python bench/gpu_check.py --parts virtual     only virtual ranks on one device

Parts: `devices` (what there is), `virtual` (ranks in one process on one device: every kernel
against the oracle, bit for bit; graphs; abort), `ranks` (a process for each device: the same
through dpcomm.Communicator, and a rank that does not come), `speed` (bandwidth, against NCCL where
torch has it). docs/first_run_on_a_gpu.md says what to expect. Exit code: 0 all holds, 1 something
does not, 77 no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_cases import Report
from gpu_ranks import Worker
from gpu_runtime import COOPERATIVE, MAJOR, MINOR, MULTIPROCESSORS, CudaError, Runtime
from gpu_virtual import check_virtual, virtual_speed

from dpcomm import cuda

PARTS = ("devices", "virtual", "ranks", "speed")
NO_DEVICE = 77
WORKER_LIMIT_S = 900


def describe_devices(report: Report, count: int) -> None:
    from dpcomm._build import build_record

    devices = []
    for device in range(count):
        runtime = Runtime(device)
        capability = f"{runtime.attribute(MAJOR)}.{runtime.attribute(MINOR)}"
        peers = [
            p for p in range(count)
            if p != device and runtime.number("cudaDeviceCanAccessPeer", device, p)
        ]  # fmt: skip
        devices.append({"name": runtime.name(), "capability": capability, "peers": peers,
                        "multiprocessors": runtime.attribute(MULTIPROCESSORS)})  # fmt: skip
        report.add("devices", f"device {device}", runtime.attribute(COOPERATIVE) == 1,
                   f"{devices[-1]['name']}, {capability}, reaches {peers or 'nobody'}")  # fmt: skip
    driver = Runtime(0).number("cudaDriverGetVersion")
    record = str(build_record())
    report.figures["devices"] = {"devices": devices, "driver": driver, "build": record}
    report.add("devices", "driver", driver >= 13000, f"{driver} (13000 or newer); {record}")


def start_workers(count: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the ranks have to say, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--worker", "--seed", str(arguments.seed)]
    command += ["--quick"] if arguments.quick else []
    command += ["--parts", *arguments.parts]
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        processes.append(
            subprocess.Popen(command, env={**os.environ, **place}, stdout=subprocess.PIPE)
        )
    deadline = time.monotonic() + WORKER_LIMIT_S
    answers = []
    try:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}"
            answers.append(json.loads(output.decode().splitlines()[-1]))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return answers


def check_ranks(report: Report, count: int, arguments: argparse.Namespace) -> None:
    try:
        answers = start_workers(count, arguments)
    except Exception as error:
        report.add("ranks", f"{count} processes", False, f"{type(error).__name__}: {error}")
        return
    for index, check in enumerate(answers[0]["checks"]):
        every = [answer["checks"][index] for answer in answers]
        failed = [f"rank {r}: {c['text']}" for r, c in enumerate(every) if not c["ok"]]
        text = "; ".join(failed) if failed else check["text"]
        report.add(check["part"], check["name"], not failed, text)
    bits = [answer["bits"] for answer in answers]
    different = [name for name in bits[0] if len({str(b.get(name)) for b in bits}) > 1]
    if "ranks" in arguments.parts:
        report.add("ranks", "the same bits on all ranks", not different, ", ".join(different))
    report.figures["speed"] = answers[0]["speed"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--ranks", type=int, help="processes; default: the devices")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 3, 4, 8], help="virtual ranks")
    parser.add_argument("--json", type=Path, help="where checks and figures go")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.worker:
        output, sys.stdout = sys.stdout, sys.stderr
        print(json.dumps(Worker(arguments).run()), file=output)
        return 0
    count, why = cuda.device_count()
    if count == 0:
        print(why)
        return NO_DEVICE
    if "FAKE_CUDA_LIBRARY" in os.environ:
        print("emulated devices: speed means nothing here")
        arguments.parts = [part for part in arguments.parts if part != "speed"]
    report = Report()
    try:
        if "devices" in arguments.parts:
            describe_devices(report, count)
        if "virtual" in arguments.parts:
            check_virtual(report, Runtime(0), arguments)
        if "speed" in arguments.parts:
            virtual_speed(report, Runtime(0))
        ranks = arguments.ranks or count
        if {"ranks", "speed"} & set(arguments.parts) and ranks > 1:
            check_ranks(report, ranks, arguments)
    except CudaError as error:
        report.add("devices", "CUDA", False, str(error))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_dict(), indent=1))
    failed = [check for check in report.checks if not check.ok]
    print(f"{len(report.checks)} checks, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
