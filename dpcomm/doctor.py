"""``python -m dpcomm.doctor``: whether ranks can work here, and what to do where they cannot.

Looks at the library, shared memory, permissions, limits, cores, network and environment, then
starts ranks that meet and add (``--ranks``). Under torchrun, or anything that sets RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT, the ranks of the job do that: all have to run it, and
rank 0 prints what all of them found. Exit status 1 if there is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpcomm import __version__, _build, _job, _ping, _report
from dpcomm._machine import Machine
from dpcomm.errors import DpcommError

__all__ = ["Finding", "examine", "main"]

OK, WARNING, ERROR = "OK", "warning", "error"
MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        status: "OK", "warning" (works, but worse, or not everywhere) or "error".
        topic: such as "shared memory".
        text: what was found.
        remedy: what to do; empty where all is well.
    """

    status: str
    topic: str
    text: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Scene:
    """What the checks look at: the machine, the variables, and how many ranks there will be."""

    machine: Machine
    variables: Mapping[str, str]
    ranks: int


# --- library --------------------------------------------------------------------------------------


def check_library(_: Scene) -> list[Finding]:
    """The core and the torch backend."""
    findings = []
    try:
        from dpcomm import _core

        text = f"dpcomm {__version__}, kernels {_core.wire_best_isa()}"
        findings.append(Finding(OK, "library", text))
    except ImportError as error:
        return [Finding(ERROR, "library", str(error), "pip install .   in a clone of dpcomm")]
    except DpcommError as error:
        return [Finding(ERROR, "library", str(error), "mend or unset the variable")]
    try:
        _build.check_torch()
        text = f"built for torch {_build.installed_torch()}, which is here"
        findings.append(Finding(OK, "torch backend", text))
    except _build.BuildMismatchError as error:
        lines = str(error).splitlines()
        status = WARNING if _build.installed_torch() is None else ERROR
        findings.append(Finding(status, "torch backend", lines[0], " ".join(lines[1:]).strip()))
    return findings


# --- memory ---------------------------------------------------------------------------------------


def check_shared_memory(scene: Scene) -> list[Finding]:
    """The memory that ranks share: where it comes from, and that there is enough."""
    machine, folder = scene.machine, scene.variables.get(_name("SHM_DIR"), "")
    need = _segment_bytes(scene.ranks)
    findings = []
    if folder:
        findings.append(_check_folder(machine, folder, need, ERROR, f"{_name('SHM_DIR')}={folder}"))
    else:
        try:
            machine.reserve("", need)
            text = f"memfd: {_mib(need)} for {scene.ranks} ranks can be had"
            findings.append(Finding(OK, "shared memory", text))
        except OSError as error:
            text = f"memfd: no {_mib(need)} for {scene.ranks} ranks: {error.strerror}"
            remedy = "free memory, or raise the memory limit of the container or job"
            findings.append(Finding(ERROR, "shared memory", text, remedy))
        # Only where /proc/<pid>/fd of other ranks is closed.
        findings.append(_check_folder(machine, "/dev/shm", need, WARNING, "/dev/shm"))
    return findings


def _check_folder(machine: Machine, folder: str, need: int, worst: str, what: str) -> Finding:
    used = "" if worst == ERROR else " (used only where ranks may not open each other's /proc)"
    enlarge = "enlarge its file system (docker run --shm-size=1g), or choose another folder by "
    enlarge += _name("SHM_DIR")
    try:
        machine.reserve(folder, 4096)
        free = machine.free_bytes(folder)
    except OSError as error:
        text = f"{what}: no file can be made there: {error.strerror}{used}"
        full = error.errno == 28
        remedy = enlarge if full else "make the folder, or make it writable for this user"
        return Finding(worst, "shared memory", text, remedy)
    if free < need:
        text = f"{what}: {_mib(free)} free, of {_mib(need)} for the usual slots{used}"
        return Finding(WARNING, "shared memory", text + "; smaller slots are slower", enlarge)
    return Finding(OK, "shared memory", f"{what}: writable, {_mib(free)} free")


def _segment_bytes(ranks: int) -> int:
    """About what a group takes: its slots of 9 MiB or so for each rank that others send to."""
    return max(4, 9 * ranks) * MIB


def check_memory_limit(scene: Scene) -> list[Finding]:
    """The memory that the control group leaves."""
    read = scene.machine.read
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        limit, usage = read(limit_file), read(usage_file) or "0"
        if limit is None or not limit.isdigit() or int(limit) > 1 << 60:
            continue
        left = int(limit) - int(usage)
        text = f"control group: {_mib(left)} left of {_mib(int(limit))}"
        if left < 2 * _segment_bytes(scene.ranks):
            remedy = "raise the memory limit of the container or job: shared memory counts"
            return [Finding(WARNING, "memory limit", text, remedy)]
        return [Finding(OK, "memory limit", text)]
    return [Finding(OK, "memory limit", "none by a control group")]


# --- permissions and limits -----------------------------------------------------------------------


def check_ptrace(scene: Scene) -> list[Finding]:
    """Whether ranks may open each other's files and read each other's memory."""
    scope = scene.machine.read("/proc/sys/kernel/yama/ptrace_scope")
    findings = []
    error = scene.machine.open_files_of_sibling()
    if error is None:
        findings.append(Finding(OK, "permissions", "ranks can open each other's /proc/<pid>/fd"))
    else:
        text = f"ranks cannot open each other's /proc/<pid>/fd: {error}"
        remedy = "run ranks as one user in one PID namespace; else /dev/shm has to be writable"
        findings.append(Finding(WARNING, "permissions", text, remedy))
    yama = "no Yama here" if scope is None else f"Yama's ptrace_scope is {scope}"
    error = scene.machine.read_memory_of_sibling()
    if error is None and (scope is None or scope in "01"):
        text = f"ranks can read each other's memory ({yama})"
        findings.append(Finding(OK, "permissions", text))
    else:
        text = f"ranks cannot read each other's memory (process_vm_readv: {error or 'refused'}; "
        remedy = (
            "nothing is lost: dpcomm copies through shared memory. To allow it: "
            "sysctl kernel.yama.ptrace_scope=1, docker run --cap-add=SYS_PTRACE"
        )
        # Scope 1 stops siblings; a rank can allow it for the others by prctl.
        status = OK if scope == "1" else WARNING
        findings.append(Finding(status, "permissions", f"{text}{yama})", remedy))
    return findings


def check_limits(scene: Scene) -> list[Finding]:
    """ulimit: open files, processes, locked memory."""
    findings = []
    for which, flag, what, least, good in (
        (resource.RLIMIT_NOFILE, "-n", "open files", 64, 1024),
        (resource.RLIMIT_NPROC, "-u", "processes and threads of the user", 64, 1024),
    ):
        soft, hard = scene.machine.limit(which)
        text = f"{what}: {_limit(soft)} (at most {_limit(hard)})"
        status = OK if soft < 0 or soft >= good else WARNING if soft >= least else ERROR
        remedy = "" if status == OK else f"ulimit {flag} {good}, or /etc/security/limits.conf"
        findings.append(Finding(status, "limits", text, remedy))
    soft, _ = scene.machine.limit(resource.RLIMIT_MEMLOCK)
    text = f"locked memory: {_limit(soft, 'bytes')}; ranks on one host lock none"
    return [*findings, Finding(OK, "limits", text)]


# --- cores and environment ------------------------------------------------------------------------


def check_cores(scene: Scene) -> list[Finding]:
    """Cores for the ranks, by affinity and by the control group's quota."""
    cores: float = scene.machine.cores()
    text = f"{scene.ranks} ranks, {cores:g} cores for this process"
    quota = _quota(scene.machine)
    if quota is not None and quota < cores:
        text += f", of which the control group gives {quota:g}"
        cores = quota
    if scene.ranks > cores:
        remedy = (
            "start fewer ranks or allow more cores: a rank that waits gives its core away, "
            "which makes small operations slower"
        )
        return [Finding(WARNING, "cores", text, remedy)]
    return [Finding(OK, "cores", text)]


def _quota(machine: Machine) -> float | None:
    both = machine.read("/sys/fs/cgroup/cpu.max")
    if both is not None:
        quota, _, period = both.partition(" ")
    else:
        quota = machine.read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or ""
        period = machine.read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or ""
    if not (quota.isdigit() and period.isdigit() and int(period) > 0):
        return None
    return int(quota) / int(period)


def check_threads(scene: Scene) -> list[Finding]:
    """Threads of numerical libraries, which have to share the cores with those of other ranks."""
    threads, cores = scene.variables.get("OMP_NUM_THREADS", ""), scene.machine.cores()
    if threads.isdigit():
        text = f"OMP_NUM_THREADS={threads} for each of {scene.ranks} ranks, {cores} cores"
        if int(threads) * scene.ranks <= max(cores, scene.ranks):
            return [Finding(OK, "threads", text)]
    elif scene.ranks == 1:
        return [Finding(OK, "threads", "OMP_NUM_THREADS is not set; one rank may use all cores")]
    else:
        text = f"OMP_NUM_THREADS is not set: each of {scene.ranks} ranks takes {cores} threads"
    each = max(1, cores // scene.ranks)
    return [Finding(WARNING, "threads", text, f"export OMP_NUM_THREADS={each}")]


def check_variables(scene: Scene) -> list[Finding]:
    """The DPCOMM_* variables: names that nobody reads, and faults that are planted."""
    from dpcomm import _core

    known = [name for name, _, _ in _core.environment()]
    prefix = _name("")
    build = {prefix + name for name in ("TORCH", "CUDA", "WERROR", "TORCH_ROOT", "NVCC")}
    chosen = [name for name in scene.variables if name.startswith(prefix)]
    findings = []
    for name in chosen:
        if name in known or name in build:
            continue
        near = difflib.get_close_matches(name, known, 1)
        remedy = f"did you mean {near[0]}?" if near else "unset it; docs/environment.md has all"
        findings.append(Finding(WARNING, "environment", f"{name} is read by nothing", remedy))
    if scene.variables.get(_name("FAULTS")):
        text = f"{_name('FAULTS')}={scene.variables[_name('FAULTS')]} plants faults for tests"
        findings.append(Finding(WARNING, "environment", text, "unset it"))
    if not findings:
        values = ", ".join(f"{name}={scene.variables[name]}" for name in chosen)
        findings.append(Finding(OK, "environment", values or "no variable of dpcomm is set"))
    return findings


# --- network --------------------------------------------------------------------------------------


def check_network(scene: Scene) -> list[Finding]:
    """Interfaces, and the way to MASTER_ADDR."""
    addresses = {name: at for name, at in scene.machine.interfaces().items() if at is not None}
    listed = ", ".join(f"{name} {address}" for name, address in addresses.items())
    findings = []
    if "lo" not in addresses:
        remedy = "ip link set lo up: ranks of one host meet there"
        text = f"no loopback interface; there are: {listed or 'none'}"
        findings.append(Finding(WARNING, "network", text, remedy))
    else:
        findings.append(Finding(OK, "network", f"interfaces: {listed}"))
    master = scene.variables.get("MASTER_ADDR", "")
    if master:
        try:
            own = scene.machine.own_address_towards(master)
            text = f"MASTER_ADDR={master} is reached from {own}"
            findings.append(Finding(OK, "network", text))
        except OSError as error:
            text = f"MASTER_ADDR={master}: {error.strerror or error}"
            remedy = "give a name that every host can resolve, or an address with a route to it"
            findings.append(Finding(ERROR, "network", text, remedy))
    return findings


# --- ping -----------------------------------------------------------------------------------------


def ping_local(ranks: int, variables: Mapping[str, str], timeout: float) -> Finding:
    """Starts ranks on this machine that meet and add."""
    with tempfile.TemporaryDirectory(prefix="dpcomm-doctor-") as folder:
        command = [sys.executable, "-m", "dpcomm._ping"]
        environment = {**variables, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        started = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), f"file://{folder}/store", str(timeout)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            ended = [process.communicate(timeout=2 * timeout + 30) for process in started]
        except subprocess.TimeoutExpired:
            return _ping_failed(ranks, f"not complete after {2 * timeout + 30:g} s")
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.wait()
    for process, (_, errors) in zip(started, ended, strict=True):
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            return _ping_failed(ranks, f"a rank was ended by {name}")
        if process.returncode != 0:
            return _ping_failed(ranks, (errors.strip().splitlines() or ["no output"])[-1])
    return _ping_worked(ranks, [json.loads(output) for output, _ in ended])


def ping_job(job: _job.Job, store: Any, timeout: float) -> Finding:
    """The same with the ranks of a job; collective."""
    try:
        result = _ping.ping(job.rank, job.world_size, store, timeout)
    except (DpcommError, ImportError) as error:
        return _ping_failed(job.world_size, str(error))
    return _ping_worked(job.world_size, [result])


def _ping_worked(ranks: int, results: Sequence[Mapping[str, float]]) -> Finding:
    start = max(result["start_ms"] for result in results)
    each = max(result["all_reduce_us"] for result in results)
    text = f"{ranks} ranks met in {start:.0f} ms; an all-reduce of 1 KiB takes {each:.0f} us"
    return Finding(OK, "ping", text)


def _ping_failed(ranks: int, why: str) -> Finding:
    remedy = "mend the errors above first; docs/errors.md explains each text"
    return Finding(ERROR, "ping", f"{ranks} ranks: {why}", remedy)


# --- all together ---------------------------------------------------------------------------------

CHECKS: tuple[Callable[[Scene], list[Finding]], ...] = (
    check_library,
    check_shared_memory,
    check_memory_limit,
    check_ptrace,
    check_limits,
    check_cores,
    check_threads,
    check_network,
    check_variables,
)


def examine(scene: Scene) -> list[Finding]:
    """All findings but the ping's. Leaves nothing behind."""
    findings: list[Finding] = []
    for check in CHECKS:
        findings += check(scene)
        if check is check_library and findings[0].status == ERROR:
            return findings  # nothing else can be asked
    return findings


def merged(by_rank: Sequence[Sequence[Finding] | None]) -> list[Finding]:
    """The findings of a job: of rank 0, and the bad ones of the others with their rank."""
    findings = list(by_rank[0] or [])
    others: dict[Finding, list[int]] = {}
    for rank, found in enumerate(by_rank):
        if found is None:
            text = f"rank {rank} did not answer"
            findings.append(Finding(ERROR, "job", text, "look at what it printed"))
            continue
        for finding in found:
            if finding.status != OK and finding not in findings:
                others.setdefault(finding, []).append(rank)
    for finding, ranks in others.items():
        text = f"{finding.text} (rank {', '.join(str(rank) for rank in ranks)})"
        findings.append(dataclasses.replace(finding, text=text))
    return findings


def examine_job(job: _job.Job, scene: Scene, timeout: float) -> list[Finding] | None:
    """The findings of all ranks on rank 0, and None on the others; collective."""
    own = examine(scene)
    try:
        store = job.open_store(timeout)
        if own[0].status == OK:
            own.append(ping_job(job, store, timeout))
        told = [dataclasses.asdict(finding) for finding in own]
        answers = _job.exchange(job, store, "doctor", told, timeout)
        _job.leave(job, store, timeout)
    except (DpcommError, OSError, RuntimeError) as error:
        return [*own, _ping_failed(job.world_size, str(error))]
    if job.rank != 0:
        return None
    return merged([None if a is None else [Finding(**each) for each in a] for a in answers])


def show(findings: Sequence[Finding], as_json: bool) -> None:
    """Prints them; the last line counts."""
    count = {status: sum(f.status == status for f in findings) for status in (OK, WARNING, ERROR)}
    if as_json:
        _report.print_json(
            {
                "findings": [dataclasses.asdict(finding) for finding in findings],
                "warnings": count[WARNING],
                "errors": count[ERROR],
            }
        )
        return
    rows = [
        (f.status, f.topic, f.text, f"remedy: {f.remedy}" if f.remedy else "") for f in findings
    ]
    _report.print_table(
        "dpcomm doctor",
        ("", "topic", "found", "remedy"),
        rows,
        styles={OK: "green", WARNING: "yellow", ERROR: "bold red"},
    )
    print(f"{count[ERROR]} errors, {count[WARNING]} warnings, {count[OK]} OK")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m dpcomm.doctor", description=__doc__)
    parser.add_argument("--ranks", type=int, help="ranks to start here (default: 2)")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for them (30)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    chosen = parser.parse_args(arguments)
    if chosen.ranks is not None and chosen.ranks < 1:
        parser.error("--ranks has to be positive")
    job = _job.find_job(os.environ) if chosen.ranks is None else None
    findings: list[Finding] | None
    if job is None:
        scene = Scene(Machine(), os.environ, chosen.ranks or 2)
        findings = examine(scene)
        if findings[0].status == OK:
            findings.append(ping_local(scene.ranks, os.environ, chosen.timeout))
    else:
        local = os.environ.get("LOCAL_WORLD_SIZE", "")
        ranks = int(local) if local.isdigit() else job.world_size
        findings = examine_job(job, Scene(Machine(), os.environ, ranks), chosen.timeout)
        if findings is None:
            return 0
    show(findings, chosen.json)
    return int(any(finding.status == ERROR for finding in findings))


def _name(suffix: str) -> str:
    return f"DPCOMM_{suffix}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.1f} MiB" if nbytes < 1 << 30 else f"{nbytes / (1 << 30):,.1f} GiB"


def _limit(value: int, unit: str = "") -> str:
    return "unlimited" if value < 0 else f"{value} {unit}".strip()


if __name__ == "__main__":
    sys.exit(main())
