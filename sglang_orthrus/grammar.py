"""The walk of a grammar along a draft block: which drafts it changes, and which tokens it allows after each. Pure.

Letters: Q verify width, so Q-1 drafts and Q mask rows; W = ceil(vocabulary / 32). Row j of the masks is what the
grammar allows after drafts 0..j-1, packed as both engines pack it: bit `id % 32` of word `id // 32`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglang_orthrus.settings import DraftMode

ALL_ALLOWED = -1  # as a word of a mask
# Each repair is a guess, and a block is accepted up to the first wrong one. On the schemas of tests/data six guesses a
# block give as many tokens per cycle as any number of them, in less time (docs/structured.md).
MAX_REPAIRS = 6

Ids = npt.NDArray[np.int64]
Masks = npt.NDArray[np.int32]


class Reach(NamedTuple):
    """How far a grammar follows some tokens.

    Attributes:
        length: how many leading ones it allows.
        ended: whether the last of these ends the text.
    """

    length: int
    ended: bool


class Cursor(Protocol):
    """A grammar at some point of a text."""

    def fill(self, tokens: Ids, masks: torch.Tensor) -> Reach:
        """Fill masks[0] here and masks[j] after tokens[:j], up to the first that is not allowed. Moves nothing.

        The row behind that one may be written to, rows after it are not.

        tokens: [n]; masks: [n + 1, W] int32 on the CPU.
        """

    def ends(self, token: int) -> bool:
        """Whether a token that is allowed here ends the text."""

    def accept(self, tokens: Sequence[int]) -> bool:
        """Move on over tokens; False, and no move, if the engine refuses one, which its own mask may have allowed."""

    def rollback(self, count: int) -> None:
        """Move back over the last `count` tokens."""

    def forced(self) -> Sequence[int]:
        """Tokens that must come next, as a model would write them; none if there is a choice."""


class Change(IntEnum):
    """What became of a draft."""

    NONE = 0
    REPAIRED = 1
    FORCED = 2


class Walk(NamedTuple):
    """What a walk made of a block.

    Attributes:
        tokens: [Q-1] the drafts to verify.
        changes: [Q-1] `Change` of each; a forced token may be the draft's own.
        num_masks: rows 0..num_masks-1 of the masks are filled, the next may hold anything. A draft that verification
            may accept has the row behind it, but for those from a stop token on, which do not matter.
        end: the stop token that the block comes to, in front of row num_masks; None if it comes to none.
    """

    tokens: Ids
    changes: npt.NDArray[np.int8]
    num_masks: int
    end: int | None = None


def walk(cursor: Cursor, drafts: Ids, candidates: Ids, masks: torch.Tensor, mode: DraftMode) -> Walk:
    """Walk a block once, from the committed text to its end, filling the verify masks on the way.

    It ends early at a stop token, where the grammar allows nothing, or with `MAX_REPAIRS`. Positions are kept: the
    drafts behind a changed one stay where they are, since each was made for its place in the text.

    Args:
        cursor: at the committed text, anchor included; it is there again afterwards.
        drafts: [Q-1] the diffusion view's first choices.
        candidates: [Q-1, K] its K best choices, best first.
        masks: [Q, W] int32 on the CPU.
        mode: see `DraftMode`.
    """
    tokens, changes, bits = drafts.copy(), np.zeros(len(drafts), np.int8), masks.numpy()
    row = num_repairs = 0
    end: int | None = None
    while True:
        is_last = mode is DraftMode.OFF or num_repairs == MAX_REPAIRS
        # FULL chooses every token itself. Else the engine gets all that is left: what verification may accept needs a
        # mask behind it.
        ahead = tokens[row:row] if mode is DraftMode.FULL and not is_last else tokens[row:]
        reach = cursor.fill(ahead, masks[row : row + len(ahead) + 1])
        at = row + reach.length
        if reach.ended or at == len(tokens) or is_last:
            num_masks = at + (not reach.ended)
            end = int(tokens[at - 1]) if reach.ended else None
            break
        if not cursor.accept(tokens[row:at].tolist()):
            num_masks = at + 1
            break
        row = at
        chosen, change = _choose(cursor, candidates[row], bits[row])
        if not chosen:
            num_masks = row + 1
            break
        if mode is DraftMode.FULL:
            del chosen[1:]
        place = slice(row, row + len(chosen))
        tokens[place] = chosen[: len(tokens) - row]
        if change is Change.FORCED or tokens[row] != drafts[row]:
            changes[place] = change
            num_repairs += change is Change.REPAIRED
        # Its mask is filled already. The rest of a forced string is drafts like others now.
        is_end = cursor.ends(chosen[0])
        if is_end or not cursor.accept(chosen[:1]):
            num_masks = row + 1
            end = chosen[0] if is_end else None
            break
        row += 1
    cursor.rollback(row)
    return Walk(tokens, changes, num_masks, end)


def _choose(cursor: Cursor, candidates: Ids, mask: Masks) -> tuple[list[int], Change]:
    """What to draft from here on: the forced tokens, or the best candidate, or nothing."""
    forced = list(cursor.forced())
    if forced and is_allowed(forced[0], mask):
        return forced, Change.FORCED
    best = best_allowed(candidates, mask)
    return [] if best is None else [best], Change.REPAIRED


def reach_of(tokens: Ids, masks: Masks, stop_ids: Collection[int]) -> Reach:
    """How far filled masks allow tokens, a stop token being the end. tokens: [n] below W * 32; masks: [>= n, W]."""
    # A loop: runs are short, and cost less this way than the first of several calls of NumPy.
    word_at = masks.item
    for place, token in enumerate(tokens.tolist()):
        if not word_at(place, token >> 5) >> (token & 31) & 1:
            return Reach(place, False)
        if token in stop_ids:
            return Reach(place + 1, True)
    return Reach(len(tokens), False)


def is_allowed(token: int, mask: Masks) -> bool:
    """Whether a row allows a token. token: below W * 32; mask: [W]."""
    return bool(mask.item(token >> 5) >> (token & 31) & 1)


def allow_only(token: int, mask: Masks) -> None:
    """Fill a row. token: below W * 32; mask: [W]."""
    mask[:] = 0
    mask.view(np.uint32)[token >> 5] = 1 << (token & 31)


def best_allowed(candidates: Ids, mask: Masks) -> int | None:
    """The first candidate that a row allows, or else the lowest id that it does; None if it allows nothing.

    Byte-pair vocabularies list a token after its parts, so the lowest id is the shortest and most common way on.

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
