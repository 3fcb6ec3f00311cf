"""A `Cursor` over a grammar that begins behind a reasoning."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.grammar.cursor import ALL_ALLOWED, Cursor, Ids, Match, is_allowed
from sglang_orthrus.grammar.slow_masks import NO_DEADLINE, Deadline


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
        cursor_of: makes the cursor of the grammar that waits.
        scratch: [n, W] int32 on the CPU; the first row is written to.
    """

    key: int | None = None

    def __init__(
        self, grammar: ReasonerGrammarObject, cursor_of: Callable[[BaseGrammarObject], Cursor], scratch: torch.Tensor
    ) -> None:
        self._grammar = grammar
        self._cursor_of = cursor_of
        self._scratch = scratch

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Match:
        """See `Cursor`."""
        for index, token in enumerate(tokens):
            if index and deadline.is_over():
                return Match(index, False)
            match = self._match(token) if self._is_free(token) else Match(0, False)
            if not match.num_moved:
                return Match(index + match.length, match.ended)
            self._grammar.accept_token(token)
        return Match(len(tokens), False)

    def _is_free(self, token: int) -> bool:
        """Whether limits on the reasoning allow a token."""
        if not (self._grammar.enable_token_filter and self._grammar._is_thinking()):
            return True
        self.fill(self._scratch)
        return is_allowed(token, self._scratch.numpy()[0])

    def _match(self, token: int) -> Match:
        """What the grammar, if it has begun, says of a token."""
        begun = self._begun()
        if begun is None:
            return Match(1, False)
        match = begun.advance([token])
        begun.rollback(match.num_moved)
        return match

    def _begun(self) -> Cursor | None:
        if self._grammar.grammar is None or not self._grammar._grammar_active():
            return None
        return self._cursor_of(self._grammar.grammar)

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
            if not is_allowed(token, bits[length]) or not self._match(token).num_moved:
                break
            self._grammar.accept_token(token)
            length += 1
        else:
            self.fill(masks[length:])
        self.rollback(length)
        return num_filled


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
