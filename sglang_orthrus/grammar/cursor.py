"""A grammar at some point of a text, whatever its engine; and the rows of its masks.

Letters: Q verify width, so Q-1 drafts and Q mask rows; W = ceil(vocabulary / 32). Row j of the masks is what the
grammar allows after drafts 0..j-1, packed as both engines pack it: bit `id % 32` of word `id // 32`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglang_orthrus.grammar.slow_masks import NO_DEADLINE, Deadline

ALL_ALLOWED = -1  # as a word of a mask

Ids = npt.NDArray[np.int64]
Masks = npt.NDArray[np.int32]


class Match(NamedTuple):
    """How far a grammar follows some tokens.

    Attributes:
        length: how many leading ones it allows.
        ended: whether the last of these ends the text.
    """

    length: int
    ended: bool

    @property
    def num_moved(self) -> int:
        """How many tokens a cursor moves over: it stays before one that ends the text."""
        return self.length - self.ended


class Cursor(Protocol):
    """A grammar at some point of a text.

    Attributes:
        key: of the grammar, if its engine follows exactly the tokens that its masks allow; else None.
    """

    key: int | None

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Match:
        """Move on as far as the engine follows tokens, and stop before one that ends the text.

        Behind the first token also where the deadline is over.
        """

    def rollback(self, count: int) -> None:
        """Move back over the last `count` tokens."""

    def forced(self, count: int, deadline: Deadline = NO_DEADLINE) -> Sequence[int]:
        """Tokens that must come next, as a model would write them; none if there is a choice.

        At most the first `count`, at a cost that grows with these and not with the string.
        """

    def fill(self, masks: torch.Tensor) -> None:
        """Fill masks[0]: what may come next. masks: [n, W] int32 on the CPU."""

    def fill_block(self, block: torch.Tensor, masks: torch.Tensor, limit: float = float("inf")) -> int:
        """Fill masks[0] here and masks[j] after drafts 0..j-1, up to the first draft that it refuses. Moves nothing.

        Rows behind may be written to or not.

        Args:
            block: [Q] int64 on the CPU, the anchor's slot, then the drafts.
            masks: [Q, W] int32 on the CPU.
            limit: in seconds, after which no further row is begun; 0 for the first row alone.

        Returns:
            How many leading rows are filled, at least 1; Q if all that matter are.
        """


def is_allowed(token: int, mask: Masks) -> bool:
    """Whether a row allows a token. token: below W * 32; mask: [W]."""
    return bool(mask.item(token >> 5) >> (token & 31) & 1)


def allow_only(token: int, mask: Masks) -> None:
    """Fill a row. token: below W * 32; mask: [W]."""
    mask[:] = 0
    mask.view(np.uint32)[token >> 5] = 1 << (token & 31)


def best_allowed(candidates: Ids, mask: Masks) -> int | None:
    """The first candidate that a row allows, or else the lowest id that it does; None if it allows nothing.

    Byte-pair vocabularies list a token after its parts, so the lowest id is the shortest and most common continuation.

    Args:
        candidates: [K] ids below W * 32, best first.
        mask: [W].
    """
    word_at = mask.item
    for token in candidates.tolist():
        if word_at(token >> 5) >> (token & 31) & 1:
            return int(token)
    first = int((mask != 0).argmax())
    word = word_at(first)
    return first * 32 + (word & -word).bit_length() - 1 if word else None
