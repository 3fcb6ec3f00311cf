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
# Plain decoding is never probed, and to try it again costs little. So what a few of its rounds said fades sooner: in so
# many for each of them.
PLAIN_HALF_LIFE_PER_ROUND = 8.0
# Batch sizes between two powers of two share their factors.
_NUM_SIZES = 16


class CostCorrections:
    """Factors of costs, by kind of round, batch size and width.

    Args:
        num_widths: K.
        knows_plain: whether the first of them is plain decoding.
    """

    def __init__(self, num_widths: int, knows_plain: bool = False) -> None:
        self._num_widths = num_widths
        self._knows_plain = knows_plain
        self._tables: dict[Hashable, _Table] = {}

    def factors(self, kind: Hashable, num_requests: int) -> FloatArray:
        """Of a batch at every width: [K], not to be written to.

        A batch size that was not seen is as far off as the nearest one. A width that was hardly seen takes what it took
        at start-up, or as much less as the one that was seen most: start-up may have been disturbed. So a width is
        tried if it may be promising, and then its factor is known.
        """
        table = self._tables.get(kind)
        return np.ones(self._num_widths) if table is None else table.factors(_size(num_requests))

    def observe(self, kind: Hashable, num_requests: int, width: int, factor: float, rounds: int = 1) -> None:
        """Of rounds of this width, by its index.

        factor: their measured time over their time at start-up, in the mean.
        """
        if kind not in self._tables:
            self._tables[kind] = _Table(self._num_widths, self._knows_plain)
        self._tables[kind].observe(_size(num_requests), width, factor, rounds)


class _Table:
    """Factors by batch size and width, of one kind of round."""

    def __init__(self, num_widths: int, knows_plain: bool) -> None:
        self._knows_plain = knows_plain
        # [K] rounds for each that was seen; `HALF_LIFE` at most.
        self._half_lives = np.full(num_widths, HALF_LIFE)
        if knows_plain:
            self._half_lives[0] = PLAIN_HALF_LIFE_PER_ROUND
        # Means of what was seen.
        self._factors = np.ones((_NUM_SIZES, num_widths))
        # Rounds that a mean rests on, and `_now` at the last of them.
        self._rounds = np.zeros((_NUM_SIZES, num_widths))
        self._seen_at = np.zeros((_NUM_SIZES, num_widths))
        self._clock = np.zeros(_NUM_SIZES)
        self._columns = np.arange(num_widths)
        # By size: the nearest one of every width that was seen.
        self._sources: dict[int, npt.NDArray[np.int64]] = {}

    def factors(self, size: int) -> FloatArray:
        """[K]."""
        if size not in self._sources:
            distance = np.abs(np.arange(_NUM_SIZES) - size)[:, None] + np.where(self._rounds > 0, 0, _NUM_SIZES)
            self._sources[size] = distance.argmin(0)
        at = (self._sources[size], self._columns)
        means, rounds = self._factors[at], self._rounds[at]
        fading = self._fading(rounds, self._now(at[0]) - self._seen_at[at])
        shares = fading * rounds / (rounds + START_UP_ROUNDS)
        most = int(np.argmax(fading * rounds))
        expected = min(1.0, 1.0 + float(shares[most] * (means[most] - 1.0)))
        return np.asarray(expected + shares * (means - expected))

    def observe(self, size: int, width: int, factor: float, new: int) -> None:
        known = float(self.factors(size)[width])
        if not self._rounds[size, width]:
            self._sources.clear()
        fading = self._fading(self._rounds[size], self._now(size) - self._seen_at[size])
        rounds = float((self._rounds[size] * fading)[width])
        limited = min(max(factor, known / MOST_AT_ONCE), known * MOST_AT_ONCE)
        weight = max(1.0 - (1.0 - WEIGHT) ** new, new / (rounds + new))
        self._factors[size, width] += weight * (limited - self._factors[size, width])
        self._rounds[size, width] = rounds + new
        self._clock[size] += new
        self._seen_at[size, width] = self._now(size)[width]

    def _now(self, sizes: npt.NDArray[np.int64] | int) -> FloatArray:
        """[K]: rounds of each width's size until now; for plain decoding those of any size."""
        now = np.full(len(self._columns), self._clock[sizes])
        if self._knows_plain:
            now[0] = self._clock.sum()
        return now

    def _fading(self, rounds: FloatArray, age: FloatArray) -> FloatArray:
        """[K]: what is left of what so many rounds of every width said, so many rounds ago."""
        half_lives = np.clip(self._half_lives * rounds, 1.0, HALF_LIFE)
        return np.asarray(np.exp2(-age / half_lives))


def _size(num_requests: int) -> int:
    return min(num_requests.bit_length(), _NUM_SIZES - 1)
