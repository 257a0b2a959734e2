"""python -m dpcomm.doctor and python -m dpcomm.info: each fault that they are there to find."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dpcomm import _machine, doctor, info
from dpcomm._job import Job, find_job
from dpcomm._report import print_table
from dpcomm.doctor import ERROR, OK, WARNING, Finding, Scene

PATH = os.pathsep.join(filter(None, sys.path))


class Planted(_machine.Machine):
    """A machine of which a test says what is wrong with it; all else is as it should be."""

    def __init__(self, root: Path, **wrong: Any) -> None:
        super().__init__(str(root))
        self.wrong = wrong

    def _of(self, name: str, right: Any) -> Any:
        value = self.wrong.get(name, right)
        if isinstance(value, OSError):
            raise value
        return value

    def cores(self) -> int:
        return int(self._of("cores", 8))

    def limit(self, which: int) -> tuple[int, int]:
        limits = self._of("limits", {})
        return limits.get(which, (1 << 16, 1 << 20))

    def free_bytes(self, folder: str) -> int:
        return int(self._of("free", 1 << 33))

    def reserve(self, folder: str, nbytes: int) -> None:
        self._of("folder" if folder else "memfd", None)

    def interfaces(self) -> dict[str, str | None]:
        return dict(self._of("interfaces", {"lo": "127.0.0.1", "eth0": "10.0.0.2"}))

    def own_address_towards(self, host: str) -> str:
        return str(self._of("route", "10.0.0.2"))

    def open_files_of_sibling(self) -> str | None:
        return self._of("files", None)

    def read_memory_of_sibling(self) -> str | None:
        return self._of("memory", None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where /proc and /sys of the planted machine are; nothing is there yet."""
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def bad(
    root: Path, variables: Mapping[str, str] | None = None, ranks: int = 2, **wrong: Any
) -> list[tuple[str, str, str, str]]:
    """The findings that are not OK, as (status, topic, text, remedy)."""
    scene = Scene(Planted(root, **wrong), {"OMP_NUM_THREADS": "1", **(variables or {})}, ranks)
    found = [f for f in doctor.examine(scene) if f.topic not in ("library", "torch backend")]
    assert all((f.status == OK) or f.remedy for f in found), "a finding without a remedy"
    return [(f.status, f.topic, f.text, f.remedy) for f in found if f.status != OK]


def test_nothing_is_found_where_nothing_is_wrong(root: Path) -> None:
    assert bad(root) == []


@pytest.mark.parametrize(
    ("wrong", "kind", "says", "remedy"),
    [
        (
            {"memfd": OSError(errno.ENOSPC, "No space left on device")},
            (ERROR, "shared memory"),
            "memfd: no 18.0 MiB for 2 ranks",
            "memory limit",
        ),
        (
            {"folder": OSError(errno.EACCES, "Permission denied")},
            (WARNING, "shared memory"),
            "/dev/shm: no file can be made there: Permission denied",
            "writable",
        ),
        ({"free": 5 << 20}, (WARNING, "shared memory"), "/dev/shm: 5.0 MiB free", "--shm-size"),
        ({"files": "Permission denied"}, (WARNING, "permissions"), "/proc/<pid>/fd", "one user"),
        (
            {"memory": "Operation not permitted"},
            (WARNING, "permissions"),
            "process_vm_readv: Operation not permitted",
            "ptrace_scope=1",
        ),
        (
            {"limits": {resource.RLIMIT_NOFILE: (50, 50)}},
            (ERROR, "limits"),
            "open files: 50",
            "ulimit -n",
        ),
        (
            {"limits": {resource.RLIMIT_NPROC: (100, 200)}},
            (WARNING, "limits"),
            "processes and threads of the user: 100 (at most 200)",
            "ulimit -u",
        ),
        ({"cores": 1}, (WARNING, "cores"), "2 ranks, 1 cores", "fewer ranks"),
        ({"interfaces": {"eth0": "1.2.3.4"}}, (WARNING, "network"), "no loopback", "ip link set"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else None,
)
def test_each_planted_fault_is_found(
    wrong: dict[str, Any], kind: tuple[str, str], says: str, remedy: str, root: Path
) -> None:
    ((status, topic, text, what_to_do),) = bad(root, **wrong)
    assert (status, topic) == kind
    assert says in text
    assert remedy in what_to_do


def test_a_stranger_variable_is_named(root: Path) -> None:
    ((status, topic, text, remedy),) = bad(root, {"DPCOMM_WIER": "fp16"})
    assert (status, topic) == (WARNING, "environment")
    assert "DPCOMM_WIER is read by nothing" in text
    assert "did you mean DPCOMM_WIRE?" in remedy
    ((_, _, text, _),) = bad(root, {"DPCOMM_FAULTS": "lose=1"})
    assert "plants faults" in text


def test_threads_have_to_share_the_cores(root: Path) -> None:
    ((_, topic, text, remedy),) = bad(root, {"OMP_NUM_THREADS": "8"})
    assert topic == "threads"
    assert "OMP_NUM_THREADS=8 for each of 2 ranks, 8 cores" in text
    assert remedy == "export OMP_NUM_THREADS=4"
    ((_, _, text, _),) = bad(root, {"OMP_NUM_THREADS": ""})
    assert "not set" in text
    assert bad(root, {"OMP_NUM_THREADS": ""}, ranks=1) == []


def test_a_master_that_cannot_be_reached_is_an_error(root: Path) -> None:
    gone = OSError(errno.ENETUNREACH, "Network is unreachable")
    ((status, _, text, _),) = bad(root, {"MASTER_ADDR": "far.away"}, route=gone)
    assert status == ERROR
    assert "MASTER_ADDR=far.away: Network is unreachable" in text


def test_control_groups(root: Path) -> None:
    write(root, "/sys/fs/cgroup/cpu.max", "150000 100000\n")
    ((_, topic, text, _),) = bad(root)
    assert topic == "cores"
    assert "of which the control group gives 1.5" in text
    write(root, "/sys/fs/cgroup/cpu.max", "max 100000\n")
    assert bad(root) == []
    write(root, "/sys/fs/cgroup/memory/memory.limit_in_bytes", str(64 << 20))
    write(root, "/sys/fs/cgroup/memory/memory.usage_in_bytes", str(60 << 20))
    ((_, topic, text, _),) = bad(root)
    assert topic == "memory limit"
    assert "4.0 MiB left of 64.0 MiB" in text


def test_scope_of_yama(root: Path) -> None:
    write(root, "/proc/sys/kernel/yama/ptrace_scope", "2\n")
    ((status, topic, text, remedy),) = bad(root)
    assert (status, topic) == (WARNING, "permissions")
    assert "Yama's ptrace_scope is 2" in text
    assert "sysctl" in remedy
    write(root, "/proc/sys/kernel/yama/ptrace_scope", "1\n")
    assert bad(root, memory="Operation not permitted") == []  # a rank can allow it by itself


def children() -> set[str]:
    """The child processes of this one, dead or alive, that nobody has waited for."""
    lists = Path("/proc/self/task").glob("*/children")
    return {pid for each in lists for pid in each.read_text().split()}


def test_this_machine() -> None:
    """What the real one does does not fail, and leaves no process and no file open."""
    machine = _machine.Machine()
    before, started = len(os.listdir("/proc/self/fd")), children()
    assert machine.open_files_of_sibling() is None or os.getuid() != 0
    machine.read_memory_of_sibling()
    machine.reserve("", 1 << 20)
    assert machine.interfaces()["lo"] in (None, "127.0.0.1")
    assert machine.own_address_towards("127.0.0.1") == "127.0.0.1"
    assert len(os.listdir("/proc/self/fd")) == before
    assert children() == started


def run(
    *arguments: str, module: str = "doctor", **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"dpcomm.{module}", *arguments],
        env={"PYTHONPATH": PATH, "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_ranks_meet_and_add() -> None:
    done = run("--ranks", "2", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["errors"] == 0
    ping = report["findings"][-1]
    assert (ping["status"], ping["topic"]) == (OK, "ping")
    assert ping["text"].startswith("2 ranks met in ")


def test_ranks_that_cannot_meet_are_an_error(tmp_path: Path) -> None:
    done = run("--ranks", "2", DPCOMM_SHM_DIR=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    said = " ".join(done.stdout.split())  # lines are broken somewhere
    assert f"DPCOMM_SHM_DIR={tmp_path}/none: no file can be made there: No such file" in said
    assert "remedy: make the folder, or make it writable for this user" in said
    assert f"2 ranks: dpcomm.errors.UsageError: cannot make shared memory in {tmp_path}" in said
    stalled = run("--ranks", "2", "--timeout", "2", DPCOMM_FAULTS="melt=1")
    assert stalled.returncode == 1
    assert "DPCOMM_FAULTS: 'melt' is not a fault" in " ".join(stalled.stdout.split())


def test_a_full_folder(tmp_path: Path) -> None:
    """On a file system of 256 KiB of the test's own, where one may be mounted."""
    script = f"""
        mount -t tmpfs -o size=256k none {tmp_path} || exit 77
        DPCOMM_SHM_DIR={tmp_path} exec {sys.executable} -m dpcomm.doctor --ranks 3 --json
    """
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", textwrap.dedent(script)],
        env={"PYTHONPATH": PATH, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=100,
    )
    if done.returncode not in (0, 1) or not done.stdout:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 1
    texts = [f["text"] for f in json.loads(done.stdout)["findings"] if f["status"] != OK]
    assert any("0.2 MiB free, of 27.0 MiB" in text for text in texts)
    assert any("no room for shared memory" in text for text in texts)


def test_a_missing_library_is_found(tmp_path: Path) -> None:
    """In a copy of the package without its extension modules."""
    source = Path(doctor.__file__).parent
    for file in source.glob("*.py"):
        (tmp_path / "dpcomm").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "dpcomm" / file.name)
    for module in ("doctor", "info"):
        done = subprocess.run(
            [sys.executable, "-m", f"dpcomm.{module}"],
            cwd=tmp_path,
            env={"PYTHONPATH": os.pathsep.join(p for p in sys.path if "site-packages" in p)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert "dpcomm._core was not built" in done.stdout


def test_the_ranks_of_a_job_answer_together() -> None:
    """Under anything that sets RANK and so on; rank 1 alone has planted a stranger variable."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    base = {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", **common}

    def both(module: str) -> list[tuple[int, str]]:
        started = [
            subprocess.Popen(
                [sys.executable, "-m", f"dpcomm.{module}", "--json"],
                env={**base, "RANK": str(rank), **({"DPCOMM_WIER": "fp16"} if rank else {})},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        outputs = [process.communicate(timeout=100)[0] for process in started]
        return [(p.returncode, o) for p, o in zip(started, outputs, strict=True)]

    (status, text), (other, nothing) = both("doctor")
    assert (status, other, nothing) == (0, 0, "")
    report = json.loads(text)
    texts = [finding["text"] for finding in report["findings"]]
    assert any("DPCOMM_WIER is read by nothing (rank 1)" in text for text in texts)
    assert any("2 ranks met in" in text for text in texts)
    (status, text), (_, nothing) = both("info")
    assert (status, nothing) == (0, "")
    place = json.loads(text)["topology"]
    assert (place["ranks"], place["hosts"]) == (2, 1)


def test_topology() -> None:
    def place(rank: int, host: str, boot: str) -> dict[str, Any]:
        return {"rank": rank, "host": host, "boot": boot, "pid": 10 + rank, "cores": 4}

    shown = info.topology([place(0, "a", "x"), place(1, "b", "y"), None, place(3, "a", "x")])
    assert shown == {
        "ranks": 4,
        "hosts": 2,
        "on a": "0 (pid 10), 3 (pid 13); 4 cores",
        "on b": "1 (pid 11); 4 cores",
        "did not come": "2",
    }


def test_a_job_is_found_where_all_of_it_is_said() -> None:
    said = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "99"}
    assert find_job(said) == Job(3, 4, "h", 99, False)
    assert find_job({**said, "TORCHELASTIC_USE_AGENT_STORE": "True"}) == Job(3, 4, "h", 99, True)
    for name in said:
        assert find_job({k: v for k, v in said.items() if k != name}) is None


def test_findings_of_a_job_are_put_together() -> None:
    fine, ill = Finding(OK, "a", "fine"), Finding(WARNING, "b", "ill", "rest")
    put = doctor.merged([[fine], [fine, ill], [ill], None])
    assert put == [
        fine,
        Finding(ERROR, "job", "rank 3 did not answer", "look at what it printed"),
        Finding(WARNING, "b", "ill (rank 1, 2)", "rest"),
    ]


def test_info() -> None:
    done = run("--json", module="info", DPCOMM_WIRE="fp16")
    assert done.returncode == 0, done.stderr
    sections = json.loads(done.stdout)
    assert sections["environment"] == {"DPCOMM_WIRE": "fp16"}
    assert "shm" in sections["transports"]
    assert "one_shot" in sections["algorithms"]["all_reduce"]
    assert sections["CPU"]["kernels chosen"] in sections["CPU"]["kernels built"]
    plain = run(module="info").stdout
    assert "kernels chosen" in plain
    assert "\x1b" not in plain


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_terminal_gets_a_table_where_rich_is(
    with_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    print_table("title", ("", "topic", "found"), [("OK", "limits", "[fine]")])
    text = capsys.readouterr().out
    assert "[fine]" in text
    assert ("\u2502" in text or "\u2503" in text) == with_rich
