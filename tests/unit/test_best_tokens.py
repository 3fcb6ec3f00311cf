"""The greedy choice of block rows, from a head that says what the test wants."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs

from sglang_orthrus.models import orthrus
from sglang_orthrus.models.orthrus import OrthrusLM

VOCABULARY = 5


def best_tokens(logits: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Of rows whose hidden states are their numbers. logits: [rows, padded vocabulary]."""

    def head(rows: torch.Tensor, lm_head: Any) -> torch.Tensor:
        return logits[rows.squeeze(1).long()].clone()

    model: Any = SimpleNamespace(
        logits_processor=SimpleNamespace(_compute_lm_head=head),
        config=SimpleNamespace(vocab_size=VOCABULARY),
        lm_head=None,
    )
    model._head = partial(OrthrusLM._head, model)
    return OrthrusLM.best_tokens(model, torch.arange(float(len(logits))).view(*shape, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_in_pieces_without_padding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces smaller than the rows; the largest logit of all stands in the head's padding."""
    monkeypatch.setattr(orthrus, "HEAD_ROWS", 2)
    logits = torch.zeros(6, VOCABULARY + 3, dtype=dtype)
    wanted = torch.tensor([[4, 0, 2], [1, 3, 0]])
    logits[torch.arange(6), wanted.flatten()] = 1
    logits[:, VOCABULARY:] = 9
    assert torch.equal(best_tokens(logits, (2, 3)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_nan_is_chosen_where_sglang_sanitises(dtype: torch.dtype) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[nan, 1, 2, nan, 0], [-inf, nan, -5, -inf, nan], [0, inf, nan, 1, 2]], dtype=dtype)
    with envs.SGLANG_SANITIZE_NAN_LOGITS.override(True):
        assert best_tokens(logits, (3,)).tolist() == [2, 2, 1]
    # By default SGLang takes what argmax takes.
    assert best_tokens(logits, (3,)).tolist() == logits.argmax(dim=1).tolist()
