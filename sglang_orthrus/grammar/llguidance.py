"""A `Cursor` over llguidance's matchers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarRow
from sglang.srt.constrained.llguidance_backend import (
    GrammarDraftRow,
    GuidanceGrammar,
    fill_token_bitmask_batched,
    fill_token_bitmask_with_draft_tokens,
)

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.grammar.cursor import Match
from sglang_orthrus.grammar.slow_masks import NO_DEADLINE, Deadline

# Two rows are filled to tell how long one takes.
_NUM_PROBED_ROWS = 2
# A limit is no matter where a block of so many rows would keep it.
_NUM_QUICK_ROWS = 8


@depends_on(
    "sglang.srt.constrained.llguidance_backend:GuidanceGrammar",
    "ll_matcher",
    what="its ll_matcher advances along a block and back",
    why="SGLang's grammar objects have no call that fills the masks of a chain",
    until="they have one",
)
class GuidanceCursor:
    """llguidance: a chain is filled by its executor; its forced tokens stop short of an unsure end by themselves.

    Where it forces a string it follows tokens that its mask does not allow, so there is no `key`.
    """

    key: int | None = None

    def __init__(self, grammar: GuidanceGrammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.ll_matcher
        self._stop_ids: set[int] = grammar.eos_tokens
        # Moved over, but the engine does not know yet: it validates tokens in a quarter of the time that it takes them.
        self._ahead: list[int] = []

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Match:
        """See `Cursor`. `validate_tokens`, since a token that it refuses may leave llguidance in an error for good.

        At the grammar's end it takes no stop token, but its mask allows them.
        """
        self._catch_up()
        stop = next((index for index, token in enumerate(tokens) if token in self._stop_ids), None)
        length = self._matcher.validate_tokens(list(tokens[: None if stop is None else stop + 1]))
        self._ahead = list(tokens[: length if stop is None else min(length, stop)])
        if stop is None or length < stop:
            return Match(length, False)
        if length == stop:
            self._catch_up()
        ended = length > stop or self._matcher.is_stopped()
        return Match(stop + ended, ended)

    def _catch_up(self) -> None:
        if self._ahead:
            self._matcher.consume_tokens(self._ahead)
            self._ahead = []

    def rollback(self, count: int) -> None:
        """See `Cursor`."""
        kept = max(0, len(self._ahead) - count)
        count -= len(self._ahead) - kept
        del self._ahead[kept:]
        if count:
            self._matcher.rollback(count)

    def forced(self, count: int, deadline: Deadline = NO_DEADLINE) -> Sequence[int]:
        """See `Cursor`. The engine itself goes no further than its limits, and as far for a mask."""
        self._catch_up()
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens[:count]

    def fill(self, masks: torch.Tensor) -> None:
        """See `Cursor`."""
        self._catch_up()
        self._grammar.fill_vocab_mask(masks, 0)

    def fill_block(self, block: torch.Tensor, masks: torch.Tensor, limit: float = float("inf")) -> int:
        """See `Cursor`."""
        return fill_blocks([(0, self)], block[None], masks, limit)


@depends_on(
    "sglang.srt.constrained.llguidance_backend:fill_token_bitmask_with_draft_tokens",
    "entries",
    "vocab_mask",
    what="called for the masks of several blocks",
    why="it is SGLang's own call for drafts, but no method of the grammar object",
    until="SGLang's grammar objects fill the masks of a chain",
)
@depends_on(
    "sglang.srt.constrained.llguidance_backend:fill_token_bitmask_batched",
    "entries",
    "vocab_mask",
    what="called for the masks of several blocks without drafts",
    why="the call for drafts refuses to be given none",
    until="it takes a chain without drafts",
)
def fill_blocks(
    cursors: Sequence[tuple[int, GuidanceCursor]], blocks: torch.Tensor, masks: torch.Tensor, limit: float
) -> int:
    """As `Cursor.fill_block` does, for several blocks by llguidance's own threads; the same rows of all are filled.

    The engine can't be interrupted. So where a limit is set, two rows tell how many more it may be asked for, if the
    blocks have more.

    cursors: with their blocks' numbers; blocks: [B, Q]; masks: [B * Q, W].
    """
    width = blocks.shape[1]
    for _, cursor in cursors:
        cursor._catch_up()

    if width == 1:
        fill_token_bitmask_batched([GrammarRow(number, cursor._grammar) for number, cursor in cursors], masks)
        return width

    def fill(num_rows: int) -> None:
        entries = [
            GrammarDraftRow(number * width, cursor._grammar, blocks[number, 1:num_rows].tolist())
            for number, cursor in cursors
        ]
        fill_token_bitmask_with_draft_tokens(entries, masks)

    if isfinite(limit) and width > _NUM_PROBED_ROWS:
        started = time.perf_counter()
        fill(_NUM_PROBED_ROWS)
        seconds = (time.perf_counter() - started) / _NUM_PROBED_ROWS
        if seconds > limit / _NUM_QUICK_ROWS:
            num_rows = max(1, min(width, int(limit / seconds)))
            if num_rows > _NUM_PROBED_ROWS:
                fill(num_rows)
            return num_rows
    fill(width)
    return width
