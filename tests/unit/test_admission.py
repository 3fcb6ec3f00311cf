"""Requests that ORTHRUS refuses, built as SGLang builds them."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_orthrus.admission import refusal


def _request(sampling: dict[str, Any] | None = None, **options: Any) -> Req:
    params = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 4} | (sampling or {}))
    # Only stop strings are tokenised; min_new_tokens wants a tokenizer to exist.
    params.normalize(object())
    return Req("rid", "", array("q", [1, 2, 3]), params, vocab_size=100, **options)


def test_a_greedy_request_is_served() -> None:
    assert refusal(_request()) is None


def test_a_request_for_no_token_is_served_at_any_temperature() -> None:
    """SGLang's frontend language fills the cache with such requests."""
    assert refusal(_request({"temperature": 1.0, "max_new_tokens": 0})) is None


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({"temperature": 0.7, "top_p": 0.5, "top_k": 20}, {}),
        ({"temperature": 1.0, "min_p": 0.1}, {}),
        ({"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2}, {}),
        ({"min_new_tokens": 2, "logit_bias": {"5": 1.0}}, {}),
        ({}, {"custom_logit_processor": "{}"}),
        ({}, {"return_logprob": True}),
    ],
)
def test_what_plain_sglang_honours_is_served(sampling: dict[str, Any], options: dict[str, Any]) -> None:
    assert refusal(_request(sampling, **options)) is None


def test_min_p_is_refused_where_seeds_act() -> None:
    """Plain SGLang's scheduler dies of it."""
    message = refusal(_request({"temperature": 1.0, "min_p": 0.1}), are_seeded=True)
    assert message is not None and "min_p" in message and "--enable-deterministic-inference" in message
    assert refusal(_request({"temperature": 0.0, "min_p": 0.1}), are_seeded=True) is None
    assert refusal(_request({"temperature": 1.0, "top_p": 0.1}), are_seeded=True) is None


@pytest.mark.parametrize(
    ("sampling", "options", "named"),
    [
        ({"beam_width": 2}, {}, "beam_width"),
        ({}, {"return_hidden_states": True}, "return_hidden_states"),
        ({}, {"return_routed_experts": True}, "return_routed_experts"),
        ({}, {"return_sampling_mask": True}, "return_sampling_mask"),
        ({}, {"lora_id": "adapter"}, "lora_path"),
    ],
)
def test_an_option_that_is_not_exact_yet_is_named(
    sampling: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    message = refusal(_request(sampling, **options))
    assert message is not None
    assert named in message


def test_every_offending_option_is_named_at_once() -> None:
    message = refusal(_request({"beam_width": 2}, return_hidden_states=True, lora_id="adapter"))
    assert message is not None
    for option in ("beam_width", "return_hidden_states", "lora_path"):
        assert option in message
