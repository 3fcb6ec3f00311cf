"""Which requests pay for the drafts of others: one width serves a batch, so those that draft badly are slowed down."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from sglang_orthrus.round.costs import FloatArray

# A request that is so many tokens behind its share counts twice, and one twice as far behind five times.
SHORTFALL = 3.0
# It is so many ahead at most: what was gained long ago is no reason to be slow for long.
MOST_AHEAD = 8.0


class SpeedFloor:
    """Keeps account of every request's tokens against its share of plain decoding's.

    The further a request is behind, the more it counts when a width is chosen. So widths that are slow for it are out
    when it is far behind, or when many like it are a little: single ones may have been unlucky. A batch of both kinds
    alternates, and over its length no request gets much less than its share. Virtual queues do the same in Lyapunov
    optimisation.

    Args:
        floor: the share of plain decoding's speed; 0 protects nobody.
        max_requests: the most requests that are remembered; the oldest is forgotten for a new one.
    """

    def __init__(self, floor: float, max_requests: int = 1024) -> None:
        self.floor = floor
        self._max_requests = max_requests
        # Tokens ahead of the share.
        self._ahead: dict[Hashable, float] = {}

    def start(self, key: Hashable) -> None:
        """Keep account of a request from now on; nothing changes if it is known."""
        if not self.floor or key in self._ahead:
            return
        if len(self._ahead) >= self._max_requests:
            self.forget(next(iter(self._ahead)))
        self._ahead[key] = 0.0

    def forget(self, key: Hashable) -> None:
        """Of a request that is over; one that is not known is ignored."""
        self._ahead.pop(key, None)

    def observe(self, keys: Sequence[Hashable], accept_lens: Sequence[int], plain_steps: float) -> None:
        """Account for a round.

        Args:
            keys: its requests; those that are not known are ignored.
            accept_lens: tokens that it committed of each.
            plain_steps: its time, in plain steps of the same batch.
        """
        share = self.floor * plain_steps
        ahead = self._ahead
        for key, accept_len in zip(keys, accept_lens, strict=True):
            before = ahead.get(key)
            if before is not None and accept_len > 0:
                ahead[key] = min(MOST_AHEAD, before + accept_len - share)

    def weights(self, keys: Sequence[Hashable]) -> FloatArray:
        """How much each request counts: [R], with a mean of 1."""
        ahead = self._ahead
        behind = np.array([-ahead.get(key, 0.0) for key in keys])
        weights = 1.0 + np.square(np.maximum(behind, 0.0) / SHORTFALL)
        return np.asarray(weights / weights.mean())
