"""Which requests pay for the drafts of others: one width serves a batch, so those that draft badly are slowed down."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

# A request that fell behind its share is protected until it is so many tokens ahead of it.
SLACK = 4.0
# Its tokens per cycle may be higher than they look, by so many standard errors: it may have been unlucky ...
STANDARD_ERRORS = 3.0
# ... but hardly if it is so many tokens behind.
SHORTFALL = 48.0
FEW_STANDARD_ERRORS = 1.0


class SpeedFloor:
    """Keeps account of every request's tokens against its share of plain decoding's.

    A request that falls behind is protected: widths that are slower for it than its share are out until it has caught
    up. So a batch of both kinds alternates, and over its length no request gets much less than its share.

    Args:
        floor: the share of plain decoding's speed; 0 protects nobody.
        max_requests: the most requests that are remembered; the oldest is forgotten for a new one.
    """

    def __init__(self, floor: float, max_requests: int = 1024) -> None:
        self.floor = floor
        self._max_requests = max_requests
        # Tokens ahead of the share.
        self._credits: dict[Hashable, float] = {}
        # Standard errors by which a protected request may have been unlucky.
        self._protected: dict[Hashable, float] = {}

    def start(self, key: Hashable) -> None:
        """Keep account of a request from now on; nothing changes if it is known."""
        if not self.floor or key in self._credits:
            return
        if len(self._credits) >= self._max_requests:
            self.forget(next(iter(self._credits)))
        self._credits[key] = 0.0

    def forget(self, key: Hashable) -> None:
        """Of a request that is over; one that is not known is ignored."""
        self._credits.pop(key, None)
        self._protected.pop(key, None)

    def observe(self, keys: Sequence[Hashable], accept_lens: Sequence[int], plain_steps: float) -> None:
        """Account for a round.

        Args:
            keys: its requests; those that are not known are ignored.
            accept_lens: tokens that it committed of each.
            plain_steps: its time, in plain steps of the same batch.
        """
        share = self.floor * plain_steps
        credits, protected = self._credits, self._protected
        for key, accept_len in zip(keys, accept_lens, strict=True):
            before = credits.get(key)
            if before is None or accept_len < 1 or (before >= SLACK and accept_len >= share):
                continue
            # What was gained long ago is no reason to be slow for long.
            ahead = credits[key] = min(SLACK, before + accept_len - share)
            if ahead < -SHORTFALL:
                protected[key] = FEW_STANDARD_ERRORS
            elif ahead >= SLACK:
                protected.pop(key, None)
            elif ahead < 0.0 and (key not in protected or ahead >= SLACK - SHORTFALL):
                protected[key] = STANDARD_ERRORS

    def protected(self, keys: Sequence[Hashable]) -> tuple[list[int], list[float]]:
        """The protected ones among requests: their indexes, and standard errors that they may have been unlucky by."""
        if not self._protected:
            return [], []
        indexes = [index for index, key in enumerate(keys) if key in self._protected]
        return indexes, [self._protected[keys[index]] for index in indexes]
