"""Ranks as threads of the test, each with a communicator over inproc."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dpcomm import Communicator

TIMEOUT = 30.0
_numbers = iter(range(10**6))


def run_ranks(world: int, body: Callable[[Communicator], Any], **options: Any) -> list[Any]:
    """body(communicator) on a thread per rank over inproc; the results, or the first error."""
    name = f"unit-{next(_numbers)}"
    results: list[Any] = [None] * world
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            with Communicator(
                rank, world, name=name, transport="inproc", timeout=TIMEOUT, **options
            ) as made:
                results[rank] = body(made)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT + 20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results
