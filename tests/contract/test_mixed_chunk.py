"""`--enable-mixed-chunk`: mixed batches are laid out as `MixedSteps` takes them apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

pytestmark = pytest.mark.contract

# [requests, columns]: a slot tells its row and its column.
REQ_TO_TOKEN = torch.arange(4)[:, None] * 100 + torch.arange(64)


def request(length: int) -> Any:
    """One whose text has so many tokens, the anchor included."""
    return SimpleNamespace(seqlen=length, refresh_fill_ids=lambda: None, beam_group=None)


def batch(reqs: list[Any], rows: list[int], lens: list[int], **fields: Any) -> ScheduleBatch:
    return ScheduleBatch(
        reqs=reqs,
        req_pool_indices=torch.tensor(rows),
        req_pool_indices_cpu=torch.tensor(rows),
        seq_lens=torch.tensor(lens),
        seq_lens_cpu=torch.tensor(lens),
        orig_seq_lens=torch.tensor(lens),
        req_to_token_pool=SimpleNamespace(req_to_token=REQ_TO_TOKEN),
        spec_algorithm=SimpleNamespace(is_none=lambda: False),
        model_config=SimpleNamespace(is_encoder_decoder=False),
        sampling_info=SimpleNamespace(merge_batch=lambda other: None),
        **fields,
    )


def test_running_requests_come_last_with_their_anchors() -> None:
    mixed = batch(
        [request(6)],
        [1],
        [6],
        out_cache_loc=torch.arange(4),
        prefix_lens=[2],
        extend_lens=[4],
        extend_num_tokens=4,
        extend_logprob_start_lens=[0],
    )
    running = batch([request(9), request(21)], [3, 2], [8, 20])
    reqs = [*mixed.reqs, *running.reqs]
    mixed.mix_with_running(running)
    assert mixed.forward_mode == ForwardMode.MIXED and mixed.forward_mode.is_mixed()
    assert mixed.reqs == reqs
    # Of 8 and 20 committed tokens: the anchor is committed by this step.
    assert mixed.seq_lens.tolist() == [6, 9, 21] and mixed.prefix_lens == [2, 8, 20]
    assert mixed.extend_lens == [4, 1, 1]
    assert mixed.out_cache_loc.tolist() == [0, 1, 2, 3, 308, 220]
    assert mixed.spec_info is None, "the pass is of the AR view"
