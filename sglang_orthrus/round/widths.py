"""Which width a batch should have: arithmetic on what is expected of it, and what is said of a round's width.

Letters: R requests, K widths.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sglang_orthrus.round.costs import FloatArray

# A gain below this is noise ...
SMALL_GAIN = 0.01
# ... and one above this is taken at once; one in between after so many rounds in a row.
LARGE_GAIN = 0.10
PATIENCE = 4


class RoundWidth(NamedTuple):
    """A round's width.

    Attributes:
        width: W.
        is_probe: whether the round is to learn about a width rather than because it is the best.
        is_forced: whether it has its width for what grammars force, in a batch that decodes plainly otherwise.
        waits: whether it is worth its while to wait for the former result, and to leave out requests that have ended.
    """

    width: int
    is_probe: bool
    is_forced: bool = False
    waits: bool = False


class RoundResult(NamedTuple):
    """What a round came to.

    Attributes:
        requests: that it counted for, once for each of its steps.
        tokens: that it committed.
        seconds: that it took, by the costs as they are corrected now.
        plain_seconds: that plain decoding would have taken for as many tokens; 0 if width 1 was not measured.
    """

    requests: int
    tokens: int
    seconds: float
    plain_seconds: float


def choose_width(
    tokens: FloatArray,
    seconds: FloatArray,
    current: int | None,
    patience: int = 0,
) -> int:
    """The width of the most tokens per second, by its index.

    Args:
        tokens: [K] expected of the batch at every width.
        seconds: [K] of a round.
        current: the width of the rounds before, by its index; None before the first.
        patience: for how many rounds in a row another width was better.
    """
    speeds = tokens / seconds
    best = int(speeds.argmax())
    if current is None or speeds[current] <= 0.0:
        return best
    gain = speeds[best] / speeds[current] - 1.0
    if gain >= LARGE_GAIN or (gain >= SMALL_GAIN and patience >= PATIENCE):
        return best
    return current


def likely_tokens(tokens: FloatArray, rounds_seen: FloatArray, standard_errors: float) -> FloatArray:
    """The most tokens per round that a mean over some rounds may stand for, if drafts are accepted at a constant rate.

    Args:
        tokens: [K] the mean, per request.
        rounds_seen: [K] rounds that it rests on.
        standard_errors: by how many it may be too low.
    """
    # One more accepted draft than was seen, so that a few rounds without any are not certain.
    mean = tokens + 1.0 / (rounds_seen + 1.0)
    return tokens + standard_errors * np.sqrt(mean * (mean - 1.0) / (rounds_seen + 0.25))
