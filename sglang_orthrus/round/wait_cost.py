"""What a round loses by its wait for the former one's result."""

from __future__ import annotations

# The share that the last wait has in what is expected of the next one.
NEWEST = 0.3
# What is left of it after a round that did not wait: it may have become cheaper.
KEPT = 0.98


class WaitCost:
    """What a round loses by its wait: the device has nothing to do until it is queued.

    Attributes:
        seconds: as learnt from rounds that waited; 0 before the first one, so that it is tried.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_known = False

    def observe(self, seconds: float) -> None:
        """Of a round that waited."""
        self.seconds += (NEWEST if self._is_known else 1.0) * (seconds - self.seconds)
        self._is_known = True

    def fade(self) -> None:
        """A round did not wait."""
        self.seconds *= KEPT
