"""A round for some requests of a batch: SGLang's own filter works on a copy, and the scheduler's batch stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_orthrus.core import OrthrusState
from sglang_orthrus.round.ended_rows import with_rows

pytestmark = pytest.mark.contract

LENS = torch.tensor([10, 20, 30, 40])


def request(number: int) -> Any:
    return SimpleNamespace(
        rid=number,
        grammar=None,
        return_logprob=False,
        beam_group=None,
        return_hidden_states_mode=CaptureHiddenMode.NULL,
    )


def batch() -> ScheduleBatch:
    column = torch.arange(4.0)[:, None]
    info = SamplingBatchInfo(
        temperatures=column,
        top_ps=column[:, 0],
        top_ks=torch.arange(4),
        min_ps=column[:, 0],
        is_all_greedy=False,
        is_any_greedy=True,
        need_top_p_sampling=True,
        need_top_k_sampling=True,
        need_min_p_sampling=False,
        vocab_size=64,
        sampling_seed=torch.arange(4),
    )
    found = ScheduleBatch(
        reqs=[request(number) for number in range(4)],
        req_pool_indices=torch.arange(1, 5),
        req_pool_indices_cpu=torch.arange(1, 5),
        seq_lens=LENS,
        seq_lens_cpu=LENS,
        orig_seq_lens=LENS,
        device="cpu",
        spec_algorithm=SimpleNamespace(is_none=lambda: False),
        model_config=SimpleNamespace(is_encoder_decoder=False),
        sampling_info=info,
    )
    # As between two rounds under overlap scheduling.
    found.spec_info = OrthrusState(torch.arange(4) + 50, LENS, future_indices=torch.arange(1, 5))
    return found


def test_a_round_has_the_rows_that_are_left() -> None:
    whole = batch()
    before = dict(vars(whole)), dict(vars(whole.sampling_info)), dict(vars(whole.spec_info))
    own = with_rows(whole, [0, 3])
    assert [req.rid for req in own.reqs] == [0, 3]
    assert own.seq_lens.tolist() == own.seq_lens_cpu.tolist() == own.orig_seq_lens.tolist() == [10, 40]
    assert own.req_pool_indices.tolist() == own.req_pool_indices_cpu.tolist() == [1, 4]
    assert own.spec_info.bonus_tokens.tolist() == [50, 53] and own.spec_info.new_seq_lens.tolist() == [10, 40]
    info = own.sampling_info
    assert info.temperatures.tolist() == [[0.0], [3.0]] and info.sampling_seed.tolist() == [0, 3]
    assert before == (vars(whole), vars(whole.sampling_info), vars(whole.spec_info)), "the same objects"
    assert whole.seq_lens.tolist() == LENS.tolist() and len(whole.reqs) == 4
