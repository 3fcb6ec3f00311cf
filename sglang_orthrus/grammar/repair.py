"""The walk of a grammar along a draft block: which drafts it changes. And the masks of the block. Pure.

Letters: Q verify width, so Q-1 drafts and Q mask rows; W = ceil(vocabulary / 32). Row j of the masks is what the
grammar allows after drafts 0..j-1, packed as both engines pack it: bit `id % 32` of word `id // 32`.

A verify pass waits for the drafts, but needs no mask before it is over. So drafts are chosen by asking the engine for
single tokens, in about a microsecond each; a mask takes several, and milliseconds in some places.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from sglang_orthrus.config import DraftMode
from sglang_orthrus.grammar.slow_masks import NO_DEADLINE, Deadline

ALL_ALLOWED = -1  # as a word of a mask
# Each repair is a guess, and a block is accepted up to the first wrong one. On the schemas of tests/data six guesses a
# block give as many tokens per cycle as any number of them, in less time (docs/structured.md).
MAX_REPAIRS = 6
# So many candidates are tried before a mask is filled, which costs as much as some twenty of them. The slow masks,
# inside strings of bounded length, allow so much that these suffice.
NUM_TRIED = 8

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

    @property
    def moved(self) -> int:
        """How many tokens a cursor moves over: it stays before one that ends the text."""
        return self.length - self.ended


class Cursor(Protocol):
    """A grammar at some point of a text.

    Attributes:
        key: of the grammar, if its engine follows exactly the tokens that its masks allow; else None.
    """

    key: int | None

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Reach:
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
            block: [Q] int64 on the CPU, drafts from the second place on.
            masks: [Q, W] int32 on the CPU.
            limit: in seconds, after which no further row is begun; 0 for the first row alone.

        Returns:
            How many leading rows are filled, at least 1; Q if all that matter are.
        """


class Change(IntEnum):
    """What became of a draft."""

    NONE = 0
    REPAIRED = 1
    FORCED = 2


class Choice(NamedTuple):
    """The drafts of a block.

    Attributes:
        tokens: [Q-1] the drafts to verify; the very array that was given, if none was changed.
        changes: [Q-1] `Change` of each; a forced token may be the draft's own.
        reach: how far the grammar follows them.
    """

    tokens: Ids
    changes: npt.NDArray[np.int8]
    reach: Reach


def choose(
    cursor: Cursor,
    drafts: Ids,
    candidates: Ids,
    scratch: torch.Tensor,
    mode: DraftMode,
    deadline: Deadline = NO_DEADLINE,
) -> Choice:
    """Walk a block once, from the committed text on, and change drafts on the way.

    It ends early at a stop token, where the grammar allows nothing, at the first draft that it refuses after
    `MAX_REPAIRS`, or where its time is over: a grammar may take milliseconds per token. Positions are kept: the
    drafts behind a changed one stay where they are, since each was made for its place in the text.

    Args:
        cursor: at the committed text, anchor included; it is there again afterwards.
        drafts: [Q-1] the diffusion view's first choices.
        candidates: [Q-1, K] its K best choices, best first.
        scratch: [n, W] int32 on the CPU; its first row is for a mask where the first candidates are not allowed.
        mode: see `DraftMode`.
        deadline: after which the rest of the drafts stays as it is.
    """
    tokens = drafts.tolist()
    changes = list[tuple[slice, Change]]()
    row = num_repairs = 0
    reach = Reach(0, False)
    while row < len(tokens):
        may_change = mode is not DraftMode.OFF and num_repairs < MAX_REPAIRS
        if mode is not DraftMode.FULL or not may_change:
            reach = cursor.advance(tokens[row:], deadline)
            row += reach.moved
            if not may_change or reach.ended or row == len(tokens):
                break
        if deadline.is_over():
            reach = Reach(0, False)
            break
        chosen, change, reach = _allowed(cursor, candidates[row], scratch, len(tokens) - row, deadline)
        if not chosen:
            break
        if mode is DraftMode.FULL:
            del chosen[1:]
        place = slice(row, min(row + len(chosen), len(tokens)))
        if change is Change.FORCED or chosen[0] != drafts.item(row):
            changes.append((place, change))
            num_repairs += change is Change.REPAIRED
        tokens[place] = chosen[: place.stop - row]
        # The rest of a forced string is drafts like others now.
        row += reach.moved
        if not reach.moved:  # at the end of the text; and llguidance refuses some tokens that its masks allow
            break
    cursor.rollback(row)
    reach = Reach(row + reach.ended, reach.ended)
    if not changes:
        return Choice(drafts, _unchanged(len(drafts)), reach)
    marks = np.zeros(len(drafts), np.int8)
    for place, change in changes:
        marks[place] = change
    return Choice(np.array(tokens, np.int64), marks, reach)


@cache
def _unchanged(length: int) -> npt.NDArray[np.int8]:
    marks = np.zeros(length, np.int8)
    marks.flags.writeable = False
    return marks


def _allowed(
    cursor: Cursor, candidates: Ids, scratch: torch.Tensor, count: int, deadline: Deadline
) -> tuple[list[int], Change, Reach]:
    """What to draft from here on: `count` forced tokens, or the best candidate, or the lowest id; or nothing.

    Moves over the first of them. Nothing is found at a dead end, or where the time is over.
    """
    forced = list(cursor.forced(count, deadline))
    if forced and (reach := cursor.advance(forced[:1])).length:
        return forced, Change.FORCED, reach
    for token in candidates[:NUM_TRIED].tolist():
        if (reach := cursor.advance([token])).length:
            return [token], Change.REPAIRED, reach
    if deadline.is_over():
        return [], Change.REPAIRED, Reach(0, False)
    cursor.fill(scratch)
    best = best_allowed(candidates[NUM_TRIED:], scratch.numpy()[0])
    if best is None:
        return [], Change.REPAIRED, Reach(0, False)
    return [best], Change.REPAIRED, cursor.advance([best])


def fill_where_refused(
    cursor: Cursor, drafts: Ids, best: Ids, masks: torch.Tensor, limit: float = float("inf")
) -> tuple[int, int]:
    """Fill only the masks that change what verification makes of a block, given what it would choose without any.

    A chosen token that the grammar allows is chosen with its mask, too. So a mask is needed where the grammar refuses
    the choice, and none behind the first place where verification stops.

    Args:
        cursor: at the committed text, of a grammar that has a `key`; it is there again afterwards.
        drafts: [Q-1] that were verified.
        best: [Q] the best token after each row of the block, any token allowed.
        masks: [Q, W] int32 on the CPU, allowing all.
        limit: see `Cursor.fill_block`.

    Returns:
        How many leading rows may have been written to, and how many hold what is needed: Q if all do.
    """
    end = time.perf_counter() + limit
    row = moved = 0
    num_right = len(best)
    for row, token in enumerate(best.tolist()):
        if row and time.perf_counter() >= end:
            num_right = row
            break
        draft = drafts.item(row) if row < len(drafts) else None
        reach = cursor.advance([token])
        if reach.length and token != draft:  # the last token of the round
            cursor.rollback(reach.moved)
            break
        if not reach.length:
            cursor.fill(masks[row : row + 1])
            if draft is None or draft == token:
                break
            reach = cursor.advance([draft])
        moved += reach.moved
        if not reach.moved:
            break
    cursor.rollback(moved)
    return row + 1, num_right


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
