"""What requests have said, across rounds and retractions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from sglang_orthrus.history import History
from sglang_orthrus.verify import Verdict

VOCAB = 6


class Request(SimpleNamespace):
    """Weakly referable and hashable, as SGLang's."""

    __hash__ = object.__hash__


def _request(said: list[int], custom: bool = False, **params: Any) -> Request:
    defaults = {
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_new_tokens": 0,
        "custom_params": {} if custom else None,
    }
    processor = "{}" if custom else None
    return Request(
        output_ids=said, custom_logit_processor=processor, sampling_params=SimpleNamespace(**(defaults | params))
    )


def _batch(reqs: list[Request], **info: Any) -> Any:
    defaults = {
        "vocab_size": VOCAB,
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "has_custom_logit_processor": any(req.custom_logit_processor for req in reqs),
    }
    return SimpleNamespace(
        reqs=reqs,
        sampling_info=SimpleNamespace(**(defaults | info)),
        req_pool_indices=torch.tensor([3, 1][: len(reqs)]),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(4, 1)),
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
    assert history._counts.of(torch.tensor([3])).tolist() == [[0, 2, 1, 0, 1, 0]], "the anchor 5 is not counted yet"
    # The slot of the pool goes to another request.
    history.start(_batch([_request([], presence_penalty=1.0)]), torch.tensor([0]))
    assert int(history._counts.of(torch.tensor([3])).sum()) == 0
