"""Which tests run next to each other where pytest has several workers (pytest-xdist, `make test`).

First those that one process computes, file by file on all workers: whichever has nothing left takes
the next file. Then, when all workers but one are gone, the rest on that one: tests that start ranks
keep several cores busy themselves and measure times.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

TOGETHER = (
    "tests/build/",
    "tests/emulated/",
    "tests/native/",
    "tests/schedule/",
    "tests/wire/",
    "tests/unit/test_layering.py",
    "tests/unit/test_build_record.py",
)
#: Of these, what has deadlines of seconds for several processes.
ALONE = ("tests/emulated/test_torch.py", "tests/emulated/test_watchdog.py")
#: What takes longest begins first, so that no worker is left alone with it.
LONGEST = (
    "tests/emulated/test_engine.py",
    "tests/native/test_native.py",
    "tests/emulated/test_ptx.py",
    "tests/native/",
    "tests/build/",
    "tests/emulated/test_plants.py",
    "tests/emulated/test_communicator_arrays.py",
    "tests/emulated/test_engine_ranks.py",
    "tests/emulated/test_models.py",
    "tests/emulated/",
)
Units = dict[str, dict[str, bool]]


def is_alone(file: str) -> bool:
    return file.startswith(ALONE) or not file.startswith(TOGETHER)


def place(file: str) -> int:
    """Position among the files that run together."""
    found = [i for i, prefix in enumerate(LONGEST) if file.startswith(prefix)]
    return found[0] if found else len(LONGEST)


class TwoPhases(LoadScopeScheduling):  # type: ignore[misc]
    """A unit is a file. A worker runs a test only when it knows the next one or that there is none:
    so the one that stays waits with its last test until the others are gone."""

    def __init__(self, config: Any, log: Any = None) -> None:
        super().__init__(config, log)
        self.later: Units = {}

    @property
    def tests_finished(self) -> bool:
        return not self.later and bool(super().tests_finished)

    @property
    def has_pending(self) -> bool:
        return bool(self.later) or bool(super().has_pending)

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.split("::", 1)[0]

    def schedule(self) -> None:
        if self.collection is None:
            if not self._check_nodes_have_same_collection():
                return
            self.collection = list(next(iter(self.registered_collections.values())))
            units: Units = {}
            for nodeid in self.collection:
                units.setdefault(self._split_scope(nodeid), {})[nodeid] = False
            for file in sorted(units, key=place):
                self._add(file, units[file])
        for node in self.nodes:
            self._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        """A worker has come to its end; where it died, returns the test that it was in, and others
        get what it had left."""
        work = self.assigned_work.pop(node)
        open_tests = [test for unit in work.values() for test, done in unit.items() if not done]
        died_in = open_tests[0] if open_tests else None
        for file, unit in work.items():
            if died_in in unit:
                unit[died_in] = True
            if not all(unit.values()):
                self._add(file, unit)
        for other in self.nodes:
            self._reschedule(other)
        return died_in

    def _add(self, file: str, unit: dict[str, bool]) -> None:
        (self.later if is_alone(file) else self.workqueue)[file] = unit

    def _reschedule(self, node: Any) -> None:
        if node.shutting_down or node not in self.registered_collections:
            return
        while self.workqueue and self._pending_of(self.assigned_work[node]) < 2:
            self._assign_work_unit(node)
        if self.workqueue:
            return
        if self.later and len(self.nodes) > 1:
            if node is not min(self.nodes, key=lambda each: each.gateway.id):
                node.shutdown()
            return
        while self.later:
            file = next(iter(self.later))
            self.workqueue[file] = self.later.pop(file)
            self._assign_work_unit(node)
        node.shutdown()
