"""What requests have said, across rounds and retractions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_orthrus.core import Verdict
from sglang_orthrus.sampling.output_history import History
from tests.sampling import Request, request

VOCAB = 6


def _request(said: list[int], custom: bool = False, **params: Any) -> Request:
    processor = "{}" if custom else None
    return request(
        params | {"custom_params": {} if custom else None}, output_ids=said, custom_logit_processor=processor
    )


def _batch(reqs: list[Request], **info: Any) -> Any:
    defaults = {
        "vocab_size": VOCAB,
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "logit_bias": None,
        "has_custom_logit_processor": any(req.custom_logit_processor for req in reqs),
    }
    return SimpleNamespace(
        reqs=reqs,
        sampling_info=SimpleNamespace(**(defaults | info)),
        seq_lens=torch.tensor([4, 4][: len(reqs)]),
        device="cpu",
    )


def test_a_retracted_request_is_penalised_for_what_it_said_before() -> None:
    """SGLang's own penalizers start anew, and hold stops back again."""
    fresh = torch.zeros(2, VOCAB)
    fresh[:, 5] = float("-inf")
    reqs = [
        _request([2, 2, 4], frequency_penalty=0.5, presence_penalty=1.0, repetition_penalty=1.5, min_new_tokens=3),
        _request([], frequency_penalty=0.5, min_new_tokens=3),
    ]
    batch = _batch(reqs, acc_additive_penalties=fresh, acc_scaling_penalties=torch.ones(2, VOCAB))
    History("cpu").resume(batch)
    additive, scaling = batch.sampling_info.acc_additive_penalties, batch.sampling_info.acc_scaling_penalties
    assert additive[0].tolist() == [0.0, 0.0, -2.0, 0.0, -1.5, 0.0]
    assert scaling[0].tolist() == [1.0, 1.0, 1.5, 1.0, 1.5, 1.0]
    assert additive[1, 5] == float("-inf") and scaling[1].tolist() == [1.0] * VOCAB


def test_a_request_that_may_not_stop_yet_still_may_not_after_retraction() -> None:
    held_back = torch.zeros(1, VOCAB)
    held_back[0, 5] = float("-inf")
    batch = _batch([_request([2], presence_penalty=1.0, min_new_tokens=3)], acc_additive_penalties=held_back)
    History("cpu").resume(batch)
    assert batch.sampling_info.acc_additive_penalties[0].tolist() == [0.0, 0.0, -1.0, 0.0, 0.0, float("-inf")]


def test_outputs_on_the_host_and_counts_on_the_device_follow_the_rounds() -> None:
    history = History("cpu")
    reqs = [_request([1, 1], presence_penalty=1.0), _request([], custom=True)]
    batch = _batch(reqs, acc_additive_penalties=torch.zeros(2, VOCAB))
    history.start(batch, torch.tensor([2, 3]))
    adjustments = history.adjustments(batch)
    assert adjustments.are_penalised and adjustments.read_outputs
    block = torch.tensor([[2, 4, 4], [3, 0, 0]])
    tokens = torch.tensor([[4, 5, 0], [0, 0, 1]])
    verdict = Verdict(torch.tensor([2, 3]).int(), tokens, tokens[:, -1], batch.seq_lens)
    history.extend(batch, adjustments, block, verdict)
    assert history._outputs[reqs[1]] == [3, 0, 0, 1]
    assert history._counts is not None
    assert history._counts.of(reqs[:1]).tolist() == [[0, 2, 1, 0, 1, 0]], "the anchor 5 is not counted yet"
    # It ends, and another request takes its row.
    reqs[0].has_ended = True
    newcomer = _request([], presence_penalty=1.0)
    history.start(_batch([newcomer]), torch.tensor([0]))
    assert int(history._counts.of([newcomer]).sum()) == 0
    newcomer.has_ended = True
    history.start(_batch([_request([])]), torch.tensor([0]))
    assert history._counts.num_bytes == 0, "nobody who runs is penalised"
