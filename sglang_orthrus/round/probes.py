"""When to try another width for one round, to learn what it would bring.

Letters: K widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import numpy as np

from sglang_orthrus.round.costs import FloatArray
from sglang_orthrus.round.widths import likely_tokens

# Rounds between two probes, and until a width that may well be better is tried again.
INTERVAL = 16
# The same from plain decoding, where nothing is learnt otherwise: tokens of each request.
PLAIN_INTERVAL = 64
# The same for a width that is surely worse, and the longest after probes that changed nothing.
LONGEST_INTERVAL = 256


class _Pending(NamedTuple):
    """A probe whose result is not known.

    Attributes:
        width: index of its width.
        tokens: expected of it.
        token_seconds: seconds of a token at the width of the other rounds.
    """

    width: int
    tokens: float
    token_seconds: float


class Probes:
    """Chooses probes, within a share of the time.

    A probe costs what its round takes longer than other rounds would for as many tokens.

    Args:
        widths: [K], the narrowest first.
        share: of all rounds' time, the most that probes may cost.
    """

    def __init__(self, widths: Sequence[int], share: float) -> None:
        self._widths = tuple(widths)
        self._most = np.array(widths, np.float64)
        self._share = share
        # In seconds; None before the first round.
        self._allowance: float | None = None
        self._round = 0
        self._last_probe = 0
        self._last_round_of = [0] * len(widths)
        self._failures = [0] * len(widths)
        self._pending: _Pending | None = None
        self.count = 0
        self.lost_seconds = 0.0

    def next(
        self,
        current: int,
        num_requests: int,
        tokens: FloatArray,
        seconds: FloatArray,
        rounds_seen: FloatArray,
        rounds: int = 1,
    ) -> int | None:
        """The width to try in this round, by its index; None for no probe.

        Args:
            current: index of the width that the round would have.
            num_requests: in the batch.
            tokens: [K] expected of the batch at every width.
            seconds: [K] of a round.
            rounds_seen: [K] how many rounds of its requests at every width the expectation rests on.
            rounds: since this was asked last, this one included; the others had the same width.
        """
        self._round += rounds
        self._last_round_of[current] = self._round
        token_seconds = float(seconds[current] / tokens[current])
        losses = np.maximum(0.0, seconds - tokens * token_seconds)
        candidates = sorted(self._candidates(current))
        cheapest = min((lost for lost in losses[candidates].tolist() if isfinite(lost)), default=0.0)
        self._save_up(self._share * float(seconds[current]), rounds, cheapest)
        if self._round - self._last_probe < INTERVAL:
            return None
        likely = num_requests * np.minimum(likely_tokens(tokens / num_requests, rounds_seen, 1.0), self._most)
        for width in sorted(candidates, key=lambda width: -likely[width] / seconds[width]):
            may_be_better = likely[width] * token_seconds > seconds[width]
            if self._round - self._last_round_of[width] < self._wait(current, width, may_be_better):
                continue
            if losses[width] <= self._allowance:
                self._begin(width, float(losses[width]), float(tokens[width]), token_seconds)
                return width
        return None

    def observe(self, width: int, tokens: float) -> None:
        """Of a round of this width, by its index, and of the tokens that it committed: the probe's, or any other."""
        pending = self._pending
        if pending is None or pending.width != width:
            return
        self._pending = None
        self._lose((pending.tokens - tokens) * pending.token_seconds)

    def width_changed(self) -> None:
        """The other rounds have another width now: what was learnt about the rest may no longer hold."""
        self._failures = [0] * len(self._widths)

    def _candidates(self, current: int) -> set[int]:
        widest = len(self._widths) - 1
        if self._widths[current] == 1:
            return set(range(len(self._widths))) - {current}
        # Of plain decoding everything is known.
        near = {current - 1, current + 1, widest} - {current}
        return {width for width in near if 0 <= width <= widest and self._widths[width] > 1}

    def _wait(self, current: int, width: int, may_be_better: bool) -> int:
        """Rounds since the last one of this width until it is tried."""
        if self._widths[current] > 1:
            return min(INTERVAL << min(self._failures[width], 4), PLAIN_INTERVAL) if may_be_better else LONGEST_INTERVAL
        # Text that drafts badly does so at any width.
        failures = min(sum(self._failures), 4)
        if may_be_better:
            return min(INTERVAL << failures, PLAIN_INTERVAL)
        return min(PLAIN_INTERVAL << failures, LONGEST_INTERVAL)

    def _save_up(self, of_round: float, rounds: int, cheapest: float) -> None:
        """Some seconds of each round are for probes. A new server, which knows nothing, has the most at once."""
        # There is a limit, so that probes never come in bursts. One can always be paid for in the end.
        most = max(of_round * LONGEST_INTERVAL, cheapest)
        self._allowance = most if self._allowance is None else min(most, self._allowance + of_round * rounds)

    def _begin(self, width: int, lost: float, tokens: float, token_seconds: float) -> None:
        self._pending = _Pending(width, tokens, token_seconds)
        self._lose(lost)
        self.count += 1
        self._last_probe = self._last_round_of[width] = self._round
        self._failures[width] += 1

    def _lose(self, seconds: float) -> None:
        self._allowance = (self._allowance or 0.0) - seconds
        self.lost_seconds += seconds
