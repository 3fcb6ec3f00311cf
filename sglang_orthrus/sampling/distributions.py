"""Distributions over next tokens, as pure tensor functions: how plain SGLang filters them, and how to sample exactly.

Letters: n rows, V vocabulary, K columns that a row can choose from; p what the autoregressive view gives, q what a
draft was drawn from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Columns of which `largest` takes the maximum first.
STRIPE = 64

# (probabilities [n, V], one parameter per row [n]) -> renormalised probabilities [n, V]
Renorm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Support:
    """What rows choose from.

    Attributes:
        weights: [n, K] fp32, at least 0, not all of a row 0; they need not sum to 1.
        ids: [n, K] int64, the token of each column; None if columns are token ids.
    """

    weights: torch.Tensor
    ids: torch.Tensor | None = None

    def probabilities(self, vocab_size: int) -> torch.Tensor:
        """By token id, summing to 1: [n, V] fp32."""
        weights = self.weights / self.weights.sum(dim=1, keepdim=True)
        if self.ids is None:
            return weights
        return weights.new_zeros(weights.shape[0], vocab_size).scatter_(1, self.ids, weights)

    def probability_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of one token per row: [n] int64 -> [n] fp32, 0 for a token that was filtered out."""
        if self.ids is None:
            weight = self.weights.gather(1, tokens[:, None]).squeeze(1)
        else:
            weight = torch.where(self.ids == tokens[:, None], self.weights, 0).sum(dim=1)
        return weight / self.weights.sum(dim=1)

    def draw(self) -> torch.Tensor:
        """One token per row: [n] int64."""
        column = draw(self.weights)
        return column if self.ids is None else self.ids.gather(1, column[:, None]).squeeze(1)

    def at(self, rows: torch.Tensor) -> Support:
        """The same for some of the rows."""
        return Support(self.weights[rows], None if self.ids is None else self.ids[rows])


def draw(weights: torch.Tensor) -> torch.Tensor:
    """A column of every row, with probability proportional to its weight: [n, K] -> [n] int64.

    The first of exponential waiting times with the weights as rates. No host synchronisation, which
    `torch.multinomial` needs on CUDA.
    """
    waits = torch.empty_like(weights).exponential_().clamp_min_(torch.finfo(weights.dtype).tiny)
    return (weights / waits).argmax(dim=1)


def sorted_support(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor, max_top_k: int | None
) -> Support:
    """What SGLang's `pytorch` sampling backend leaves: top-k and top-p of the same distribution, then min-p.

    A token counts towards top-p while the ones before it sum to at most top_p; min-p is relative to the first one.

    Args:
        probs: [n, V] probabilities.
        top_ks: [n] int; at least V for all tokens.
        top_ps: [n], 1 for all tokens.
        min_ps: [n], 0 for all tokens.
        max_top_k: at least every top_k, so that less need be sorted; None to sort everything.
    """
    if max_top_k is not None and max_top_k < probs.shape[1]:
        weights, ids = probs.topk(max_top_k, dim=1)
    else:
        weights, ids = probs.sort(dim=1, descending=True)
    before = weights.cumsum(dim=1) - weights
    rank = torch.arange(weights.shape[1], device=probs.device)
    dropped = (rank >= top_ks[:, None]) | (before > top_ps[:, None]) | (weights < weights[:, :1] * min_ps[:, None])
    return Support(weights.masked_fill_(dropped, 0), ids)


def joint_support(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, top_k_renorm: Renorm, top_p_renorm: Renorm
) -> Support:
    """What SGLang's `flashinfer` sampling backend leaves without min-p: tokens inside top-k and top-p of `probs`.

    Shapes as in `sorted_support`; the renorm functions decide about ties.
    """
    kept = top_p_renorm(probs, top_ps) > 0
    return Support(torch.where(kept, top_k_renorm(probs, top_ks), 0))


def sequential_support(
    probs: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    top_k_renorm: Renorm,
    top_p_renorm: Renorm,
) -> Support:
    """What SGLang's `flashinfer` sampling backend leaves with min-p: top-k, then top-p of that, then min-p of that."""
    weights = top_p_renorm(top_k_renorm(probs, top_ks), top_ps)
    return Support(torch.where(weights < weights.amax(dim=1, keepdim=True) * min_ps[:, None], 0, weights))


def is_accepted(p_of_draft: torch.Tensor, q_of_draft: torch.Tensor, coins: torch.Tensor) -> torch.Tensor:
    """Accept a draft with probability min(1, p/q): three tensors of one shape, coins in [0, 1) -> bool.

    A draft that was not drawn at random has q = 1.
    """
    return coins * q_of_draft < p_of_draft


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What to draw from in place of a rejected draft: max(p - q, 0), not normalised.

    p, q: [n, V], probabilities that sum to 1. The q of a draft that was not drawn at random is one-hot on
    it; after the last draft of a block q is 0.
    """
    rest = (p - q).clamp_min_(0)
    # A draft is hardly ever rejected where q equals p, and then only rounding is left of the difference.
    return torch.where(rest.sum(dim=1, keepdim=True) > 0, rest, p)


def largest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids of the largest logits, largest first; which of equal ones is open: [..., V] -> [..., count] int64.

    `torch.topk` reads rows of a large vocabulary many times. The largest logits lie in as many stripes of columns at
    most, and in those with the largest maxima: so one reading finds the stripes, and the rest is small. A stripe takes
    every n-th column, since maxima over neighbours are slow on a GPU.
    """
    if logits.shape[-1] % STRIPE or logits.shape[-1] // STRIPE <= count:
        return logits.topk(count, dim=-1).indices
    stripes = logits.unflatten(-1, (STRIPE, -1))
    best = stripes.amax(dim=-2).topk(count, dim=-1).indices
    values = stripes.gather(-1, best[..., None, :].expand(*best.shape[:-1], STRIPE, count)).flatten(-2)
    column = values.topk(count, dim=-1).indices
    return column // count * stripes.shape[-1] + best.gather(-1, column % count)
