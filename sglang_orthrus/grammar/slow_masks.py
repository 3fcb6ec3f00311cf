"""How long a round may fill masks, and which grammars have slow ones."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from math import isfinite

# So many slow blocks make a grammar slow: one alone may be the machine's fault.
NUM_SLOW_BLOCKS = 2
# After so many rounds a slow grammar is tried again.
ROUNDS_KEPT = 1000
# Clients choose the keys, so only so many are remembered.
MAX_GRAMMARS = 1024


class SlowGrammars:
    """Remembers which grammars took too long lately. Not for several threads at once."""

    def __init__(self) -> None:
        self._round = 0
        # By key: slow blocks, and the round in which they are forgotten. The least recent one is first.
        self._slow_blocks: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def begin_round(self) -> None:
        """Rounds are the clock by which a grammar is forgotten."""
        self._round += 1
        while self._slow_blocks:
            key, (_, end) = next(iter(self._slow_blocks.items()))
            if end > self._round:
                break
            del self._slow_blocks[key]

    def add(self, key: int) -> None:
        """A block of this grammar took too long."""
        count, _ = self._slow_blocks.pop(key, (0, 0))
        self._slow_blocks[key] = count + 1, self._round + ROUNDS_KEPT
        if len(self._slow_blocks) > MAX_GRAMMARS:
            self._slow_blocks.popitem(last=False)

    def __contains__(self, key: int | None) -> bool:
        return key is not None and self._slow_blocks.get(key, (0, 0))[0] >= NUM_SLOW_BLOCKS

    def __len__(self) -> int:
        return len(self._slow_blocks)


class TimeShares:
    """Divides the time of a round among jobs that several threads take one after the other.

    Args:
        seconds: on the clock, for all jobs; infinite for no limit.
        num_jobs: that will ask.
        num_threads: that work on them.
    """

    def __init__(self, seconds: float, num_jobs: int, num_threads: int) -> None:
        self._end = time.perf_counter() + seconds
        self._num_waiting = num_jobs
        self._num_threads = num_threads
        self._lock = threading.Lock()

    def take(self) -> float:
        """Seconds for the job that asks: an equal share of what is left, 0 or more."""
        if not isfinite(self._end):
            return self._end
        with self._lock:
            num_waiting = max(1, self._num_waiting)
            self._num_waiting -= 1
        left = max(0.0, self._end - time.perf_counter())
        return left * min(1.0, self._num_threads / num_waiting)


class Deadline:
    """A limit in processor time of the calling thread: what other processes take does not count.

    seconds: infinite for none.
    """

    def __init__(self, seconds: float = float("inf")) -> None:
        self._end = time.perf_counter() + seconds
        self._processor_end = time.thread_time() + seconds if isfinite(seconds) else seconds

    def is_over(self) -> bool:
        """Whether the limit is spent."""
        # The thread's own clock is a system call, and it is never ahead of the other one.
        return time.perf_counter() >= self._end and time.thread_time() >= self._processor_end


NO_DEADLINE = Deadline()
