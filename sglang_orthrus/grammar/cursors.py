"""A `Cursor` over each kind of SGLang grammar object, by the engines' native calls where there are any."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isfinite

import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.llguidance_backend import (
    GrammarDraftRow,
    GuidanceGrammar,
    fill_token_bitmask_with_draft_tokens,
)
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.grammar.repair import ALL_ALLOWED, Cursor, Ids, Reach, is_allowed
from sglang_orthrus.grammar.slow_masks import NO_DEADLINE, Deadline
from sglang_orthrus.grammar.token_text import TokenText
from sglang_orthrus.grammar.xgrammar import XGrammarCursor, stop_ids_of

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

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Reach:
        """See `Cursor`. `validate_tokens`, since a token that it refuses may leave llguidance in an error for good.

        At the grammar's end it takes no stop token, but its mask allows them.
        """
        self._catch_up()
        stop = next((place for place, token in enumerate(tokens) if token in self._stop_ids), None)
        length = self._matcher.validate_tokens(list(tokens[: None if stop is None else stop + 1]))
        self._ahead = list(tokens[: length if stop is None else min(length, stop)])
        if stop is None or length < stop:
            return Reach(length, False)
        if length == stop:
            self._catch_up()
        ended = length > stop or self._matcher.is_stopped()
        return Reach(stop + ended, ended)

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
def fill_blocks(
    cursors: Sequence[tuple[int, GuidanceCursor]], blocks: torch.Tensor, masks: torch.Tensor, limit: float
) -> int:
    """As `Cursor.fill_block` does, for several blocks by llguidance's own threads; the same rows of all are filled.

    The engine can't be interrupted. So where a limit is set, two rows tell how many more it may be asked for.

    cursors: with their blocks' numbers; blocks: [B, Q]; masks: [B * Q, W].
    """
    width = blocks.shape[1]
    for _, cursor in cursors:
        cursor._catch_up()

    def fill(num_rows: int) -> None:
        entries = [
            GrammarDraftRow(number * width, cursor._grammar, blocks[number, 1:num_rows].tolist())
            for number, cursor in cursors
        ]
        fill_token_bitmask_with_draft_tokens(entries, masks)

    if isfinite(limit):
        started = time.perf_counter()
        fill(2)
        seconds = (time.perf_counter() - started) / 2
        if seconds > limit / _NUM_QUICK_ROWS:
            num_rows = max(1, min(width, int(limit / seconds)))
            if num_rows > 2:
                fill(num_rows)
            return num_rows
    fill(width)
    return width


@depends_on(
    "sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarObject",
    "grammar",
    "think_end_ids",
    what="advances along a block and back; _is_thinking and _grammar_active are asked whether it constrains",
    why="it has no public call for either",
    until="SGLang's grammar objects fill the masks of a chain",
)
class ReasonerCursor:
    """A grammar that waits for the end of a reasoning, token by token: a round in which it may begin.

    Args:
        grammar: the waiting one.
        text: see `cursor_of`.
        scratch: see `cursor_of`.
    """

    key: int | None = None

    def __init__(self, grammar: ReasonerGrammarObject, text: TokenText, scratch: torch.Tensor) -> None:
        self._grammar = grammar
        self._text = text
        self._scratch = scratch

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Reach:
        """See `Cursor`."""
        for place, token in enumerate(tokens):
            if place and deadline.is_over():
                return Reach(place, False)
            reach = self._reach(token) if self._is_free(token) else Reach(0, False)
            if not reach.moved:
                return Reach(place + reach.length, reach.ended)
            self._grammar.accept_token(token)
        return Reach(len(tokens), False)

    def _is_free(self, token: int) -> bool:
        """Whether limits on the reasoning allow a token."""
        if not (self._grammar.enable_token_filter and self._grammar._is_thinking()):
            return True
        self.fill(self._scratch)
        return is_allowed(token, self._scratch.numpy()[0])

    def _reach(self, token: int) -> Reach:
        """What the grammar, if it has begun, says of a token."""
        begun = self._begun()
        if begun is None:
            return Reach(1, False)
        reach = begun.advance([token])
        begun.rollback(reach.moved)
        return reach

    def _begun(self) -> Cursor | None:
        if self._grammar.grammar is None or not self._grammar._grammar_active():
            return None
        return cursor_of(self._grammar.grammar, self._text, self._scratch)

    def rollback(self, count: int) -> None:
        """See `Cursor`."""
        if count:
            self._grammar.rollback(count)

    def forced(self, count: int, deadline: Deadline = NO_DEADLINE) -> Sequence[int]:
        """See `Cursor`."""
        begun = self._begun()
        return () if begun is None else begun.forced(count, deadline)

    def fill(self, masks: torch.Tensor) -> None:
        """See `Cursor`. A grammar that does not constrain yet leaves a row as it is."""
        masks.numpy()[0] = ALL_ALLOWED
        self._grammar.fill_vocab_mask(masks, 0)

    def fill_block(self, block: torch.Tensor, masks: torch.Tensor, limit: float = float("inf")) -> int:
        """See `Cursor`."""
        end = time.perf_counter() + limit
        length, num_filled, bits = 0, block.shape[0], masks.numpy()
        for token in block[1:].tolist():
            if length and time.perf_counter() >= end:
                num_filled = length
                break
            self.fill(masks[length:])
            if not is_allowed(token, bits[length]) or not self._reach(token).moved:
                break
            self._grammar.accept_token(token)
            length += 1
        else:
            self.fill(masks[length:])
        self.rollback(length)
        return num_filled


@depends_on(
    "sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarObject._is_generation",
    what="called: past the end of the reasoning the grammar behind it is used alone",
    why="there is no public call that tells",
    until="there is one",
)
def cursor_of(grammar: BaseGrammarObject, text: TokenText, scratch: torch.Tensor) -> Cursor:
    """The fastest cursor for a grammar object in its present state; not to be kept for the next round.

    Args:
        grammar: one that `is_walkable`.
        text: of the model's tokenizer.
        scratch: [n, W] int32 on the CPU; the cursor writes to its first row while it is asked for its reach.
    """
    if isinstance(grammar, ReasonerGrammarObject):
        # Past the reasoning it only counts tokens, which a walk that goes back to its start need not tell it.
        if grammar.grammar is not None and grammar._is_generation() and not grammar.reasoning_in_grammar:
            return cursor_of(grammar.grammar, text, scratch)
        return ReasonerCursor(grammar, text, scratch)
    if isinstance(grammar, XGrammarGrammar):
        # Clients' strings may be large.
        key = None if grammar.key_string is None else hash(grammar.key_string)
        return XGrammarCursor(grammar.matcher, text, stop_ids_of(grammar), scratch, key)
    assert isinstance(grammar, GuidanceGrammar), "other grammar backends are refused at start-up"
    return GuidanceCursor(grammar)


def is_walkable(grammar: BaseGrammarObject) -> bool:
    """Whether a grammar has something to say: it has not terminated, nor failed on a token that it did not allow."""
    inner = grammar.grammar if isinstance(grammar, ReasonerGrammarObject) else grammar
    has_failed = isinstance(inner, GuidanceGrammar) and inner.ll_matcher.is_error()
    return not (has_failed or grammar.is_terminated())


@depends_on(
    "sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarObject._is_thinking",
    what="called: a reasoning that goes on through the block leaves it unconstrained",
    why="there is no public call that tells",
    until="there is one",
)
def leaves_block_alone(grammar: BaseGrammarObject, tokens: Ids) -> bool:
    """Whether a reasoning goes on through the whole block, so that a grammar behind it does not constrain any of it."""
    return (
        isinstance(grammar, ReasonerGrammarObject)
        and grammar._is_thinking()
        and not grammar.reasoning_in_grammar
        and not grammar.enable_token_filter
        and grammar.think_end_ids[-1] not in tokens
    )
