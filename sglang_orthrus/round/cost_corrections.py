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
# One round may be slow for any reason. It counts as at most so many times what was expected.
MOST_AT_ONCE = 2.0
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
        self._rounds = np.zeros((_NUM_SIZES, num_widths), np.int64)
        # By size: which of all factors stand for the widths.
        self._sources: dict[int, npt.NDArray[np.int64]] = {}

    def factors(self, size: int) -> FloatArray:
        """[K]."""
        if size not in self._sources:
            self._sources[size] = self._nearest(size)
        return np.asarray(self._factors.ravel()[self._sources[size]])

    def observe(self, size: int, width: int, factor: float) -> None:
        known, rounds = float(self._factors[size, width]), int(self._rounds[size, width])
        if not rounds:
            self._sources.clear()
            known = factor
        limited = min(max(factor, known / MOST_AT_ONCE), known * MOST_AT_ONCE)
        self._factors[size, width] = known + max(WEIGHT, 1.0 / (rounds + 1)) * (limited - known)
        self._rounds[size, width] = rounds + 1

    def _nearest(self, size: int) -> npt.NDArray[np.int64]:
        num_widths = self._rounds.shape[1]
        distance = np.abs(np.arange(_NUM_SIZES) - size)[:, None] + np.where(self._rounds > 0, 0, 2 * _NUM_SIZES)
        nearest = distance.argmin(0)
        columns = np.where(self._rounds.any(0), np.arange(num_widths), num_widths)
        return np.asarray(nearest * (num_widths + 1) + columns)


def _size(num_requests: int) -> int:
    return min(num_requests.bit_length(), _NUM_SIZES - 1)
