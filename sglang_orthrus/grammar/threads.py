"""Threads that share jobs of a fraction of a millisecond.

`concurrent.futures` makes a future with a lock for every helper and call: with 12 threads on 16 cores a round's masks
took 0.3 to 0.5 ms more (docs/log.md).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue

Job = Callable[[], None]
Ends = SimpleQueue[BaseException | None]


class ThreadTeam:
    """A calling thread and its helpers.

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
        """Run all jobs, each thread taking the next one. Raise what a job raises once all are done."""
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


def available_cores(root: Path = Path("/")) -> int:
    """How many cores the process may use: those of its affinity mask, or fewer where its control groups have a quota.

    root: of the file system. Quotas of both versions of control groups count, those of enclosing groups, too.
    """
    quotas = [quota for folder in _group_folders(root) if (quota := _quota(folder)) is not None]
    return max(1, int(min([float(len(os.sched_getaffinity(0))), *quotas])))


def _group_folders(root: Path) -> Iterator[Path]:
    """Of the process's groups that may limit processors, and of all that enclose them."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's, and then its own group is at the mount.
        for mount in {mounts / controllers, mounts / "cpu"} if controllers else {mounts}:
            folder = mount / path.lstrip("/")
            yield from (mount, folder, *(parent for parent in folder.parents if mount in parent.parents))


def _quota(folder: Path) -> float | None:
    """In processors; None for no limit."""
    quota, _, period = _read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""
