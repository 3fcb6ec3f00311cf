"""A `Cursor` over XGrammar's matchers, by its native calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import isfinite
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar
from xgrammar import GrammarMatcher
from xgrammar.base import _core

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.grammar.cursor import Masks, Match, is_allowed
from sglang_orthrus.grammar.slow_masks import NO_DEADLINE, Deadline
from sglang_orthrus.grammar.token_text import BYTES_PER_TOKEN, TokenText

_STOP_IDS: WeakKeyDictionary[XGrammarGrammar, frozenset[int]] = WeakKeyDictionary()


# Where tokens of more words of a mask are allowed, the first byte may be forced, but hardly more.
_MAX_FORCED_WORDS = 16
# In the first word of rows that are not filled yet. If a grammar should allow just these, a row counts as not filled.
_UNFILLED = 0x5A5A5A5A
_NO_DRAFTS = torch.zeros(1, dtype=torch.int64)


class _ShortCalls(NamedTuple):
    """XGrammar's native methods of a matcher, of these names; the matcher's handle is the first argument."""

    accept_token: Any
    rollback: Any
    fill_next_token_bitmask: Any
    find_jump_forward_string: Any


@depends_on(
    "xgrammar.base:_core.GrammarMatcher.__tvm_ffi_type_info__",
    what="searched for the native methods of a matcher",
    why="XGrammar's Python methods release the interpreter's lock at every token, so that other threads delay them",
    until="XGrammar accepts a chain of tokens in one call, without masks",
)
@depends_on(
    "tvm_ffi.core:Function.release_gil",
    what="set to False for the native methods of a matcher",
    why="XGrammar's Python methods release the interpreter's lock at every token, so that other threads delay them",
    until="XGrammar accepts a chain of tokens in one call, without masks",
)
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


@depends_on(
    "xgrammar.base:XGRObject._handle",
    what="read, as the first argument of the native methods",
    why="XGrammar's Python methods take twice as long, and release the interpreter's lock at every token",
    until="XGrammar accepts a chain of tokens in one call, without masks",
)
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
        self._words: Masks = scratch.numpy()[0]  # made here, as PyTorch lets go of the interpreter's lock for it

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Match:
        """See `Cursor`."""
        accept, handle, stop_ids, is_over = self._calls.accept_token, self._handle, self._stop_ids, deadline.is_over
        for index, token in enumerate(tokens):
            if not accept(handle, token, False):
                return Match(index, False)
            if token in stop_ids:
                self.rollback(1)
                return Match(index + 1, True)
            if is_over():
                return Match(index + 1, False)
        return Match(len(tokens), False)

    def rollback(self, count: int) -> None:
        """See `Cursor`."""
        if count:
            self._calls.rollback(self._handle, count)

    def forced(self, count: int, deadline: Deadline = NO_DEADLINE) -> Sequence[int]:
        """See `Cursor`. XGrammar's own search is exact but has no bound. It runs where the string is known to end.

        To know that, longest tokens are followed. Where a string is forced, a mask takes microseconds. Elsewhere
        they may take tens of milliseconds, but there two characters of the same script are allowed.
        """
        calls, handle = self._calls, self._handle
        found, moved, ends = b"", 0, False
        while moved <= count and len(found) <= BYTES_PER_TOKEN * count and not (ends or deadline.is_over()):
            token = None
            if not self._is_open():
                calls.fill_next_token_bitmask(handle, self._scratch, 0, False)
                token = self._only_token(self._words)
            if token is None:
                ends = True
            elif calls.accept_token(handle, token, False):
                found += self._text.spelling(token)
                moved += 1
            else:
                break
        self.rollback(moved)
        if not found:
            return ()
        if ends:
            try:
                found = str(calls.find_jump_forward_string(handle)).encode()
            except UnicodeDecodeError:  # in the middle of a character
                return ()
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
        """The longest allowed token with which all longer ones begin, and which begins with all shorter ones.

        words: [W].
        """
        allowed = list[int]()
        nonzero: list[int] = (words != 0).nonzero()[0].tolist()
        if len(nonzero) > _MAX_FORCED_WORDS:
            allowed = self._text.allowed_bytes(words)
            if len(allowed) > 1 or any(is_allowed(token, words) for token in self._stop_ids):
                return None
            nonzero = []
        for index in nonzero:
            word = words.item(index) & 0xFFFFFFFF
            while word:
                allowed.append(index * 32 + (word & -word).bit_length() - 1)
                word &= word - 1
        if not self._stop_ids.isdisjoint(allowed):
            return None
        spelled = sorted(((self._text.spelling(token), token) for token in allowed), key=lambda one: len(one[0]))
        found = None
        for index, (spelling, token) in enumerate(spelled, start=1):
            if not all(longer.startswith(spelling) for longer, _ in spelled[index:]):
                break
            found = token
        return found

    def fill(self, masks: torch.Tensor) -> None:
        """See `Cursor`."""
        _fill_next(self._matcher, masks[:1])

    def copied_fill(self) -> Callable[[torch.Tensor], None]:
        """What fills a mask as `fill` does here, in any thread, and wherever the grammar goes meanwhile."""
        return partial(_fill_next, self._matcher.fork())

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


@depends_on(
    "sglang.srt.constrained.xgrammar_backend:XGrammarGrammar",
    "matcher",
    what="its matcher advances along a block and back",
    why="SGLang's grammar objects have no call that fills the masks of a chain",
    until="they have one",
)
def stop_ids_of(grammar: XGrammarGrammar) -> frozenset[int]:
    """Remembered: XGrammar makes a new list each time it is asked."""
    if grammar not in _STOP_IDS:
        _STOP_IDS[grammar] = frozenset(grammar.matcher.stop_token_ids)
    return _STOP_IDS[grammar]


def _fill_next(matcher: GrammarMatcher, mask: torch.Tensor) -> None:
    """What may come next, [1, W], without the interpreter's lock."""
    matcher.traverse_draft_tree(*_chain(1), _NO_DRAFTS, mask)


@cache
def _chain(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Child and sibling of every node of a chain, -1 for none. [length] int64 each."""
    children = torch.arange(1, length + 1)
    children[-1] = -1
    return children, torch.full_like(children, -1)
