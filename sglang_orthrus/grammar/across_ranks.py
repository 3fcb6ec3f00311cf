"""Grammars under tensor parallelism: rank 0 repairs drafts and fills masks, within its time, and the others take both.

Letters: R constrained requests, Q width of the round, W words of a mask row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask

from sglang_orthrus import ranks
from sglang_orthrus.compat.grammars import fail, has_failed
from sglang_orthrus.core import rows_index
from sglang_orthrus.grammar.batch import BegunMasks, BlockGrammars, BlockMasks, CandidatesCopy, RepairedDrafts
from sglang_orthrus.grammar.cursors import guidance_of
from sglang_orthrus.grammar.masks import BestOf


class GrammarsAcrossRanks(BlockGrammars):
    """As one rank's, but decided by rank 0 alone. See `BlockGrammars`."""

    def repair(
        self, reqs: Sequence[Any], rows: Sequence[int], candidates: CandidatesCopy, vocab_size: int
    ) -> RepairedDrafts:
        """See `BlockGrammars.repair`."""
        _fail_together(reqs, rows)
        if ranks.is_first():
            repaired = super().repair(reqs, rows, candidates, vocab_size)
            return repaired._replace(tokens=ranks.from_first(repaired.tokens.contiguous()))
        grammar = reqs[rows[0]].grammar
        tokens = torch.empty(len(rows), candidates.width - 1, dtype=torch.int64, device=self._device)
        host = self._buffers.take(len(rows), candidates.width, grammar, vocab_size)
        return RepairedDrafts(rows_index(rows, self._device), ranks.from_first(tokens), host, [], grammar, 0.0)

    def masks(
        self, drafts: RepairedDrafts, skippable: Collection[int] = (), best_of: BestOf | None = None
    ) -> BlockMasks:
        """See `BlockGrammars.masks`. No mask is skipped: the other ranks would have to run the head, too."""
        if ranks.is_first():
            filled = super().masks(drafts)
            mask, limits = filled.mask.vocab_mask, filled.limits
        else:
            mask = torch.empty_like(drafts.host.masks, device=self._device)
            limits = [0] * len(drafts.tokens)
        limits = ranks.numbers_from_first(limits)
        return BlockMasks(GrammarMask(drafts.any_grammar, ranks.from_first(mask)), limits)

    def begin_next_masks(
        self, reqs: Sequence[Any], rows: Sequence[int], vocab_size: int, skippable: Collection[int] = ()
    ) -> BegunMasks:
        """See `BlockGrammars.begin_next_masks`. Every rank fills all masks: clocks say which grammars are slow."""
        _fail_together(reqs, rows)
        return super().begin_next_masks(reqs, rows, vocab_size)


def _fail_together(reqs: Sequence[Any], rows: Sequence[int]) -> None:
    """Have the grammars that failed on rank 0 fail on all ranks, at the next token.

    llguidance counts what it has computed, and rank 0 computes more than the others: it walks along drafts.
    """
    grammars = [own for row in rows if (own := guidance_of(reqs[row].grammar)) is not None]
    if not grammars:
        return
    failed = ranks.numbers_from_first([int(has_failed(own)) for own in grammars])
    for own, is_failed in zip(grammars, failed, strict=True):
        if is_failed:
            fail(own)
