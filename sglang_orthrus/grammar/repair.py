"""The walk of a grammar along a draft block, which changes the drafts that it does not allow. Pure.

A verify pass waits for the drafts, but needs no mask before it is over. So drafts are repaired by asking the engine for
single tokens, in about a microsecond each; a mask takes several, and milliseconds in some positions.

Letters as in `cursor`; K candidates per position.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang_orthrus.core import DraftChange
from sglang_orthrus.grammar.cursor import Cursor, Ids, Match, best_allowed
from sglang_orthrus.grammar.slow_masks import NO_DEADLINE, Deadline

# Each repair is a guess, and a block is accepted up to the first wrong one. On the schemas of tests/data six guesses a
# block give as many tokens per cycle as any number of them, in less time (docs/structured_measured.md).
MAX_REPAIRS = 6
# So many candidates are tried before a mask is filled, which costs as much as some twenty of them. The slow masks,
# inside strings of bounded length, allow so much that these suffice.
NUM_TRIED = 8


class Repair(NamedTuple):
    """The drafts of a block, as a grammar wants them.

    Attributes:
        tokens: [Q-1] the drafts to verify; the very array that was given, if none was changed.
        changes: [Q-1] `DraftChange` of each; a forced token may be the draft's own.
        match: how far the grammar follows them.
    """

    tokens: Ids
    changes: npt.NDArray[np.int8]
    match: Match


def repair_drafts(
    cursor: Cursor,
    drafts: Ids,
    candidates: Ids,
    scratch: torch.Tensor,
    max_repairs: int = MAX_REPAIRS,
    deadline: Deadline = NO_DEADLINE,
) -> Repair:
    """Walk a block once, from the committed text on, and change drafts as it goes.

    It ends early at a stop token, where the grammar allows nothing, at the first draft that it refuses after
    `max_repairs`, or where its time is over: a grammar may take milliseconds per token. Positions are kept: the
    drafts behind a changed one stay where they are, since each was made for its position in the text.

    Args:
        cursor: at the committed text, anchor included; it is there again afterwards.
        drafts: [Q-1] the diffusion view's first choices.
        candidates: [Q-1, K] its K best choices, best first.
        scratch: [n, W] int32 on the CPU; its first row is for a mask where the first candidates are not allowed.
        max_repairs: 0 to change nothing.
        deadline: after which the rest of the drafts stays as it is.
    """
    tokens = drafts.tolist()
    changes = list[tuple[slice, DraftChange]]()
    row = num_repairs = 0
    while True:
        match = cursor.advance(tokens[row:], deadline)
        row += match.num_moved
        if match.ended or row == len(tokens) or num_repairs >= max_repairs:
            break
        if deadline.is_over():
            match = Match(0, False)
            break
        proposed, change, match = _propose(cursor, candidates[row], scratch, len(tokens) - row, deadline)
        if not proposed:
            break
        changed = slice(row, min(row + len(proposed), len(tokens)))
        if change is DraftChange.FORCED or proposed[0] != drafts.item(row):
            changes.append((changed, change))
            num_repairs += change is DraftChange.REPAIRED
        tokens[changed] = proposed[: changed.stop - row]
        # The rest of a forced string is drafts like others now.
        row += match.num_moved
        if row == len(tokens) or not match.num_moved:
            break  # at the end of the text; and llguidance refuses some tokens that its masks allow
    cursor.rollback(row)
    match = Match(row + match.ended, match.ended)
    if not changes:
        return Repair(drafts, _unchanged(len(drafts)), match)
    marks = np.zeros(len(drafts), np.int8)
    for changed, change in changes:
        marks[changed] = change
    return Repair(np.array(tokens, np.int64), marks, match)


@cache
def _unchanged(length: int) -> npt.NDArray[np.int8]:
    marks = np.zeros(length, np.int8)
    marks.flags.writeable = False
    return marks


def _propose(
    cursor: Cursor, candidates: Ids, scratch: torch.Tensor, count: int, deadline: Deadline
) -> tuple[list[int], DraftChange, Match]:
    """What to draft from here on: `count` forced tokens, or the best candidate, or the lowest id; or nothing.

    Moves over the first of them. Nothing is found at a dead end, or where the time is over.
    """
    forced = list(cursor.forced(count, deadline))
    if forced and (match := cursor.advance(forced[:1])).length:
        return forced, DraftChange.FORCED, match
    for token in candidates[:NUM_TRIED].tolist():
        if (match := cursor.advance([token])).length:
            return [token], DraftChange.REPAIRED, match
    if deadline.is_over():
        return [], DraftChange.REPAIRED, Match(0, False)
    cursor.fill(scratch)
    best = best_allowed(candidates[NUM_TRIED:], scratch.numpy()[0])
    if best is None:
        return [], DraftChange.REPAIRED, Match(0, False)
    return [best], DraftChange.REPAIRED, cursor.advance([best])
