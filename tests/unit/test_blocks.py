"""The layout of a draft block."""

from __future__ import annotations

import torch

from sglang_orthrus.passes.blocks import draft_block

MASK = 77


def test_a_block_starts_at_the_anchor_and_uses_the_slots_behind_the_prefix() -> None:
    req_to_token = torch.arange(3 * 20, dtype=torch.int32).view(3, 20) + 1000
    block = draft_block(
        torch.tensor([5, 6]),
        torch.tensor([4, 11]),
        torch.tensor([2, 0], dtype=torch.int32),
        req_to_token,
        width=4,
        mask_token_id=MASK,
    )
    assert block.ids.tolist() == [[5, MASK, MASK, MASK], [6, MASK, MASK, MASK]]
    assert block.positions.tolist() == [[4, 5, 6, 7], [11, 12, 13, 14]]
    assert block.slots.tolist() == [[1044, 1045, 1046, 1047], [1011, 1012, 1013, 1014]]
    assert {tensor.dtype for tensor in block} == {torch.int64}


def test_a_block_of_one_token_is_the_anchor() -> None:
    req_to_token = torch.arange(3 * 20, dtype=torch.int32).view(3, 20) + 1000
    block = draft_block(
        torch.tensor([5, 6]),
        torch.tensor([4, 11]),
        torch.tensor([2, 0], dtype=torch.int32),
        req_to_token,
        width=1,
        mask_token_id=MASK,
    )
    assert [tensor.tolist() for tensor in block] == [[[5], [6]], [[4], [11]], [[1044], [1011]]]
    assert {tensor.dtype for tensor in block} == {torch.int64}
