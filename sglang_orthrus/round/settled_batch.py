"""A batch for which plain decoding is best: its width is not chosen again for some rounds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from sglang_orthrus.round.costs import FloatArray

# Plain decoding teaches nothing about drafts, so a batch for which it is best keeps it for so many rounds, while few
# requests join or end: at most this share.
SETTLED_ROUNDS = 9
FEW = 1 / 8
# A round that took so many times as long as most did was held up by something else.
MOST_TIMES_MEDIAN = 2.0


@dataclass
class SettledBatch:
    """A batch that decodes plainly for some more rounds.

    Attributes:
        num_requests: when the width was chosen.
        kind: of its rounds.
        context: tokens of all contexts then.
        row: what its rounds cost then.
        num_joined: requests that joined since then.
        rounds_left: for which no width is chosen.
        times: seconds that its rounds took, where known.
    """

    num_requests: int
    kind: Hashable
    context: int | None
    row: FloatArray
    num_joined: int = 0
    rounds_left: int = SETTLED_ROUNDS - 1
    times: list[float] = field(default_factory=list)

    def holds_for(self, num_requests: int, kind: Hashable) -> bool:
        """Whether a batch is about the same."""
        few = FEW * self.num_requests
        return kind == self.kind and self.num_joined <= few and abs(num_requests - self.num_requests) <= few

    def add_steps(self, count: int) -> bool:
        """Whether so many more rounds may run at once with the planned one, as they then do."""
        if count > self.rounds_left:
            return False
        self.rounds_left -= count
        return True


def usual_mean(times: Sequence[float]) -> float:
    """Of at least one time. Those far above the median count as less: a kernel's compilation holds up one round only.

    A mean otherwise: where a host is slow at every third round, traffic is slowed down by that much.
    """
    most = MOST_TIMES_MEDIAN * median(times)
    return fmean(min(most, time) for time in times)
