"""Which `Cursor` fits a grammar object of SGLang's, in its present state."""

from __future__ import annotations

from functools import partial

import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarObject
from sglang.srt.constrained.llguidance_backend import GuidanceGrammar
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

from sglang_orthrus.compat.grammars import has_failed
from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.grammar.cursor import Cursor
from sglang_orthrus.grammar.llguidance import GuidanceCursor
from sglang_orthrus.grammar.reasoning import ReasonerCursor
from sglang_orthrus.grammar.token_text import TokenText
from sglang_orthrus.grammar.xgrammar import XGrammarCursor, stop_ids_of


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
        scratch: [n, W] int32 on the CPU; the cursor writes to its first row while it is asked for its match.
    """
    if isinstance(grammar, ReasonerGrammarObject):
        # Past the reasoning it only counts tokens, which a walk that goes back to its start need not tell it.
        if grammar.grammar is not None and grammar._is_generation() and not grammar.reasoning_in_grammar:
            return cursor_of(grammar.grammar, text, scratch)
        return ReasonerCursor(grammar, partial(cursor_of, text=text, scratch=scratch), scratch)
    if isinstance(grammar, XGrammarGrammar):
        # Clients' strings may be large.
        key = None if grammar.key_string is None else hash(grammar.key_string)
        return XGrammarCursor(grammar.matcher, text, stop_ids_of(grammar), scratch, key)
    assert isinstance(grammar, GuidanceGrammar), "other grammar backends are refused at start-up"
    return GuidanceCursor(grammar)


def is_walkable(grammar: BaseGrammarObject) -> bool:
    """Whether a grammar still constrains: it has neither terminated nor failed on a token that it did not allow."""
    guidance = guidance_of(grammar)
    return not ((guidance is not None and has_failed(guidance)) or grammar.is_terminated())


def guidance_of(grammar: BaseGrammarObject) -> GuidanceGrammar | None:
    """llguidance's grammar, be it behind a reasoning or not; None if it is another engine's."""
    inner = grammar.grammar if isinstance(grammar, ReasonerGrammarObject) else grammar
    return inner if isinstance(inner, GuidanceGrammar) else None
