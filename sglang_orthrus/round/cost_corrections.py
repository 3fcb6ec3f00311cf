"""What rounds take in traffic, relative to what they took when they were timed at start-up.

Start-up times greedy rounds with little context. In traffic the host may be what is slow, grammars take their time, and
contexts grow. So each kind of round, batch size and width has a factor, learnt from rounds that followed each other.

Letters: K widths.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from sglang_orthrus.round.costs import FloatArray

# Weight of a new round, once the mean of the first ones would give it less.
WEIGHT = 1 / 16
# What was timed at start-up counts as so many rounds.
START_UP_ROUNDS = 1.0
# One round may be slow for any reason. It counts as at most so many times what was expected.
MOST_AT_ONCE = 2.0
# While rounds have other widths, what was learnt of one fades by half in so many of them. So a width that was slow once
# is tried again.
HALF_LIFE = 256.0
# Batch sizes between two powers of two share their factors.
_NUM_SIZES = 16


class CostCorrections:
    """Factors of costs, by kind of round, batch size and width.

    Args:
        num_widths: K.
    """

    def __init__(self, num_widths: int) -> None:
        self._num_widths = num_widths
        self._tables: dict[Hashable, _Table] = {}

    def factors(self, kind: Hashable, num_requests: int) -> FloatArray:
        """Of a batch at every width: [K], not to be written to.

        A batch size that was not seen is as far off as the nearest one. A width that was not seen takes what it took at
        start-up: so it is tried if that is promising, and then its factor is known.
        """
        table = self._tables.get(kind)
        return np.ones(self._num_widths) if table is None else table.factors(_size(num_requests))

    def observe(self, kind: Hashable, num_requests: int, width: int, factor: float) -> None:
        """Of a round of this width, by its index: its measured time over its time at start-up."""
        if kind not in self._tables:
            self._tables[kind] = _Table(self._num_widths)
        self._tables[kind].observe(_size(num_requests), width, factor)


class _Table:
    """Factors by batch size and width, of one kind of round."""

    def __init__(self, num_widths: int) -> None:
        # A column more: what stands for a width that was not seen.
        self._factors = np.ones((_NUM_SIZES, num_widths + 1))
        # Rounds that a factor rests on, and rounds of this size until the last of them.
        self._rounds = np.zeros((_NUM_SIZES, num_widths + 1))
        self._seen_at = np.zeros((_NUM_SIZES, num_widths + 1))
        self._clock = np.zeros((_NUM_SIZES, 1))
        # By size: which of all factors stand for the widths.
        self._sources: dict[int, npt.NDArray[np.int64]] = {}

    def factors(self, size: int) -> FloatArray:
        """[K]."""
        if size not in self._sources:
            self._sources[size] = self._nearest(size)
        faded = 1.0 + (self._factors - 1.0) * np.exp2((self._seen_at - self._clock) / HALF_LIFE)
        return np.asarray(faded.ravel()[self._sources[size]])

    def observe(self, size: int, width: int, factor: float) -> None:
        known = float(self.factors(size)[width])
        if not self._rounds[size, width]:
            self._sources.clear()
        rounds = self._rounds[size, width] * np.exp2((self._seen_at - self._clock)[size, width] / HALF_LIFE)
        limited = min(max(factor, known / MOST_AT_ONCE), known * MOST_AT_ONCE)
        weight = max(WEIGHT, 1.0 / (rounds + 1.0 + START_UP_ROUNDS))
        self._factors[size, width] = known + weight * (limited - known)
        self._rounds[size, width] = rounds + 1.0
        self._clock[size] += 1.0
        self._seen_at[size, width] = self._clock[size, 0]

    def _nearest(self, size: int) -> npt.NDArray[np.int64]:
        seen = self._rounds[:, :-1] > 0
        num_widths = seen.shape[1]
        distance = np.abs(np.arange(_NUM_SIZES) - size)[:, None] + np.where(seen, 0, 2 * _NUM_SIZES)
        columns = np.where(seen.any(0), np.arange(num_widths), num_widths)
        return np.asarray(distance.argmin(0) * (num_widths + 1) + columns)


def _size(num_requests: int) -> int:
    return min(num_requests.bit_length(), _NUM_SIZES - 1)
