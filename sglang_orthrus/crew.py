"""Threads that share jobs of a fraction of a millisecond.

`concurrent.futures` makes a future with a lock for every helper and call: with 12 threads on 16 cores a round's masks
took 0.3 to 0.5 ms more (docs/log.md).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

Job = Callable[[], None]
Ends = SimpleQueue[BaseException | None]


class Crew:
    """A caller and its helpers.

    Args:
        size: threads that work, the caller's own included.
        name: of the helpers.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._calls = SimpleQueue[tuple[Iterator[Job], Ends]]()
        self._num_helpers = 0

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs, each thread the next one as it comes to it, and raise what a job raises when all are done."""
        queue, ends = iter(jobs), Ends()
        num_helpers = min(self._size, len(jobs)) - 1
        while self._num_helpers < num_helpers:
            threading.Thread(target=self._help, name=f"{self._name}-{self._num_helpers}", daemon=True).start()
            self._num_helpers += 1
        for _ in range(num_helpers):
            self._calls.put((queue, ends))
        _work(queue, ends)
        # A helper that wakes up late finds nothing left to do, and nobody waits for it.
        problems = [problem for _ in jobs if (problem := ends.get()) is not None]
        if problems:
            raise problems[0]

    def _help(self) -> None:
        while True:
            _work(*self._calls.get())


def _work(jobs: Iterator[Job], ends: Ends) -> None:
    for job in jobs:
        try:
            job()
        except BaseException as problem:  # noqa: BLE001 (the caller raises it)
            ends.put(problem)
        else:
            ends.put(None)
