"""The head over batches in which some requests are constrained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask

from sglang_orthrus import heads
from sglang_orthrus.heads import best_allowed, best_and_candidates

WIDTH, HIDDEN, VOCABULARY = 3, 5, 64


class Bits:
    """A grammar's way to apply masks; here [rows, VOCABULARY] booleans."""

    @staticmethod
    def apply_vocab_mask(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
        logits.masked_fill_(~vocab_mask, float("-inf"))


def model() -> Any:
    head = torch.randn(HIDDEN, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(logits=lambda hidden: hidden.reshape(-1, HIDDEN) @ head)


@pytest.mark.parametrize("rows", [[0], [2], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("head_rows", [1, 6, 9, 512])
def test_only_constrained_rows_are_masked(rows: list[int], head_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "HEAD_ROWS", head_rows)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(5, WIDTH, HIDDEN, generator=generator)
    logits = model().logits(hidden).view(5, WIDTH, VOCABULARY)

    best, candidates = best_and_candidates(model(), hidden, rows, 4)
    assert torch.equal(best, logits.argmax(-1))
    assert torch.equal(candidates, logits[rows].topk(4).indices)

    allowed = torch.rand(len(rows) * WIDTH, VOCABULARY, generator=generator) < 0.2
    expected = logits.clone()
    expected[rows] = expected[rows].masked_fill(~allowed.view(-1, WIDTH, VOCABULARY), float("-inf"))
    assert torch.equal(best_allowed(model(), hidden, rows, GrammarMask(Bits(), allowed)), expected.argmax(-1))
