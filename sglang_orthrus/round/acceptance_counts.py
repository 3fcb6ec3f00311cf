"""Counts of rounds by width, and what they say of a round of any width.

Letters: R requests, K widths, A rows of the counts: one per request, or one per class of requests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_orthrus.round.costs import FloatArray

IntArray = npt.NDArray[np.int64]

# A new class: nine of ten drafts accepted.
NEUTRAL_RATE = 0.9
# What rounds at other widths say is worth at most so many rounds at the width itself ...
OTHER_WIDTHS_ROUNDS = 16.0
# ... and what a narrower width says a quarter as much as what a wider one says.
NARROWER_TRUST = 0.25

# A weight that counts only where there is no other.
TINY = 1e-6
# Columns of the counts, before those of tokens.
SEEN, FULL, FAILED, TOKENS = range(4)


class AcceptanceCounts:
    """Decayed counts of rounds, in rows: one per request, or one per class of requests.

    Args:
        widths: [K].
        num_rows: A.

    Attributes:
        counts: [A, K, 3 + K] of the rounds at each width: how many there were, how many committed the whole width, how
            many less but more than the next narrower width, and what they would have committed at every width.
        tokens: [A, K, K] what a round of the last width is expected to commit, by the rounds at the middle one.
        rounds: [A] how many rounds, not decayed.
    """

    def __init__(self, widths: Sequence[int], num_rows: int) -> None:
        num_widths = len(widths)
        self._widths = np.array(widths, np.int64)
        self._narrower = np.array([1, *widths[:-1]], np.int64)
        self.counts = np.zeros((num_rows, num_widths, TOKENS + num_widths))
        self.tokens = np.ones((num_rows, num_widths, num_widths))
        self.rounds = np.zeros(num_rows)
        order = np.sign(np.arange(num_widths)[:, None] - np.arange(num_widths))
        self._trust = np.choose(order + 1, [NARROWER_TRUST, 0.0, 1.0])
        self._diagonal = np.arange(num_widths)

    def clear(self, row: int) -> None:
        """For another request."""
        self.counts[row] = 0.0
        self.tokens[row] = 1.0
        self.rounds[row] = 0.0

    def counts_of(self, column: int, lens: IntArray, rates: FloatArray) -> FloatArray:
        """Counts of one round each: [R, 3 + K].

        A text's end may cut a round short: how many more drafts were right, nobody knows. Such a round counts as it
        would have gone on in the mean. To leave it out would be wrong, since the end mostly cuts the better rounds.

        Args:
            column: of their width.
            lens: [R] tokens that texts took in.
            rates: [R] at which the drafts behind them would have been accepted; 0 of a round that was not cut short.
        """
        width, narrower = self._widths[column], self._narrower[column]
        left = np.minimum(self._widths, width) - lens[:, None]
        goes_on = rates[:, None] ** np.maximum(left, 0)
        more = np.where(left > 0, rates[:, None] * (1.0 - goes_on) / (1.0 - rates[:, None]), 0.0)
        counts = np.empty((len(lens), self.counts.shape[2]))
        counts[:, SEEN] = 1.0
        counts[:, FULL] = goes_on[:, column]
        counts[:, FAILED] = rates ** np.maximum(narrower - lens, 0) - goes_on[:, column]
        counts[:, TOKENS:] = np.minimum(lens[:, None], self._widths) + more
        return counts

    def add(
        self, rows: IntArray, column: int, counts: FloatArray, half_life: float, kept: FloatArray | float = 1.0
    ) -> None:
        """Count rounds at one width.

        Args:
            rows: [R], each once.
            column: of the width.
            counts: [R, 3 + K].
            half_life: in rounds.
            kept: [R] share of the drafts that were accepted in the former rounds that still counts.
        """
        decay = np.exp2(-counts[:, SEEN] / half_life)
        total = self.counts[rows] * decay[:, None, None]
        if np.min(kept) < 1.0:
            kept = np.asarray(kept)[:, None, None]
            seen = total[:, :, SEEN, None]
            total[:, :, TOKENS:] = seen + kept * (total[:, :, TOKENS:] - seen)
            total[:, :, FULL : FAILED + 1] *= kept
            self.tokens[rows] = 1.0 + kept * (self.tokens[rows] - 1.0)
        total[:, column] += counts
        self.counts[rows] = total
        self.rounds[rows] += counts[:, SEEN]
        self.tokens[rows, column] = self._tokens_of(column, total[:, column])

    def expected(self, rows: IntArray, ratios: FloatArray, prior: FloatArray, prior_weights: FloatArray) -> FloatArray:
        """Tokens that a round commits at every width: [R, K].

        What was seen at a width counts fully; what others say of it, and the prior, fill up to a few rounds.

        Args:
            rows: [R].
            ratios: [R, K, K] what the last width commits, relative to what the middle one says of it.
            prior: [R, K] or [K] tokens.
            prior_weights: [R] rounds that the prior is worth.
        """
        tokens = self.tokens[rows]
        seen = self.counts[rows, :, SEEN]
        weights = seen[:, :, None] * self._trust
        said = ((tokens - 1.0) * ratios + 1.0) * weights
        prior_weights = prior_weights[:, None] + TINY
        others = weights.sum(1) + prior_weights
        fallback = (said.sum(1) + prior_weights * prior) / others
        others = np.minimum(others, OTHER_WIDTHS_ROUNDS)
        own = tokens[:, self._diagonal, self._diagonal]
        return np.clip((seen * own + others * fallback) / (seen + others), 1.0, self._widths)

    def _tokens_of(self, column: int, counts: FloatArray) -> FloatArray:
        """What rounds at one width say of all: [R, K]. Behind it, drafts are accepted as often as the last were."""
        seen = counts[:, SEEN, None]
        tokens = counts[:, TOKENS:] / seen
        further = self._widths[column + 1 :] - self._widths[column]
        if not len(further):
            return tokens
        shorter = counts[:, TOKENS + column - 1] if column else counts[:, SEEN]
        survived = counts[:, TOKENS + column] - shorter
        # One more draft as in a new class keeps the rate away from 0 and 1.
        rate = ((survived + NEUTRAL_RATE) / (survived + counts[:, FAILED] + 1.0))[:, None]
        more = rate * (1.0 - rate**further) / (1.0 - rate)
        tokens[:, column + 1 :] = tokens[:, column, None] + counts[:, FULL, None] / seen * more
        return tokens


def tokens_at_rate(rate: float, width: int) -> float:
    """Tokens that a round commits if every draft is accepted at this rate."""
    return (1.0 - rate**width) / (1.0 - rate)
