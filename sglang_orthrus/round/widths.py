"""Which width a batch should have: arithmetic on what is expected of it.

Letters: R requests, K widths.
"""

from __future__ import annotations

import numpy as np

from sglang_orthrus.round.costs import BoolArray, FloatArray

# A gain below this is noise ...
SMALL_GAIN = 0.01
# ... and one above this is taken at once; one in between after so many rounds in a row.
LARGE_GAIN = 0.10
PATIENCE = 4


def choose_width(
    tokens: FloatArray,
    seconds: FloatArray,
    current: int | None,
    allowed: BoolArray | None = None,
    patience: int = 0,
) -> int:
    """The width of the most tokens per second, by its index.

    Args:
        tokens: [K] expected of the batch at every width.
        seconds: [K] of a round.
        current: the width of the rounds before, by its index; None before the first.
        allowed: [K] whether a width may be chosen; None for all.
        patience: for how many rounds in a row another width was better.
    """
    speeds = tokens / seconds
    if allowed is not None and allowed.any():
        speeds = np.where(allowed, speeds, 0.0)
    best = int(speeds.argmax())
    if current is None or speeds[current] <= 0.0:
        return best
    gain = speeds[best] / speeds[current] - 1.0
    if gain >= LARGE_GAIN or (gain >= SMALL_GAIN and patience >= PATIENCE):
        return best
    return current


def fast_enough(tokens: FloatArray, seconds: FloatArray, plain_seconds: float, floor: float) -> BoolArray:
    """The widths at which every request reaches its share of plain decoding's speed: [K].

    Args:
        tokens: [R, K] expected of the requests that must reach it.
        seconds: [K] of a round.
        plain_seconds: of a plain step.
        floor: the share; 0.8 allows a request to lose a fifth of its speed.
    """
    return np.asarray((tokens * plain_seconds >= floor * seconds).all(0))


def likely_tokens(tokens: FloatArray, rounds_seen: FloatArray, standard_errors: FloatArray | float) -> FloatArray:
    """The most tokens per round that a mean over some rounds may stand for, if drafts are accepted at a constant rate.

    Args:
        tokens: the mean, per request.
        rounds_seen: rounds that it rests on.
        standard_errors: by how many it may be too low.
    """
    # One more accepted draft than was seen, so that a few rounds without any are not certain.
    mean = tokens + 1.0 / (rounds_seen + 1.0)
    return tokens + standard_errors * np.sqrt(mean * (mean - 1.0) / (rounds_seen + 0.25))
