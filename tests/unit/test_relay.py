"""Lengths come to the host when they are asked for, from the round that published them last."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_orthrus.algorithm import OrthrusAlgorithm
from sglang_orthrus.relay import LateLens
from sglang_orthrus.spec_input import OrthrusBlockInput, OrthrusState, bring_lens_to_host


def _relay(plans_on_host: bool = True) -> LateLens:
    pool = SimpleNamespace(req_to_token=torch.zeros(6, 8, dtype=torch.int32), req_generation=None)
    algorithm: Any = OrthrusAlgorithm.__new__(OrthrusAlgorithm)
    return LateLens("cpu", algorithm, pool, plans_on_host, needs_confidence_relay=False)


def _batch(rows: list[int]) -> Any:
    state = OrthrusState(torch.zeros(len(rows)), torch.zeros(len(rows)))
    state.future_indices = torch.tensor(rows)
    return SimpleNamespace(spec_info=state, seq_lens=None, seq_lens_cpu=torch.zeros(1), seq_lens_sum=1)


def test_the_batch_takes_its_lengths_from_the_last_round_and_the_host_gets_them_later() -> None:
    relay = _relay()
    relay.new_seq_lens_buf[:] = torch.tensor([0, 11, 12, 13, 14, 15])
    batch = _batch([4, 1])
    relay.resolve_seq_lens_cpu(batch)
    assert batch.seq_lens.tolist() == [14, 11]
    assert batch.seq_lens_cpu is None
    assert relay.host_lens(torch.tensor([4, 1])).tolist() == [14, 11]


def test_a_backend_that_plans_on_the_device_costs_no_copy() -> None:
    relay = _relay(plans_on_host=False)
    relay.new_seq_lens_buf[:] = 5
    batch = _batch([2])
    relay.resolve_seq_lens_cpu(batch)
    assert batch.seq_lens.tolist() == [5]
    assert relay.new_seq_lens_cpu_pinned is None


def test_planners_get_the_lengths_with_the_block_and_only_once() -> None:
    asked = []

    def lens() -> torch.Tensor:
        asked.append(1)
        return torch.tensor([3, 40])

    block = OrthrusBlockInput(torch.zeros(8), torch.zeros(8), draft_token_num=4, host_lens=lens)
    forward_batch: Any = SimpleNamespace(spec_info=block, seq_lens_cpu=None, seq_lens_sum=None)
    bring_lens_to_host(forward_batch)
    bring_lens_to_host(forward_batch)
    assert forward_batch.seq_lens_cpu.tolist() == [7, 44]
    assert forward_batch.seq_lens_sum == 51
    assert len(asked) == 1


def test_passes_without_a_block_are_left_alone() -> None:
    forward_batch: Any = SimpleNamespace(spec_info=None, seq_lens_cpu=None)
    bring_lens_to_host(forward_batch)
    assert forward_batch.seq_lens_cpu is None
