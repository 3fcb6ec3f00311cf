"""The layout of a draft block."""

from __future__ import annotations

import pytest
import torch

from sglang_orthrus.passes.blocks import draft_block

MASK = 77


@pytest.mark.parametrize("width", [1, 4])
def test_a_block_starts_at_the_anchor_and_uses_the_slots_behind_the_prefix(width: int) -> None:
    req_to_token = torch.arange(3 * 20, dtype=torch.int32).view(3, 20) + 1000
    block = draft_block(
        torch.tensor([5, 6]),
        torch.tensor([4, 11]),
        torch.tensor([2, 0], dtype=torch.int32),
        req_to_token,
        width=width,
        mask_token_id=MASK,
    )
    ids = [[5, MASK, MASK, MASK], [6, MASK, MASK, MASK]]
    positions = [[4, 5, 6, 7], [11, 12, 13, 14]]
    slots = [[1044, 1045, 1046, 1047], [1011, 1012, 1013, 1014]]
    for tensor, rows in zip(block, (ids, positions, slots), strict=True):
        assert tensor.tolist() == [row[:width] for row in rows]
        assert tensor.dtype == torch.int64
