"""Fills the blocks of a round with the diffusion view's tokens, and keeps how likely each was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sglang_orthrus import ranks
from sglang_orthrus.core import rows_index
from sglang_orthrus.sampling.batch import BatchSampler
from sglang_orthrus.sampling.distributions import Support, largest
from sglang_orthrus.sampling.request_groups import RequestGroup

# Distributions of drafts are kept until they are verified if they are no larger than this (fp32, or fp32 and int64 with
# top-k). A larger one is computed again from the hidden state, and only where a draft was rejected.
KEPT_COLUMNS = 1024
KEPT_ROWS = 128


@dataclass(slots=True)
class Drafts:
    """What a round's block was filled with, and how likely that was.

    Attributes:
        block: [bs, Q] int64, the anchors and the drafts.
        q: [bs, Q-1] fp32, the probability with which each draft was drawn; 1 where it was not drawn at random.
        is_certain: [bs, Q-1] bool, where a token was not drawn at random: q is one-hot there.
        are_drawn: whether any was drawn at random.
        hidden_states: [bs, Q-1, hidden] of the diffusion view, to compute q again; None if that is not needed.
        supports: the distributions of the rows of some groups, by the group's requests.
        candidates: [R, Q-1, K] int64, of the requests that were asked for, their best tokens in every position, best
            first; where a seed acts, its choice is the first. R may be 0.
    """

    block: torch.Tensor
    q: torch.Tensor
    is_certain: torch.Tensor
    candidates: torch.Tensor
    are_drawn: bool = False
    hidden_states: torch.Tensor | None = None
    supports: dict[tuple[int, ...], Support] = field(default_factory=dict)

    @classmethod
    def blank(cls, anchors: torch.Tensor, num_drafts: int, num_asked: int = 0, num_candidates: int = 1) -> Drafts:
        """Blocks whose drafts are still to be chosen; whole if there are none.

        Args:
            anchors: [bs] int64.
            num_drafts: Q-1.
            num_asked: R.
            num_candidates: K.
        """
        shape = (len(anchors), num_drafts)
        return cls(
            block=torch.cat((anchors[:, None], anchors.new_empty(shape)), dim=1),
            q=torch.ones(shape, device=anchors.device),
            is_certain=torch.ones(shape, dtype=torch.bool, device=anchors.device),
            candidates=anchors.new_empty(num_asked, num_drafts, num_candidates),
        )

    @property
    def tokens(self) -> torch.Tensor:
        """[bs, Q-1] int64, a view of the block."""
        return self.block[:, 1:]

    def replaced(self, where: Any, tokens: torch.Tensor) -> Drafts:
        """The same drafts with other tokens in some positions, chosen by a rule, such as a grammar.

        NOTE: `where` must not depend on what was drawn: a rule that replaces some draws and lets others be would
        need the distribution of the draws that it lets be.

        where: an index into [bs, Q-1], such as the rows of some requests, by `rows_index`; tokens: int64, of the
            shape that it selects.
        """
        if not tokens.numel():
            return self
        block = self.block.clone()
        block[:, 1:][where] = tokens
        q, is_certain = self.q, self.is_certain
        if self.are_drawn:
            q, is_certain = q.clone(), is_certain.clone()
            q[where] = 1.0
            is_certain[where] = True
        return Drafts(block, q, is_certain, self.candidates, self.are_drawn, self.hidden_states, self.supports)


def draft_tokens(
    sampler: BatchSampler, hidden_states: torch.Tensor, candidates_of: Sequence[int] = (), num_candidates: int = 1
) -> Drafts:
    """Fill the blocks.

    Args:
        sampler: of the round.
        hidden_states: [bs, Q-1, hidden], rows 0..Q-2 of the diffusion view; Q is 1 if nothing is drafted.
        candidates_of: [R] requests for which candidates are wanted, ascending.
        num_candidates: K.
    """
    num_drafts, anchors = hidden_states.shape[1], sampler.anchors
    drafts = Drafts.blank(anchors, num_drafts, len(candidates_of), num_candidates)
    if not num_drafts:
        return drafts
    slots = {request: slot for slot, request in enumerate(candidates_of)}
    context = sampler.draft_context(torch.arange(num_drafts, device=anchors.device))
    for group in sampler.groups:
        # The logits are gone before the next ones are made.
        _draft_group(sampler, drafts, group, sampler.logits(hidden_states, group, context), slots)
    if drafts.are_drawn:
        ranks.from_first(drafts.block)
    if any(
        not sampler.is_function_of_logits(group) and group.requests not in drafts.supports for group in sampler.groups
    ):
        # Verify overwrites hidden states where it replays a graph.
        drafts.hidden_states = hidden_states.clone()
    return drafts


def _draft_group(
    sampler: BatchSampler, drafts: Drafts, group: RequestGroup, logits: torch.Tensor, slots: dict[int, int]
) -> None:
    tokens = drafts.tokens
    own = [(number, slots[request]) for number, request in enumerate(group.requests) if request in slots]
    if own:
        numbers, rows = (rows_index(indices, logits.device) for indices in zip(*own, strict=True))
        drafts.candidates[rows] = largest(logits[numbers], drafts.candidates.shape[2])
    if group.kind.is_greedy and len(own) == len(group.requests):
        tokens[group.index] = drafts.candidates[rows, :, 0]
    elif sampler.is_function_of_logits(group):
        chosen = sampler.predictions(logits, group)
        tokens[group.index] = chosen
        if own:
            drafts.candidates[rows, :, 0] = chosen[numbers]
    else:
        drafts.are_drawn = True
        support = sampler.support(logits, group)
        drawn = support.draw()
        tokens[group.index] = drawn.view(-1, tokens.shape[1])
        drafts.q[group.index] = support.probability_of(drawn).view(-1, tokens.shape[1])
        drafts.is_certain[group.index] = False
        if support.weights.shape[1] <= KEPT_COLUMNS or tokens.numel() <= KEPT_ROWS:
            drafts.supports[group.requests] = support
