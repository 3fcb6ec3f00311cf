"""A `Cursor` over each kind of SGLang grammar object, by the engines' native calls where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import isfinite
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.llguidance_backend import (
    GrammarDraftRow,
    GuidanceGrammar,
    fill_token_bitmask_with_draft_tokens,
)
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from xgrammar import GrammarMatcher
from xgrammar.base import _core

from sglang_orthrus.grammar import ALL_ALLOWED, Cursor, Ids, Reach, is_allowed

Encode = Callable[[str], Sequence[int]]

_STOP_IDS: WeakKeyDictionary[XGrammarGrammar, frozenset[int]] = WeakKeyDictionary()


class _ShortCalls(NamedTuple):
    """XGrammar's native methods of a matcher, of these names; the matcher's handle is the first argument."""

    accept_token: Any
    rollback: Any
    find_jump_forward_string: Any


@cache
def _short_calls() -> _ShortCalls:
    """They take microseconds, and from now on they keep the interpreter's lock.

    At every call that lets go of it another thread may take it, for as long as 5 ms.
    """
    native = {method.name: method.func for method in _core.GrammarMatcher.__tvm_ffi_type_info__.methods}
    calls = _ShortCalls(*(native[name] for name in _ShortCalls._fields))
    for call in calls:
        call.release_gil = False
    return calls


class XGrammarCursor:
    """XGrammar: a chain is filled by one `traverse_draft_tree`, which runs without the interpreter's lock."""

    def __init__(
        self, matcher: GrammarMatcher, encode: Encode, stop_ids: frozenset[int], key: str | None = None
    ) -> None:
        self.key = key
        self._matcher = matcher
        self._handle = matcher._handle
        self._calls = _short_calls()
        self._encode = encode
        self._stop_ids = stop_ids

    def advance(self, tokens: Sequence[int]) -> Reach:
        """See `Cursor`."""
        accept, handle, stop_ids = self._calls.accept_token, self._handle, self._stop_ids
        for place, token in enumerate(tokens):
            if not accept(handle, token, False):
                return Reach(place, False)
            if token in stop_ids:
                self.rollback(1)
                return Reach(place + 1, True)
        return Reach(len(tokens), False)

    def rollback(self, count: int) -> None:
        """See `Cursor`."""
        if count:
            self._calls.rollback(self._handle, count)

    def forced(self) -> Sequence[int]:
        """See `Cursor`. Without the last token, which a model may join with what follows the forced string."""
        try:
            text = str(self._calls.find_jump_forward_string(self._handle))
        except UnicodeDecodeError:  # in the middle of a character
            return ()
        return self._encode(text)[:-1] if text else ()

    def fill(self, masks: torch.Tensor) -> None:
        """See `Cursor`."""
        self._matcher.fill_next_token_bitmask(masks, 0)

    def fill_block(self, block: torch.Tensor, masks: torch.Tensor, limit: float = float("inf")) -> bool:
        """See `Cursor`."""
        threshold = limit if isfinite(limit) else -1.0  # XGrammar's for none
        return bool(self._matcher.traverse_draft_tree(*_chain(block.shape[0]), block, masks, threshold))


class GuidanceCursor:
    """llguidance: a chain is filled by its executor; its forced tokens stop short of an unsure end by themselves.

    Where it forces a string it follows tokens that its mask does not allow, so there is no `key`.
    """

    key: str | None = None

    def __init__(self, grammar: GuidanceGrammar) -> None:
        self._grammar = grammar
        self._matcher = grammar.ll_matcher
        self._stop_ids: set[int] = grammar.eos_tokens
        # Moved over, but the engine does not know yet: it validates tokens in a quarter of the time that it takes them.
        self._ahead: list[int] = []

    def advance(self, tokens: Sequence[int]) -> Reach:
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

    def forced(self) -> Sequence[int]:
        """See `Cursor`."""
        self._catch_up()
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens

    def fill(self, masks: torch.Tensor) -> None:
        """See `Cursor`."""
        self._catch_up()
        self._grammar.fill_vocab_mask(masks, 0)

    def fill_block(self, block: torch.Tensor, masks: torch.Tensor, limit: float = float("inf")) -> bool:
        """See `Cursor`."""
        fill_blocks([(0, self)], block[None], masks)
        return True


def fill_blocks(cursors: Sequence[tuple[int, GuidanceCursor]], blocks: torch.Tensor, masks: torch.Tensor) -> None:
    """As `Cursor.fill_block` does, for several blocks by llguidance's own threads.

    cursors: with their blocks' numbers; blocks: [B, Q]; masks: [B * Q, W].
    """
    width = blocks.shape[1]
    entries = []
    for number, cursor in cursors:
        cursor._catch_up()
        entries.append(GrammarDraftRow(number * width, cursor._grammar, blocks[number, 1:].tolist()))
    fill_token_bitmask_with_draft_tokens(entries, masks)


class ReasonerCursor:
    """A grammar that waits for the end of a reasoning, token by token: a round in which it may begin.

    Args:
        grammar: the waiting one.
        encode: see `cursor_of`.
        scratch: see `cursor_of`.
    """

    key: str | None = None

    def __init__(self, grammar: ReasonerGrammarObject, encode: Encode, scratch: torch.Tensor) -> None:
        self._grammar = grammar
        self._encode = encode
        self._scratch = scratch

    def advance(self, tokens: Sequence[int]) -> Reach:
        """See `Cursor`."""
        for place, token in enumerate(tokens):
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
        return cursor_of(self._grammar.grammar, self._encode, self._scratch)

    def rollback(self, count: int) -> None:
        """See `Cursor`."""
        if count:
            self._grammar.rollback(count)

    def forced(self) -> Sequence[int]:
        """See `Cursor`."""
        begun = self._begun()
        return () if begun is None else begun.forced()

    def fill(self, masks: torch.Tensor) -> None:
        """See `Cursor`. A grammar that does not constrain yet leaves a row as it is."""
        masks.numpy()[0] = ALL_ALLOWED
        self._grammar.fill_vocab_mask(masks, 0)

    def fill_block(self, block: torch.Tensor, masks: torch.Tensor, limit: float = float("inf")) -> bool:
        """See `Cursor`."""
        length, bits = 0, masks.numpy()
        for token in block[1:].tolist():
            self.fill(masks[length:])
            if not is_allowed(token, bits[length]) or not self._reach(token).moved:
                break
            self._grammar.accept_token(token)
            length += 1
        else:
            self.fill(masks[length:])
        self.rollback(length)
        return True


def cursor_of(grammar: BaseGrammarObject, encode: Encode, scratch: torch.Tensor) -> Cursor:
    """The fastest cursor for a grammar object in its present state; not to be kept for the next round.

    Args:
        grammar: one that `is_walkable`.
        encode: text to token ids, no special ones added.
        scratch: [n, W] int32 on the CPU; the cursor writes to its first row while it is asked for its reach.
    """
    if isinstance(grammar, ReasonerGrammarObject):
        # Past the reasoning it only counts tokens, which a walk that goes back to its start need not tell it.
        if grammar.grammar is not None and grammar._is_generation() and not grammar.reasoning_in_grammar:
            return cursor_of(grammar.grammar, encode, scratch)
        return ReasonerCursor(grammar, encode, scratch)
    if isinstance(grammar, XGrammarGrammar):
        return XGrammarCursor(grammar.matcher, encode, _stop_ids(grammar), grammar.key_string)
    assert isinstance(grammar, GuidanceGrammar), "other grammar backends are refused at start-up"
    return GuidanceCursor(grammar)


def is_walkable(grammar: BaseGrammarObject) -> bool:
    """Whether a grammar has something to say: it has not terminated, nor failed on a token that it did not allow."""
    inner = grammar.grammar if isinstance(grammar, ReasonerGrammarObject) else grammar
    has_failed = isinstance(inner, GuidanceGrammar) and inner.ll_matcher.is_error()
    return not (has_failed or grammar.is_terminated())


def leaves_block_alone(grammar: BaseGrammarObject, tokens: Ids) -> bool:
    """Whether a reasoning goes on through the whole block, so that a grammar behind it does not constrain any of it."""
    return (
        isinstance(grammar, ReasonerGrammarObject)
        and grammar._is_thinking()
        and not grammar.reasoning_in_grammar
        and not grammar.enable_token_filter
        and grammar.think_end_ids[-1] not in tokens
    )


def _stop_ids(grammar: XGrammarGrammar) -> frozenset[int]:
    """Remembered: XGrammar makes a new list each time it is asked."""
    if grammar not in _STOP_IDS:
        _STOP_IDS[grammar] = frozenset(grammar.matcher.stop_token_ids)
    return _STOP_IDS[grammar]


@cache
def _chain(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Child and sibling of every node of a chain, -1 for none. [length] int64 each."""
    children = torch.arange(1, length + 1)
    children[-1] = -1
    return children, torch.full_like(children, -1)
