"""A `Cursor` over XGrammar's matchers, by its native calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import isfinite
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from xgrammar import GrammarMatcher
from xgrammar.base import _core

from sglang_orthrus.grammar import Masks, Reach
from sglang_orthrus.slow_masks import NO_DEADLINE, Deadline
from sglang_orthrus.token_text import BYTES_PER_TOKEN, TokenText

_STOP_IDS: WeakKeyDictionary[XGrammarGrammar, frozenset[int]] = WeakKeyDictionary()


# A forced string allows no more than its beginnings: a choice among tokens in more words of a mask than this is one.
_MAX_FORCED_WORDS = 64
# In the first word of rows that are not filled yet. If a grammar should allow just these, a row counts as not filled.
_UNFILLED = 0x5A5A5A5A
_NO_DRAFTS = torch.zeros(1, dtype=torch.int64)


class _ShortCalls(NamedTuple):
    """XGrammar's native methods of a matcher, of these names; the matcher's handle is the first argument."""

    accept_token: Any
    rollback: Any
    fill_next_token_bitmask: Any


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
    """XGrammar: a chain is filled by one `traverse_draft_tree`, which runs without the interpreter's lock.

    Args:
        matcher: of the grammar.
        text: of the model's tokenizer.
        stop_ids: that end a text.
        scratch: [n, W] int32 on the CPU; its first row is written to where strings are forced.
        key: see `Cursor`.
    """

    def __init__(
        self,
        matcher: GrammarMatcher,
        text: TokenText,
        stop_ids: frozenset[int],
        scratch: torch.Tensor,
        key: int | None = None,
    ) -> None:
        self.key = key
        self._matcher = matcher
        self._handle = matcher._handle
        self._calls = _short_calls()
        self._text = text
        self._stop_ids = stop_ids
        self._scratch = scratch

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Reach:
        """See `Cursor`."""
        accept, handle, stop_ids, is_over = self._calls.accept_token, self._handle, self._stop_ids, deadline.is_over
        for place, token in enumerate(tokens):
            if not accept(handle, token, False):
                return Reach(place, False)
            if token in stop_ids:
                self.rollback(1)
                return Reach(place + 1, True)
            if is_over():
                return Reach(place + 1, False)
        return Reach(len(tokens), False)

    def rollback(self, count: int) -> None:
        """See `Cursor`."""
        if count:
            self._calls.rollback(self._handle, count)

    def forced(self, count: int, deadline: Deadline = NO_DEADLINE) -> Sequence[int]:
        """See `Cursor`. Token by token: XGrammar's own search for a forced string has no bound.

        Where a string is forced, masks are as fast as a few tokens. Elsewhere they may take tens of milliseconds, but
        there two tokens of the same script are allowed.
        """
        words = self._scratch.numpy()[0]
        found, moved = b"", 0
        while moved <= count and len(found) <= BYTES_PER_TOKEN * count and not (deadline.is_over() or self._is_open()):
            self._calls.fill_next_token_bitmask(self._handle, self._scratch, 0, False)
            token = self._only_token(words)
            if token is None or not self._calls.accept_token(self._handle, token, False):
                break
            found += self._text.spelling(token)
            moved += 1
        self.rollback(moved)
        return self._text.begin(found, count)

    def _is_open(self) -> bool:
        """Whether two tokens of one byte are allowed, of those that are tried."""
        return any(self._allows(first) and self._allows(second) for first, second in self._text.probes)

    def _allows(self, token: int) -> bool:
        if not self._calls.accept_token(self._handle, token, False):
            return False
        self.rollback(1)
        return True

    def _only_token(self, words: Masks) -> int | None:
        """The longest token that a mask allows, if all others spell its beginning. words: [W]."""
        places = (words != 0).nonzero()[0]
        if len(places) > _MAX_FORCED_WORDS:
            return None
        allowed = [place * 32 + bit for place in places.tolist() for bit in range(32) if words.item(place) >> bit & 1]
        if not allowed or not self._stop_ids.isdisjoint(allowed):
            return None
        spellings = list(map(self._text.spelling, allowed))
        longest = max(spellings, key=len)
        return allowed[spellings.index(longest)] if all(map(longest.startswith, spellings)) else None

    def fill(self, masks: torch.Tensor) -> None:
        """See `Cursor`."""
        self._matcher.traverse_draft_tree(*_chain(1), _NO_DRAFTS, masks[:1])

    def fill_block(self, block: torch.Tensor, masks: torch.Tensor, limit: float = float("inf")) -> int:
        """See `Cursor`. XGrammar says whether it is done, but not how far it came: the rows tell."""
        if limit <= 0:
            self.fill(masks)
            return 1
        first_words = masks.numpy()[:, 0]
        first_words[:] = _UNFILLED
        threshold = limit if isfinite(limit) else -1.0  # XGrammar's for none
        width = block.shape[0]
        if self._matcher.traverse_draft_tree(*_chain(width), block, masks, threshold):
            return width
        are_unfilled = first_words == _UNFILLED
        return max(1, int(are_unfilled.argmax())) if are_unfilled.any() else width


def stop_ids_of(grammar: XGrammarGrammar) -> frozenset[int]:
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
