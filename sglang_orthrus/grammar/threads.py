"""Threads that share jobs of a fraction of a millisecond.

`concurrent.futures` makes a future with a lock for every helper and call: with 12 threads on 16 cores a round's masks
took 0.3 to 0.5 ms more (docs/log.md).
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from weakref import WeakSet

Job = Callable[[], object]
# The number of a job that is over, and what it raised.
Ends = SimpleQueue[tuple[int, BaseException | None]]
# When the process ends, helpers have so long.
MAX_FINISH_SECONDS = 5.0


class StartedJobs:
    """Jobs that helpers run while the thread that started them goes on; it alone may wait for them.

    Args:
        count: how many there are.
        queue: where helpers take them from.
        ends: where helpers tell of them.
    """

    def __init__(self, count: int, queue: Iterator[tuple[int, Job]], ends: Ends) -> None:
        self._left = set(range(count))
        self._queue = queue
        self._ends = ends
        self._is_dropped = False

    def wait(self, seconds: float, patience: float = 0.0) -> frozenset[int]:
        """Wait for all, but not for long. Returns the numbers of those that are not known to be done.

        What a job raised is raised here.

        Args:
            seconds: to wait at most ...
            patience: ... and behind that for as long as no more than so many seconds pass from one job's end to the
                next one's.
        """
        end = time.perf_counter() + seconds
        while self._left:
            left = max(end - time.perf_counter(), patience)
            try:
                self._take(*(self._ends.get(timeout=left) if left > 0 else self._ends.get_nowait()))
            except Empty:
                break
        return frozenset(self._left)

    def wait_for(self, number: int) -> None:
        """Wait for one, and raise what a job raised until then."""
        assert not self._is_dropped, "it may never begin"
        while number in self._left:
            self._take(*self._ends.get())

    def drop(self) -> None:
        """Have no helper begin any of them from now on; nobody may wait for them afterwards."""
        self._is_dropped = True
        for _ in self._queue:
            pass

    def _take(self, number: int, problem: BaseException | None) -> None:
        self._left.discard(number)
        if problem is not None:
            raise problem


_TEAMS: WeakSet[ThreadTeam] = WeakSet()


class ThreadTeam:
    """A calling thread and its helpers.

    Args:
        size: threads that work, the caller's own included.
        name: of the helpers.

    Attributes:
        size: the same.
    """

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self._name = name
        self._calls = SimpleQueue[tuple[Iterator[tuple[int, Job]], Ends]]()
        self._num_helpers = 0
        # Idents of those that work.
        self._busy = set[int]()
        _TEAMS.add(self)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs, each thread taking the next one. Raise what a job raises once all are done."""
        queue, ends = enumerate(jobs), Ends()
        self._call(min(self.size, len(jobs)) - 1, queue, ends)
        _work(queue, ends)
        # A helper that wakes up late finds nothing left to do, and nobody waits for it.
        problems = [problem for _, problem in (ends.get() for _ in jobs) if problem is not None]
        if problems:
            raise problems[0]

    def start(self, jobs: Sequence[Job], most: int) -> StartedJobs:
        """Have at most so many helpers run all jobs, each taking the next one."""
        queue, ends = enumerate(jobs), Ends()
        self._call(min(most, len(jobs)), queue, ends)
        return StartedJobs(len(jobs), queue, ends)

    def _call(self, num_helpers: int, queue: Iterator[tuple[int, Job]], ends: Ends) -> None:
        # Those that work may have a long job.
        while self._num_helpers < min(max(1, self.size - 1), len(self._busy) + num_helpers):
            threading.Thread(target=self._help, name=f"{self._name}-{self._num_helpers}", daemon=True).start()
            self._num_helpers += 1
        for _ in range(num_helpers):
            self._calls.put((queue, ends))

    def finish(self, seconds: float = MAX_FINISH_SECONDS) -> None:
        """Wait until no helper works, at most so long."""
        end = time.perf_counter() + seconds
        while self._busy and time.perf_counter() < end:
            time.sleep(0.001)

    def _help(self) -> None:
        ident = threading.get_ident()
        while True:
            call = self._calls.get()
            self._busy.add(ident)
            _work(*call)
            self._busy.discard(ident)


@atexit.register
def _finish_all() -> None:
    """An engine's thread that finds no interpreter any more aborts the process."""
    for team in list(_TEAMS):
        team.finish()


def _work(jobs: Iterator[tuple[int, Job]], ends: Ends) -> None:
    for number, job in jobs:
        try:
            job()
        except BaseException as problem:  # noqa: BLE001 (the caller raises it)
            ends.put((number, problem))
        else:
            ends.put((number, None))


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
