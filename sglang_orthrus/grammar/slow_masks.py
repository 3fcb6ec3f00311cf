"""How long a round may fill masks, and which grammars have slow ones."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
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


# Weight of a new mask in the mean of its grammar. Slow masks are rare, one in tens.
_WEIGHT = 1 / 64
# What a mean loses in a round that does not look, so that a grammar is tried again.
_FORGOTTEN = 1 / 1000
# Of what it costs to leave masks out. A mean below it is not worth it.
_LEAST_SHARE = 1 / 64


class ExpectedWaits:
    """How long a mask of each grammar is expected to keep a round waiting. Not for several threads at once."""

    def __init__(self) -> None:
        # Seconds by key; the one that was learnt least recently is first. Grammars that never were slow are not listed.
        self._means: OrderedDict[int, float] = OrderedDict()

    def learn(self, key: int, seconds: float) -> None:
        """What one mask of a grammar cost."""
        mean = self._means.pop(key, 0.0)
        if mean or seconds:
            self._means[key] = mean + _WEIGHT * (seconds - mean)
        if len(self._means) > MAX_GRAMMARS:
            self._means.popitem(last=False)

    def not_worth(self, keys: Mapping[int, int], cost: float) -> list[int]:
        """The requests of a round whose masks are better left out; none if all together wait for less than it costs.

        keys: of requests' grammars by request; cost: in seconds.
        """
        means = {request: mean for request, key in keys.items() if (mean := self._means.get(key, 0.0)) > 0.0}
        if sum(means.values()) <= cost:
            return []
        left_out = [request for request, mean in means.items() if mean > _LEAST_SHARE * cost]
        for key in {keys[request] for request in left_out}:
            self._means[key] *= 1 - _FORGOTTEN
        return left_out


# Weight of a new look in the mean; one look counts as at most so many times the mean.
_LOOK_WEIGHT, _MOST_AT_ONCE = 1 / 8, 2.0
# What the mean loses of its distance from the first guess in a round without a look, so that looks are tried again.
_LOOK_FORGOTTEN = 1 / 1000


class LookCost:
    """What it costs to look at chosen tokens before the next round is queued, where rounds draft nothing.

    The host waits for a GPU then, and until it has queued the next pass the GPU waits for the host. Without looks both
    work side by side. So a look costs the shorter of the two waits; on a CPU that is none.

    Args:
        seconds: a first guess.

    Attributes:
        seconds: what a look is expected to cost.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = self._first = seconds
        # When the last round's look was over, and how long the GPU has waited since then; None if there was none.
        self._looked_at: float | None = None
        self._idle: float | None = None

    def queued(self) -> None:
        """The pass of a round is queued that may look at what it chooses."""
        self._idle = None if self._looked_at is None else time.perf_counter() - self._looked_at
        if self._looked_at is None:
            self.seconds += _LOOK_FORGOTTEN * (self._first - self.seconds)
        self._looked_at = None

    def looked(self, waited: float) -> None:
        """The round looked. waited: seconds for its pass."""
        if self._idle is not None:
            found = min(self._idle, waited)
            self.seconds += _LOOK_WEIGHT * (min(found, _MOST_AT_ONCE * self.seconds) - self.seconds)
            self._idle = None
        self._looked_at = time.perf_counter()


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
