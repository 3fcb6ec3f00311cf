"""The state that requests carry between rounds, as the scheduler filters and merges it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from sglang_orthrus.core import OrthrusBlockInput, OrthrusState, Phase, View, view_of


def _state(anchors: list[int], lens: list[int]) -> OrthrusState:
    return OrthrusState(torch.tensor(anchors), torch.tensor(lens))


def test_requests_leave_and_join_with_their_anchors() -> None:
    state = _state([1, 2, 3], [10, 20, 30])
    state.filter_batch(torch.tensor([2, 0]))
    state.merge_batch(_state([9], [90]))
    assert state.bonus_tokens.tolist() == [3, 1, 9]
    assert state.new_seq_lens.tolist() == [30, 10, 90]


def test_under_overlap_only_the_relay_indices_move() -> None:
    state, other = _state([0], [0]), _state([0], [0])
    state.future_indices, other.future_indices = torch.tensor([4, 5, 6]), torch.tensor([7])
    state.filter_batch(torch.tensor([1]))
    state.merge_batch(other)
    assert state.future_indices.tolist() == [5, 7]


def test_sglang_takes_the_state_for_a_draft_input_and_a_block_for_a_verify_input() -> None:
    block = OrthrusBlockInput(torch.zeros(4), torch.zeros(4), draft_token_num=2)
    assert _state([1], [1]).is_draft_input()
    assert block.is_verify_input()
    assert block.num_tokens_per_req == 2


def test_every_pass_but_a_draft_is_autoregressive() -> None:
    draft = OrthrusBlockInput(torch.zeros(4), torch.zeros(4), draft_token_num=2, phase=Phase.DRAFT)
    verify = OrthrusBlockInput(torch.zeros(4), torch.zeros(4), draft_token_num=2)
    assert view_of(SimpleNamespace(spec_info=draft)) is View.DIFFUSION
    assert view_of(SimpleNamespace(spec_info=verify)) is View.AR
    assert view_of(SimpleNamespace(spec_info=None)) is View.AR
    assert view_of(SimpleNamespace(spec_info=_state([1], [1]))) is View.AR
