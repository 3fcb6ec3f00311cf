"""One round: draft, repair, verify, accept. Each step reads only what the one before returned.

For a request with C committed tokens and a block of Q:

    slots [0, C)        AR-view K/V, shared with the radix tree
    slots [C, C+Q)      draft writes diffusion K/V here, verify overwrites the same slots with AR K/V
    after n commits     [C, C+n) stays; the rest is overwritten next round and never reaches the radix tree
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from sglang.srt.utils.common import async_h2d

from sglang_orthrus.core import RoundBatch, Verdict
from sglang_orthrus.grammar.batch import BegunMasks, BlockGrammars, CandidatesCopy, NextMasks, RepairedDrafts
from sglang_orthrus.grammar.cursor import Ids
from sglang_orthrus.metrics import RoundPath
from sglang_orthrus.passes.runner import DualViewRunner, Pass, PreparedPass
from sglang_orthrus.round.policy import RoundPlan
from sglang_orthrus.sampling.acceptance import accept_greedy, accept_nothing, in_a_row, with_bonus
from sglang_orthrus.sampling.batch import BatchSampler, KnownLogits
from sglang_orthrus.sampling.drafts import Drafts, draft_tokens
from sglang_orthrus.sampling.logit_adjustments import Adjustments, RowMasks
from sglang_orthrus.sampling.logprobs import RoundLogprobs
from sglang_orthrus.sampling.output_history import History
from sglang_orthrus.sampling.verification import (
    RankedTokens,
    best_tokens,
    likeliest_tokens,
    requests_with_known_best,
    verify_drafts,
)


class BegunRound(NamedTuple):
    """A round whose first pass is queued.

    Attributes:
        batch: the round's.
        width: Q.
        adjustments: what its requests' options do to logits.
        sampler: chooses its tokens.
        drafts: of the diffusion view.
        constrained: [R] rows of the requests whose grammars matter.
        candidates: theirs, on the way to the host; None if there are none, or nothing is drafted.
        prepared: the verify pass; None if another pass has done its work.
        verify: what it gave, if it is queued already: nothing was drafted, so that it waits for no grammar.
        path: how the draft pass ran.
        masks: behind committed texts, if they are begun already.
    """

    batch: RoundBatch
    width: int
    adjustments: Adjustments
    sampler: BatchSampler
    drafts: Drafts
    constrained: Sequence[int]
    candidates: CandidatesCopy | None
    prepared: PreparedPass | None
    verify: Pass | None
    path: RoundPath
    masks: BegunMasks | None = None


class RoundEnd(NamedTuple):
    """What a round came to.

    Attributes:
        verdict: what it commits.
        path: how it ran.
        logprobs: of what it emits, if a request wants them.
        is_wanted: whether any of its requests still ran.
        num_steps: that it took.
    """

    verdict: Verdict
    path: RoundPath
    logprobs: RoundLogprobs | None = None
    is_wanted: bool = True
    num_steps: int = 1


class Round:
    """Runs rounds.

    Args:
        passes: the forward passes.
        history: what running requests have emitted, as far as their options depend on it.
        grammars: of constrained requests.
        model_runner: SGLang's, whose model is an `OrthrusLM`.
        sampling_backend: SGLang's.
    """

    def __init__(
        self,
        passes: DualViewRunner,
        history: History,
        grammars: BlockGrammars,
        model_runner: Any,
        sampling_backend: str,
    ) -> None:
        self._passes = passes
        self._history = history
        self._grammars = grammars
        self._model_runner = model_runner
        self._sampling_backend = sampling_backend

    def run(self, batch: RoundBatch, plan: RoundPlan) -> RoundEnd:
        """A whole round, every step in one CUDA graph if it can be."""
        end = self._step(batch, plan)
        verdicts = [end.verdict]
        while end.is_wanted and len(verdicts) < plan.num_steps:
            batch = self._passes.next_step(batch, end.verdict)
            end = self._step(batch, plan)
            verdicts.append(end.verdict)
        return end if len(verdicts) == 1 else end._replace(verdict=in_a_row(verdicts), num_steps=len(verdicts))

    def _step(self, batch: RoundBatch, plan: RoundPlan) -> RoundEnd:
        fused = self._passes.fused(batch) if plan.may_fuse else None
        if fused is not None:
            return RoundEnd(accept_greedy(*fused, batch.prefix_lens), RoundPath.GRAPH)
        return self.finish(self.begin(batch, plan))

    def begin(
        self, batch: RoundBatch, plan: RoundPlan, grammar_barrier: Callable[[], None] | None = None
    ) -> BegunRound:
        """Queue the draft pass, and prepare all of verification that does not depend on the drafts.

        A round that drafts nothing verifies here: a GPU is busy while the scheduler takes in the former round's result.
        And with a barrier its masks are begun here: helpers fill them meanwhile.

        grammar_barrier: brings grammars to where the former round ended, once that is known.
        """
        adjustments, sampler, constrained = self._choosing(batch, self._model_runner.model)
        draft = self._passes.draft(batch) if plan.width > 1 else None
        candidates = None
        if draft is None:
            drafts = Drafts.blank(batch.anchors, 0)
        else:
            rows = draft.hidden_states[:, :-1]
            drafts = draft_tokens(sampler, rows, constrained, self._grammars.num_candidates)
            candidates = CandidatesCopy(drafts.candidates) if constrained else None

        prepared = self._passes.prepare_verify(batch, draft)
        verify = self._passes.verify(prepared, drafts.block) if draft is None else None
        path = RoundPath.SPLIT if draft is None or draft.replayed else RoundPath.EAGER
        begun = BegunRound(
            batch, plan.width, adjustments, sampler, drafts, constrained, candidates, prepared, verify, path
        )
        if draft is not None or not constrained or grammar_barrier is None:
            return begun
        grammar_barrier()
        return begun._replace(masks=self._begin_masks(begun))

    def choose(self, batch: RoundBatch, logits: torch.Tensor) -> RoundEnd:
        """A round that drafts nothing, behind a pass of the AR view over the anchors. logits: [bs, V], its own."""
        adjustments, sampler, constrained = self._choosing(batch, KnownLogits())
        drafts, verify = Drafts.blank(batch.anchors, 0), Pass(logits[:, None], replayed=True)
        return self.finish(
            BegunRound(batch, 1, adjustments, sampler, drafts, constrained, None, None, verify, RoundPath.MIXED)
        )

    def _choosing(self, batch: RoundBatch, model: Any) -> tuple[Adjustments, BatchSampler, Sequence[int]]:
        """How a round chooses tokens: see `BegunRound`. model: has the head."""
        scheduled = batch.scheduled
        adjustments = self._history.adjustments(scheduled)
        sampler = BatchSampler(model, scheduled, batch.anchors, adjustments, batch.width, self._sampling_backend)
        constrained = self._grammars.rows_of(scheduled.reqs) if scheduled.has_grammar else []
        return adjustments, sampler, constrained

    def finish(self, begun: BegunRound) -> RoundEnd:
        """Repair the drafts by grammars, which are at the committed text now; verify; accept."""
        batch, scheduled, drafts = begun.batch, begun.batch.scheduled, begun.drafts
        logprobs = _logprobs(begun)
        if all(req.finished() for req in scheduled.reqs):
            return RoundEnd(accept_nothing(drafts.block, batch.prefix_lens), begun.path, logprobs, is_wanted=False)

        repaired = self._repair(begun)
        if repaired is not None:
            drafts = drafts.replaced(repaired.rows, repaired.tokens)
        verify = begun.verify
        if verify is None:
            assert begun.prepared is not None, "nobody else has verified"
            verify = self._passes.verify(begun.prepared, drafts.block)
        # Verify needs no masks, and the masks no result of verify: the host fills them meanwhile.
        masks = self._masks(begun, drafts, repaired, verify)
        verdict = verify_drafts(begun.sampler, drafts, verify.hidden_states, masks.rows, logprobs, masks.limits)
        if masks.next is not None:
            verdict, logprobs = self._with_late_masks(begun, masks.next, verify, verdict, logprobs)

        self._history.extend(scheduled, begun.adjustments, drafts.block, verdict)
        return RoundEnd(verdict, begun.path if verify.replayed else RoundPath.EAGER, logprobs)

    def _repair(self, begun: BegunRound) -> RepairedDrafts | None:
        if begun.candidates is None:
            return None
        scheduled = begun.batch.scheduled
        vocab_size = scheduled.sampling_info.vocab_size
        return self._grammars.repair(scheduled.reqs, begun.constrained, begun.candidates, vocab_size)

    def _masks(self, begun: BegunRound, drafts: Drafts, repaired: RepairedDrafts | None, verify: Pass) -> _Masks:
        constrained = begun.constrained
        if not constrained:
            return _Masks()
        if repaired is None:
            found = self._grammars.finish_next_masks(begun.masks or self._begin_masks(begun))
            return _Masks(RowMasks(found.mask, constrained), None, found if found.late else None)
        best_of = partial(_best_of, begun.sampler, drafts, verify.hidden_states, constrained)
        filled = self._grammars.masks(repaired, _skippable(begun), best_of)
        return _Masks(RowMasks(filled.mask, constrained), _limits(filled.limits, constrained, drafts.tokens))

    def _begin_masks(self, begun: BegunRound) -> BegunMasks:
        """Of a round that drafts nothing."""
        scheduled, skippable = begun.batch.scheduled, _skippable(begun)
        if any(req.custom_logit_processor is not None for req in scheduled.reqs):
            skippable.clear()  # it would run twice
        vocab_size = scheduled.sampling_info.vocab_size
        return self._grammars.begin_next_masks(scheduled.reqs, begun.constrained, vocab_size, skippable)

    def _with_late_masks(
        self, begun: BegunRound, masks: NextMasks, verify: Pass, verdict: Verdict, logprobs: RoundLogprobs | None
    ) -> tuple[Verdict, RoundLogprobs | None]:
        """What is chosen once masks that were left out have been asked, and the log probabilities of that."""
        sampler, drafts, rows = begun.sampler, begun.drafts, begun.constrained

        def likeliest(numbers: Sequence[int], count: int) -> dict[int, RankedTokens]:
            by_row = {rows[number]: number for number in numbers}
            found = likeliest_tokens(sampler, drafts, verify.hidden_states, by_row, count)
            return {by_row[row]: ranked for row, ranked in found.items()}

        bonus = verdict.bonus.tolist()  # waits for verification, as a slow mask takes longer
        chosen = {number: bonus[rows[number]] for number in masks.late}
        instead = self._grammars.allowed_instead(masks, chosen, likeliest)
        if instead is not None:
            tokens = {rows[number]: token for number, token in instead.items()}
            return (with_bonus(verdict, tokens) if tokens else verdict), logprobs
        late = self._grammars.late_masks(masks, chosen)
        assert late is not None, "some refuse what was chosen"
        logprobs = _logprobs(begun)
        return verify_drafts(sampler, drafts, verify.hidden_states, RowMasks(late, rows), logprobs), logprobs


class _Masks(NamedTuple):
    """What grammars allow.

    Attributes:
        rows: after each row; None without grammars.
        limits: [bs] int64, the most drafts that may be accepted; None for all.
        next: masks of a round that drafts nothing, if some are left out.
    """

    rows: RowMasks | None = None
    limits: torch.Tensor | None = None
    next: NextMasks | None = None


def _skippable(begun: BegunRound) -> set[int]:
    """Constrained requests, by their numbers, whose masks may be missing if what is chosen is looked at."""
    reqs = begun.batch.scheduled.reqs
    # Log probabilities would show a missing mask.
    known = {row for row in requests_with_known_best(begun.sampler) if not reqs[row].return_logprob}
    return {number for number, row in enumerate(begun.constrained) if row in known}


def _logprobs(begun: BegunRound) -> RoundLogprobs | None:
    """For the log probabilities that its requests want; None if none does."""
    scheduled = begun.batch.scheduled
    return RoundLogprobs(scheduled, begun.width) if scheduled.return_logprob else None


def _best_of(
    sampler: BatchSampler,
    drafts: Drafts,
    hidden_states: torch.Tensor,
    constrained: Sequence[int],
    numbers: Sequence[int],
) -> Ids:
    """The best tokens of some of the constrained requests, given by their numbers among these: [n, Q]."""
    requests = [constrained[number] for number in numbers]
    return best_tokens(sampler, drafts, hidden_states, requests).cpu().numpy()[requests]


def _limits(of_constrained: Sequence[int], constrained: Sequence[int], tokens: torch.Tensor) -> torch.Tensor | None:
    """The most drafts that may be accepted: [bs] int64; None for all. tokens: [bs, Q-1] the drafts."""
    num_requests, num_drafts = tokens.shape
    if min(of_constrained) == num_drafts:
        return None
    limits = [num_drafts] * num_requests
    for row, limit in zip(constrained, of_constrained, strict=True):
        limits[row] = limit
    return async_h2d(limits, dtype=torch.int64, device=tokens.device)
