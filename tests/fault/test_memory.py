"""Shared memory that is full, forbidden or elsewhere; and that no file of it remains."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Group, Outcome, Stage, expect_error, named_segments

SHM = Path("/dev/shm")
NOBODY = 65534
KILL = int(signal.SIGKILL)


BEFORE = named_segments()


def in_shm() -> set[str]:
    """Segments with a name that are there now and were not at first."""
    return named_segments() - BEFORE


def outcomes_of_start(group: Group, timeout: float = 5.0, **options: Any) -> list[Outcome]:
    init = group.init()
    special = options.pop("special", {})
    for rank in group:
        own = special.get(rank.number, {})
        world = len(group.ranks)
        rank.begin("start", rank.number, world, init, timeout=timeout, **options, **own)
    return group.end()


def use(group: Group) -> None:
    group.do("collective", "all_reduce", 200_000)
    group.do("collective", "broadcast", 200_000)
    group.do("collective", "all_gather", 1000)


@contextlib.contextmanager
def stage_in(*prefix: str) -> Iterator[Stage]:
    """A stage in namespaces of its own, or a skip where that is not allowed."""
    if shutil.which("unshare") is None:
        pytest.skip("no command unshare")
    stage = Stage(prefix=prefix)
    try:
        if not stage.works:
            pytest.skip("no namespaces and mounts without root")
        yield stage
    finally:
        stage.close()


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(scope="module")
def small_stage(small_folder: Path) -> Iterator[Stage]:
    """Puppets that see a file system of 4 MiB at small_folder; nobody else does."""
    mount = f'mount -t tmpfs -o size=4m none {small_folder} && exec "$@"'
    with stage_in("unshare", "-m", "--propagation", "private", "sh", "-c", mount, "sh") as stage:
        yield stage


def test_a_small_folder_gives_a_smaller_ring(small_stage: Stage, small_folder: Path) -> None:
    environment = {"DPCOMM_SHM_DIR": str(small_folder)}
    with small_stage.group(2) as group:
        group.start(environment=environment)
        use(group)
        used = group[0].do(
            "run", f"import shutil; result = tuple(shutil.disk_usage({str(small_folder)!r}))"
        )
        assert 0 < used[1] <= 4 << 20  # the segment does lie there
        # Nothing is written to memory that is not there, whatever else fills the folder.
        source = (
            "import contextlib\n"
            f"f = open({str(small_folder)!r} + '/fill', 'wb')\n"
            "with contextlib.suppress(OSError), f:\n"
            "    while True: f.write(bytes(4096)); f.flush()\n"
        )
        group[0].do("run", source)
        use(group)
        group.do("run", f"import glob; result = glob.glob({str(small_folder)!r} + '/dpcomm*')")
        group[0].do("run", f"import os; os.unlink({str(small_folder)!r} + '/fill')")


def test_a_full_folder(small_stage: Stage, small_folder: Path) -> None:
    environment = {"DPCOMM_SHM_DIR": str(small_folder)}
    path = f"{str(small_folder)!r} + '/fill'"
    with small_stage.group(3) as group:
        group[0].do("run", f"f = open({path}, 'wb'); f.write(bytes((4 << 20) - 65536)); f.close()")
        try:
            began = time.monotonic()
            text = expect_error(
                outcomes_of_start(group, environment=environment),
                "InternalError",
                f"no room for shared memory in {small_folder}",
                "group 'default' of 3 ranks",
                since=began,
            )
            wanted, least = map(int, re.findall(r"(\d+) bytes", text))
            assert 65536 < least < wanted
        finally:
            group[0].do("run", f"import os; os.unlink({path})")
        assert group[0].do("run", f"import os; result = os.listdir({str(small_folder)!r})") == []
        group.restart()  # without the variable it needs no folder
        # What the text says to be enough is enough.
        assert least <= 4 << 20
        group.start(environment=environment)
        use(group)


def test_a_folder_that_does_not_exist(stage: Stage, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with stage.group(2) as group:
        began = time.monotonic()
        environment = {"DPCOMM_SHM_DIR": str(missing)}
        expect_error(
            outcomes_of_start(group, environment=environment),
            "UsageError",
            f"cannot make shared memory in {missing}",
            "No such file",
            since=began,
        )
        group.restart()


def test_a_folder_that_may_not_be_written(stage: Stage, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with stage.group(2) as group:
        become_nobody(group)
        environment = {"DPCOMM_SHM_DIR": str(tmp_path)}
        expect_error(
            outcomes_of_start(group, environment=environment),
            "UsageError",
            "DPCOMM_SHM_DIR has to name a folder that can be written to",
        )
    assert list(tmp_path.iterdir()) == []


def become_nobody(group: Group) -> None:
    """An ordinary user, who may not look into the processes of others, nor, having changed its
    user, into its own kind: /proc/<pid>/fd is closed to all."""
    import os

    if os.getuid() != 0:
        pytest.skip("not root, so that ranks cannot change their user")
    Path(group.folder).chmod(0o777)
    group.do("run", f"import os; os.setgid({NOBODY}); os.setuid({NOBODY})")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_holds_no_names(stage: Stage, in_memory: bool, tmp_path: Path) -> None:
    folder = SHM if in_memory else tmp_path
    before = set(folder.iterdir())
    with stage.group(3) as group:
        group.start(environment={"DPCOMM_SHM_DIR": str(folder)})
        assert {path for path in set(folder.iterdir()) - before if "dpcomm" in path.name} == set()
        assert str(folder) in group[1].do("maps")
        use(group)
        group[0].kill()
        group.do("close")
    assert {path for path in set(folder.iterdir()) - before if "dpcomm" in path.name} == set()


@pytest.mark.parametrize(("key", "behind"), [("offer/0", True), ("verdict/0", False)])
def test_rank_0_dies_in_a_start_by_folder(stage: Stage, key: str, behind: bool) -> None:
    with stage.group(2) as group:
        outcomes = outcomes_of_start(
            group,
            environment={"DPCOMM_SHM_DIR": str(SHM)},
            special={0: {"deadly": (key, behind, KILL)}},
        )
        assert outcomes[1].error == "PeerError", outcomes
        assert in_shm() == set()


def test_where_proc_is_closed_a_file_is_used(stage: Stage) -> None:
    with stage.group(3) as group:
        become_nobody(group)
        group.start()
        assert in_shm() == set()  # all have opened it: the name is gone
        assert all("/dev/shm/dpcomm-" in rank.do("maps") for rank in group)
        use(group)
        since = group[1].kill()
        group.begin("collective", "all_reduce", 1000)
        expect_error(group.end(), "PeerError", f"{group[1].name} died", since=since)


@pytest.mark.parametrize(
    ("victim", "key", "behind"),
    [(0, "offer/1", True), (0, "verdict/1", False), (1, "answer/1/1", False)],
)
def test_a_rank_dies_while_the_file_has_a_name(
    stage: Stage, victim: int, key: str, behind: bool
) -> None:
    with stage.group(3) as group:
        become_nobody(group)
        since = time.monotonic()
        outcomes = outcomes_of_start(group, special={victim: {"deadly": (key, behind, KILL)}})
        group[victim].dead = True
        rest = [outcome for outcome in outcomes if outcome.rank != victim]
        expect_error(rest, "PeerError", f"{group[victim].name} died while", since=since)
        assert in_shm() == set()
        group.restart()


def test_ranks_in_pid_namespaces_of_their_own(stage: Stage) -> None:
    """As in containers that share /dev/shm: pids mean nothing, and may even be the same."""
    with (
        stage_in("unshare", "-p", "--fork", "--kill-child") as first,
        stage_in("unshare", "-p", "--fork", "--kill-child") as second,
        first.group(1, second, stage) as group,
    ):
        assert group[0].own_pid == group[1].own_pid
        group.start()
        assert in_shm() == set()
        use(group)
        group[0].kill()
        assert group[0].ended()
        since = time.monotonic()
        group[1].begin("collective", "all_reduce", 1000)  # by itself: the one with the same pid
        text = expect_error([group[1].end()], "PeerError", f"{group[0].name} died", since=since)
        assert group[2].do_outcome("collective", "all_reduce", 1000).text == text
        group.restart()
