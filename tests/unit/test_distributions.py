"""What filters leave, against SGLang's own and against plain definitions; and why rejection sampling is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from sglang_orthrus.sampling.distributions import (
    STRIPE,
    Support,
    draw,
    is_accepted,
    joint_support,
    largest,
    residual,
    sequential_support,
    sorted_support,
)
from tests.sampling import top_k_renorm, top_p_renorm

VOCAB = 40


def _probs(rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2.5 * torch.randn(rows, VOCAB, generator=generator), dim=-1)


def _filters() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every combination of some values, a row each: top_ks, top_ps, min_ps."""
    rows = list(itertools.product((TOP_K_ALL, 1, 3, 12, VOCAB), (1.0, 0.95, 0.5, 1e-6), (0.0, 0.05, 0.6)))
    top_ks, top_ps, min_ps = zip(*rows, strict=True)
    return torch.tensor(top_ks, dtype=torch.int32), torch.tensor(top_ps), torch.tensor(min_ps)


def test_the_pytorch_filters_leave_what_sglang_leaves() -> None:
    top_ks, top_ps, min_ps = _filters()
    probs = _probs(len(top_ks))
    support = sorted_support(probs, top_ks, top_ps, min_ps, None)
    _, weights, ids, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        probs, top_ks, top_ps, min_ps, True, None, torch.zeros(len(top_ks)), return_filtered_probs=True
    )
    assert torch.equal(support.weights, weights)
    assert support.ids is not None and torch.equal(support.ids, ids.long())


def test_sorting_no_more_than_top_k_changes_nothing() -> None:
    top_ks, top_ps, min_ps = (x[_filters()[0] < VOCAB] for x in _filters())
    probs = _probs(len(top_ks))
    whole = sorted_support(probs, top_ks, top_ps, min_ps, None).probabilities(VOCAB)
    short = sorted_support(probs, top_ks, top_ps, min_ps, 12)
    assert short.weights.shape[1] == 12
    torch.testing.assert_close(short.probabilities(VOCAB), whole)


def test_the_flashinfer_filters_are_joint_without_min_p_and_sequential_with_it() -> None:
    top_ks, top_ps, min_ps = _filters()
    probs = _probs(len(top_ks))
    joint = joint_support(probs, top_ks, top_ps, top_k_renorm, top_p_renorm).probabilities(VOCAB)
    sequential = sequential_support(probs, top_ks, top_ps, min_ps, top_k_renorm, top_p_renorm).probabilities(VOCAB)
    for row in range(len(top_ks)):
        order = probs[row].sort(descending=True).indices.tolist()
        mass, within_p = 0.0, set()
        for token in order:
            if mass < float(top_ps[row]):
                within_p.add(token)
            mass += float(probs[row, token])
        within_k = set(order[: int(top_ks[row])])
        assert set(joint[row].nonzero().flatten().tolist()) == within_p & within_k
        # top-p of what top-k leaves lets fewer tokens in than top-p of everything.
        assert set(sequential[row].nonzero().flatten().tolist()) <= within_p & within_k
    assert (joint > 0).sum() > (sequential > 0).sum()


@pytest.mark.parametrize("ids", [None, torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))])
def test_a_support_knows_its_probabilities_by_token(ids: torch.Tensor | None) -> None:
    weights = 3 * _probs(5)
    weights[:, 7] = 0
    support = Support(weights, None if ids is None else ids.expand(5, -1))
    probabilities = support.probabilities(VOCAB)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))
    for token in range(VOCAB):
        torch.testing.assert_close(support.probability_of(torch.full((5,), token)), probabilities[:, token])
    assert (probabilities.gather(1, support.draw()[:, None]) > 0).all()


def test_draws_follow_the_weights() -> None:
    """Chi-square over 200,000 draws, fixed seed; a correct function fails with probability 1e-6."""
    torch.manual_seed(0)
    weights = 7 * _probs(1)[:, :8]
    weights[0, 3] = 0
    counts = draw(weights.expand(200_000, -1)).bincount(minlength=8)
    expected = 200_000 * weights[0] / weights.sum()
    assert counts[3] == 0
    kept = expected > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert statistic < 38.3  # chi-square, 6 degrees of freedom


def _emitted(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The distribution of what follows from a draft drawn from q, the coin taken over a grid: [V]"""
    coins = (torch.arange(4000) + 0.5) / 4000
    accepts = torch.stack(
        [is_accepted(p[token].expand(4000), q[token].expand(4000), coins).float().mean() for token in range(len(p))]
    )
    rest = residual(p[None], q[None])[0]
    return q * accepts + (q * (1 - accepts)).sum() * rest / rest.sum()


@pytest.mark.parametrize("seed", range(8))
def test_what_is_emitted_follows_p_whatever_q_is(seed: int) -> None:
    p, q = _probs(2, seed)
    p = torch.where(p > 0.01, p, 0) / torch.where(p > 0.01, p, 0).sum()
    one_hot = torch.zeros_like(q)
    one_hot[seed] = 1.0
    for proposal in (q, one_hot, p):
        torch.testing.assert_close(_emitted(p, proposal), p, atol=5e-4, rtol=0)


def test_where_q_equals_p_the_residual_is_p() -> None:
    p = _probs(3)
    assert torch.equal(residual(p, p), p)


@pytest.mark.parametrize("vocab_size", [640, 1280, 1281])
@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_largest_are_those_of_a_sort(vocab_size: int, count: int) -> None:
    """In several stripes and in one, and in a vocabulary that no stripes fit."""
    generator = torch.Generator().manual_seed(vocab_size + count)
    logits = torch.randn(2, 5, vocab_size, generator=generator)
    logits[0, 0, 128:256] += 100
    logits[0, 1, :: vocab_size // STRIPE] += 100  # more in one stripe than are wanted
    assert torch.equal(largest(logits, count), logits.argsort(dim=-1, descending=True)[..., :count])
    bound = logits.masked_fill(logits < 2, float("-inf"))
    found = bound.gather(-1, largest(bound, count))
    assert torch.equal(found, bound.sort(dim=-1, descending=True).values[..., :count])
