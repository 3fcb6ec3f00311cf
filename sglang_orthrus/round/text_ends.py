"""What the ends of texts take from rounds: the more tokens a round commits, the more often it runs past an end.

Letters: R requests, K widths.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sglang_orthrus.round.costs import FloatArray

# What was learnt of a class loses half of its weight in so many texts.
HALF_LIFE = 64.0
# A new class: as if so many tokens had come without an end.
PRIOR_TOKENS = 500.0


class TextEnds:
    """How often texts end, by class of requests.

    Args:
        num_classes: of requests.
    """

    def __init__(self, num_classes: int) -> None:
        self._ends = np.zeros(num_classes)
        self._tokens = np.zeros(num_classes)
        self._rates = np.zeros(num_classes)

    def observe(self, request_class: int, num_tokens: int) -> None:
        """Of a text of this class that came to its end. num_tokens: of all of it."""
        kept = 0.5 ** (1.0 / HALF_LIFE)
        self._ends[request_class] = kept * self._ends[request_class] + 1.0
        self._tokens[request_class] = kept * self._tokens[request_class] + num_tokens
        self._rates[request_class] = self._ends[request_class] / (self._tokens[request_class] + PRIOR_TOKENS)

    def rates(self, classes: npt.NDArray[np.int64]) -> FloatArray:
        """Ends per token: [R]. classes: [R]."""
        return self._rates[classes]

    def committed(self, tokens: FloatArray, classes: npt.NDArray[np.int64]) -> FloatArray:
        """What texts take in of a round, see `within_text`.

        Args:
            tokens: [R, K] that a round would commit of texts that go on.
            classes: [R].
        """
        rates = self._rates[classes]
        return within_text(tokens, rates[:, None]) if rates.any() else tokens


def within_text(tokens: FloatArray, end_rate: FloatArray) -> FloatArray:
    """The mean that a text takes in of so many tokens if each of them may be its last: [R, K].

    Args:
        tokens: [R, K], at least 1.
        end_rate: [R, 1] ends per token, in [0, 1).
    """
    rate = np.maximum(end_rate, 1e-9)
    return np.asarray(-np.expm1(tokens * np.log1p(-rate)) / rate)
