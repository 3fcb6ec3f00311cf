"""Rounds that end where masks are missing emit exactly the same. In the world of `test_verification`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_orthrus.sampling.drafts import Drafts
from tests.unit.test_verification import (
    FALSE_ALARM,
    FILTERS,
    WIDTH,
    Limits,
    _batch,
    _hash_on_cpu,
    _misfit,
    _misfit_of_chain,
    _round,
    _tables,
    _texts,
)

__all__ = ["_hash_on_cpu"]  # a fixture


def _best(drafts: Drafts) -> Drafts:
    """Propose the best tokens, as for constrained requests: nothing that is drawn at random."""
    best = _tables()[1].argmax(dim=-1).expand(len(drafts.block), -1)
    return drafts.replaced(slice(None), best)


# Where rounds are cut depends on their drafts and on time, on nothing that is drawn at random.
CUTS: dict[str, Limits] = {
    "first row": lambda drafts: torch.zeros(len(drafts.block), dtype=torch.int64),
    "second row": lambda drafts: torch.ones(len(drafts.block), dtype=torch.int64),
    "by drafts": lambda drafts: (drafts.block[:, 1] + drafts.block[:, 0]) % WIDTH,
    "by turns": lambda drafts: torch.arange(len(drafts.block)) % WIDTH,
}


def test_a_cut_round_is_exact_in_distribution() -> None:
    torch.manual_seed(0)
    options = FILTERS["top_k and top_p"]
    assert _misfit(_texts(options, 3000, 3, _best, limits=CUTS["by drafts"]), options) > FALSE_ALARM


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_round_under_a_grammar_is_exact_and_allowed(name: str) -> None:
    """Tokens 0, 2 and 3 are allowed."""
    torch.manual_seed(0)
    allowed = torch.tensor([True, False, True, True, False])
    texts = _texts({"temperature": 0.9}, 3000, 3, _best, limits=CUTS[name], allowed=allowed)
    chain = torch.softmax(_tables()[0].masked_fill(~allowed, float("-inf")) / 0.9, dim=-1)
    assert allowed[texts].all()
    assert _misfit_of_chain(texts, chain) > FALSE_ALARM


def test_rounds_of_any_width_under_a_grammar_are_exact_and_allowed() -> None:
    """Nothing to propose where nothing is drafted; otherwise some rounds are cut."""
    torch.manual_seed(0)
    allowed = torch.tensor([True, False, True, True, False])

    def propose(drafts: Drafts) -> Drafts:
        width = drafts.block.shape[1]
        best = _tables(width=width)[1].argmax(dim=-1)
        return drafts.replaced(slice(None), best.expand(len(drafts.block), -1))

    def limits(drafts: Drafts) -> torch.Tensor:
        return (torch.arange(len(drafts.block)) % WIDTH).clamp(max=drafts.tokens.shape[1])

    texts = _texts({"temperature": 0.9}, 3000, 3, propose, limits=limits, allowed=allowed, widths=(2, 1, 3, 32))
    chain = torch.softmax(_tables()[0].masked_fill(~allowed, float("-inf")) / 0.9, dim=-1)
    assert allowed[texts].all()
    assert _misfit_of_chain(texts, chain) > FALSE_ALARM


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_changes_no_seeded_or_greedy_text_and_no_round_is_longer(name: str) -> None:
    options: list[dict[str, Any]] = [
        {"top_k": 1},
        {"temperature": 1.5},
        {"top_p": 0.8, "temperature": 2.0},
        {"top_k": 3},
    ]
    seeds = torch.arange(40) % 5
    whole, cut = (_texts(options, 40, 9, seeds=seeds, limits=limits) for limits in (None, CUTS[name]))
    assert torch.equal(whole, cut)
    count = 200
    nothing = torch.zeros(count).long()
    verdict, drafts = _round(_batch([{}] * count, nothing), nothing, _tables(), _best, limits=CUTS[name])
    assert (verdict.accept_lens <= CUTS[name](drafts) + 1).all()
    assert torch.equal(verdict.new_seq_lens, verdict.accept_lens.long())
    last = verdict.accept_lens.long() - 1
    assert torch.equal(verdict.tokens.gather(1, last[:, None]).squeeze(1), verdict.bonus)
