"""What new requests of a class are expected to be like, from the first rounds of others.

Texts that had one width may draft worse than those that had another. So widths are not compared by the rounds that each
of them had: all rounds count for every width. For a narrower one, a round counts by what it would have committed there.
For a wider one, it is continued as rounds of that width were: they say how many drafts are accepted there for each that
was accepted before.

Letters: C classes, N of them, K widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_orthrus.round.acceptance_counts import (
    NEUTRAL_RATE,
    SEEN,
    TINY,
    TOKENS,
    AcceptanceCounts,
    IntArray,
    tokens_at_rate,
)
from sglang_orthrus.round.costs import FloatArray

# The rounds of a class lose half of their weight in so many more of its rounds.
HALF_LIFE = 128.0
# A new class is expected to accept nine of ten drafts, as if so many rounds had been seen: with few requests, a new
# server begins at its widest.
NEUTRAL_ROUNDS = 4.0
# This expectation loses half of its weight in so many rounds.
NEUTRAL_HALF_LIFE = 16.0


class ClassAcceptance:
    """Expectations of classes.

    Args:
        widths: [K], the narrowest first.
        num_classes: C.

    Attributes:
        neutral: [K] tokens that a round commits of what nothing is known of.
        tokens: [C, K] tokens that a round commits of a new request.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        self._widths = np.array(widths, np.float64)
        self._counts = AcceptanceCounts(widths, num_classes)
        self.neutral = np.array([tokens_at_rate(NEUTRAL_RATE, width) for width in widths])
        self.tokens = np.tile(self.neutral, (num_classes, 1))
        # [C, K] drafts that rounds of at least this width accepted in the step to it from the next narrower width,
        # and in the step before. A new class has them as it is expected to.
        steps = np.diff(self.neutral, prepend=1.0) * NEUTRAL_ROUNDS
        self._further = np.tile(steps, (num_classes, 1))
        self._before = np.tile([0.0, *steps[:-1]], (num_classes, 1))

    def observe(self, rows: IntArray, column: int, counts: FloatArray, ratios: FloatArray) -> None:
        """Of rounds at one width.

        Args:
            rows: [N] classes.
            column: of the width.
            counts: [N, 3 + K] as in `AcceptanceCounts`.
            ratios: [N, K, K] what the last width commits, relative to what the middle one says of it.
        """
        self._counts.add(rows, column, counts, HALF_LIFE)
        self._observe_growth(rows, column, counts)
        weights = NEUTRAL_ROUNDS * np.exp2(-self._counts.rounds[rows] / NEUTRAL_HALF_LIFE) + TINY
        seen = self._counts.counts[rows, :, SEEN, None]
        total = (seen * self._said(rows, ratios)).sum(1) + weights[:, None] * self.neutral
        self.tokens[rows] = np.clip(total / (seen.sum(1) + weights[:, None]), 1.0, self._widths)

    def _observe_growth(self, rows: IntArray, column: int, counts: FloatArray) -> None:
        decay = np.exp2(-counts[:, SEEN] / HALF_LIFE)[:, None]
        steps = np.diff(counts[:, TOKENS : TOKENS + column + 1], prepend=counts[:, SEEN, None])
        for total, new in ((self._further, steps[:, 1:]), (self._before, steps[:, :-1])):
            total[rows, 1 : column + 1] = total[rows, 1 : column + 1] * decay + new

    def _said(self, rows: IntArray, ratios: FloatArray) -> FloatArray:
        """Tokens that a round of the last width commits, by the rounds at the middle one: [N, K, K]."""
        tokens = self._counts.tokens[rows]
        said = (tokens - 1.0) * ratios + 1.0
        growth = self._further[rows] / np.maximum(self._before[rows], TINY)
        for column in range(len(self._widths) - 1):
            step = tokens[:, column, column] - (tokens[:, column, column - 1] if column else 1.0)
            steps = step[:, None] * np.cumprod(growth[:, column + 1 :], 1)
            said[:, column, column + 1 :] = said[:, column, column, None] + np.cumsum(steps, 1)
        return said
