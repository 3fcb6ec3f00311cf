"""What SGLang's grammar backends and its sampling lack to serve grammars behind a reasoning and beside options."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from sglang_orthrus import ranks
from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.wrapping import wrap_once

_IS_TOLD = "orthrus_is_told"


@depends_on(
    "sglang.srt.constrained.llguidance_backend:GuidanceBackend",
    "tokenizer",
    "n_vocab",
    what="gets the three functions that ReasonerGrammarBackend asks of a backend, if it lacks them",
    why="without them every request with a grammar gets a 400 if there is a reasoning parser",
    until="SGLang adds them (sgl-project/sglang#33061, patches/0008)",
)
@depends_on(
    "sglang.srt.constrained.llguidance_backend:GuidanceGrammar.fill_vocab_mask",
    "vocab_mask",
    "idx",
    what="wrapped: a grammar that failed, on a token or on this very mask, fills no mask",
    why="it raises in the scheduler, which ends; its request ends with its next token, which the grammar refuses",
    until="it checks for itself (patches/0008)",
)
@depends_on(
    "sglang.srt.constrained.llguidance_backend:allocate_token_bitmask",
    what="called for the masks of a batch",
    why="GuidanceGrammar allocates them with it",
    until="SGLang adds the backend's function (sgl-project/sglang#33061, patches/0008)",
)
def begin_llguidance_behind_a_reasoning() -> None:
    """Give llguidance's backend what a reasoning parser asks of one, and have a failed grammar fill no more masks."""
    from sglang.srt.constrained.llguidance_backend import GuidanceBackend, GuidanceGrammar, allocate_token_bitmask

    def allocate_vocab_mask(self: Any, vocab_size: int, batch_size: int, device: Any) -> Any:
        return allocate_token_bitmask(batch_size, self.llguidance_tokenizer.vocab_size)

    def unless_failed(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def fill_vocab_mask(self: Any, vocab_mask: Any, idx: int) -> None:
            if has_failed(self):
                return
            try:
                stock(self, vocab_mask, idx)
            except ValueError:
                if not has_failed(self):
                    raise

        return fill_vocab_mask

    if not hasattr(GuidanceBackend, "allocate_vocab_mask"):
        GuidanceBackend.allocate_vocab_mask = allocate_vocab_mask
        GuidanceBackend.move_vocab_mask = staticmethod(GuidanceGrammar.move_vocab_mask)
        GuidanceBackend.apply_vocab_mask = staticmethod(GuidanceGrammar.apply_vocab_mask)
    wrap_once(GuidanceGrammar, "fill_vocab_mask", unless_failed)


@depends_on(
    "sglang.srt.constrained.llguidance_backend:GuidanceGrammar.accept_token",
    "token",
    what="wrapped: with several ranks it raises where `fail` was called, and nowhere else",
    why="rank 0 walks along drafts, so its grammars come to the engine's limits sooner; a request that only one rank "
    "aborts makes the ranks part",
    until="SGLang aborts requests on all ranks alike",
)
def fail_only_if_told() -> None:
    """With several ranks, have llguidance's grammars take tokens that they refuse, until `fail` is called on all."""
    from sglang.srt.constrained.llguidance_backend import GuidanceGrammar

    def told(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def accept_token(self: Any, token: int) -> None:
            if not ranks.are_several():
                stock(self, token)
                return
            if getattr(self, _IS_TOLD, False):
                raise ValueError("the grammar refused a token, or came to a limit of its engine")
            # The matcher keeps its error, which `has_failed` finds.
            with suppress(ValueError):
                stock(self, token)

        return accept_token

    wrap_once(GuidanceGrammar, "accept_token", told)


@depends_on(
    "sglang.srt.constrained.llguidance_backend:GuidanceGrammar",
    "ll_matcher",
    what="ll_matcher is asked for an error",
    why="SGLang asks it after every token alone",
    until="SGLang's grammar objects tell",
)
def has_failed(grammar: Any) -> bool:
    """Whether one of llguidance's grammars refused a token or came to a limit."""
    return bool(grammar.ll_matcher.is_error())


def fail(grammar: Any) -> None:
    """Have it raise at its next token, so that SGLang aborts its request."""
    setattr(grammar, _IS_TOLD, True)


@depends_on(
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.apply_logits_bias",
    "logits",
    what="wrapped: it keeps the logits that the grammar alone allows, for our sampler",
    why="where options forbid all of them SGLang samples from nothing, and its scheduler dies",
    until="options give way to the grammar in SGLang (patches/0013)",
)
def keep_allowed_logits() -> None:
    """Have options that may forbid tokens leave, as `allowed_logits`, what the grammar alone allows."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    def keeping(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def apply_logits_bias(self: Any, logits: Any) -> None:
            orchestrator = self.penalizer_orchestrator
            may_forbid = (
                self.has_custom_logit_processor
                or self.logit_bias is not None
                or self.acc_additive_penalties is not None
                or (orchestrator is not None and orchestrator.is_required)
            )
            allowed = logits.clone() if may_forbid else None
            stock(self, logits)
            if allowed is not None and self.grammar_mask is not None:
                self.grammar_mask.apply(allowed)
            self.allowed_logits = allowed

        return apply_logits_bias

    wrap_once(SamplingBatchInfo, "apply_logits_bias", keeping)
