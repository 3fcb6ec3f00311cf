"""Decides what a round emits: what the autoregressive view makes of its drafts.

Where tokens are a function of the logits and the position, a draft counts if the autoregressive view would have chosen
it, too. Where they are drawn at random, drafts are accepted by rejection sampling.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from sglang_orthrus import ranks
from sglang_orthrus.core import Verdict
from sglang_orthrus.sampling.acceptance import accept_drafts, leading
from sglang_orthrus.sampling.batch import BatchSampler
from sglang_orthrus.sampling.distributions import draw, is_accepted, residual
from sglang_orthrus.sampling.drafts import Drafts
from sglang_orthrus.sampling.logit_adjustments import RowMasks
from sglang_orthrus.sampling.logprobs import RoundLogprobs
from sglang_orthrus.sampling.request_groups import RequestGroup


class RankedTokens(NamedTuple):
    """Tokens and their logits, the largest first."""

    logits: Sequence[float]
    tokens: Sequence[int]


def verify_drafts(
    sampler: BatchSampler,
    drafts: Drafts,
    hidden_states: torch.Tensor,
    masks: RowMasks | None = None,
    logprobs: RoundLogprobs | None = None,
    limits: torch.Tensor | None = None,
) -> Verdict:
    """Decide what the round emits.

    Args:
        sampler: of the round.
        drafts: the block, and how it came about.
        hidden_states: [bs, Q, hidden] of the autoregressive view.
        masks: what grammars allow after each row.
        logprobs: takes the log probabilities of what is emitted.
        limits: [bs] int64, the most drafts that may be accepted of each request, where masks are missing behind them.
            They must not depend on anything that is drawn at random.
    """
    block, anchors = drafts.block, sampler.anchors
    num_accepted, bonus = torch.zeros_like(anchors), torch.empty_like(anchors)
    context = sampler.verify_context(block)
    if limits is None:
        limits = torch.full_like(anchors, block.shape[1] - 1)
    for group in sampler.groups:
        index = group.index
        logits = sampler.logits(hidden_states, group, context, masks)
        if sampler.is_function_of_logits(group):
            predictions = sampler.predictions(logits, group)
            if block.shape[1] > 1:
                accepted = leading(block[index][:, 1:] == predictions[:, :-1]).minimum(limits[index])
                num_accepted[index] = accepted
                predictions = predictions.gather(1, accepted[:, None])
            bonus[index] = predictions.squeeze(1)
        else:
            num_accepted[index], bonus[index] = _reject(sampler, logits, group, drafts, limits)
        if logprobs is not None and logprobs.wants(group):
            emitted = block[index].roll(-1, dims=1)
            emitted.scatter_(1, num_accepted[index][:, None], bonus[index][:, None])
            logprobs.add(group, logits.flatten(0, 1), sampler.temperatures(group, emitted.numel()), emitted)
        del logits  # before the next ones are made
    if ranks.are_several():
        num_accepted, bonus = ranks.from_first(torch.stack((num_accepted, bonus)))
    return accept_drafts(block, num_accepted, bonus, sampler.prefix_lens)


def requests_with_known_best(sampler: BatchSampler) -> frozenset[int]:
    """Requests of which `best_tokens` may be asked: greedy ones, where no custom processor would run twice."""
    return frozenset(
        request
        for group in sampler.groups
        if group.kind.is_greedy and all(sampler.reqs[other].custom_logit_processor is None for other in group.requests)
        for request in group.requests
    )


def best_tokens(
    sampler: BatchSampler, drafts: Drafts, hidden_states: torch.Tensor, requests: Collection[int]
) -> torch.Tensor:
    """What verification would choose after every row of some requests without masks: [bs, Q] int64, 0 of others.

    The head runs over whole groups, as it does there: over other rows its results differ in the last bits.
    """
    best = torch.zeros_like(drafts.block)
    context = sampler.verify_context(drafts.block)
    for group in sampler.groups:
        if not set(requests).isdisjoint(group.requests):
            best[group.index] = sampler.logits(hidden_states, group, context).argmax(dim=-1)
    return best


def likeliest_tokens(
    sampler: BatchSampler, drafts: Drafts, hidden_states: torch.Tensor, requests: Collection[int], count: int
) -> dict[int, RankedTokens]:
    """So many tokens that verification would choose first after the first row of some requests, without masks.

    See `best_tokens`. Among equal logits the order is any.
    """
    found = dict[int, RankedTokens]()
    context = sampler.verify_context(drafts.block)
    for group in sampler.groups:
        if not set(requests).isdisjoint(group.requests):
            # Of all its requests: to pick some first would copy their logits.
            logits = sampler.logits(hidden_states, group, context)[:, 0]
            best, tokens = logits.topk(min(count, logits.shape[1]))
            ranked = zip(group.requests, map(RankedTokens, best.tolist(), tokens.tolist()), strict=True)
            found.update((request, own) for request, own in ranked if request in requests)
    return found


def _reject(
    sampler: BatchSampler, logits: torch.Tensor, group: RequestGroup, drafts: Drafts, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection sampling over a group's rows, [r, Q, V]: accepted drafts and the token after them, both [r]."""
    requests, width, vocab_size = logits.shape
    p = sampler.support(logits, group)
    if width == 1:
        return torch.zeros_like(limits[group.index]), p.draw()
    p_of_draft = p.probability_of(drafts.block[group.index].roll(-1, dims=1).flatten()).view(requests, width)[:, :-1]
    accepted = leading(is_accepted(p_of_draft, drafts.q[group.index], torch.rand_like(p_of_draft)))
    # The draft behind the limit does not count, whatever its coin: the token there is drawn from p.
    limit = limits[group.index]
    accepted = accepted.minimum(limit)
    first = torch.arange(requests, device=logits.device)
    p_after = p.at(first * width + accepted).probabilities(vocab_size)
    q_after = torch.where((accepted < limit)[:, None], _q_after(sampler, group, drafts, accepted, vocab_size), 0)
    return accepted, draw(residual(p_after, q_after))


def _q_after(
    sampler: BatchSampler, group: RequestGroup, drafts: Drafts, accepted: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """The distribution of every request's first rejected draft, if there is one. accepted: [r] -> [r, V]"""
    num_drafts = drafts.tokens.shape[1]
    row = accepted.clamp(max=num_drafts - 1)[:, None]
    support = drafts.supports.get(group.requests)
    if support is not None:
        first = torch.arange(row.shape[0], device=row.device)
        q = support.at(first * num_drafts + row.squeeze(1)).probabilities(vocab_size)
    else:
        assert drafts.hidden_states is not None, "kept whenever a distribution was not"
        states = drafts.hidden_states[group.index]
        states = states.gather(1, row[:, :, None].expand(-1, -1, states.shape[2]))
        q = sampler.support(sampler.draft_logits_at(states, group, row), group).probabilities(vocab_size)
    is_certain = drafts.is_certain[group.index].gather(1, row)
    one_hot = torch.zeros_like(q).scatter_(1, drafts.tokens[group.index].gather(1, row), 1.0)
    return torch.where(is_certain, one_hot, q)
