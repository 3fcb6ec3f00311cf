"""Requests that ORTHRUS refuses, built as SGLang builds them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_orthrus.server_args.admission import raw_problem, refusal, tokenized_problem, unreadable
from sglang_orthrus.server_args.admission_values import samples_problem


def _request(sampling: dict[str, Any] | None = None, ids: Sequence[int] = (1, 2, 3), **options: Any) -> Req:
    params = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 4} | (sampling or {}))
    # Only stop strings are tokenised; min_new_tokens wants a tokenizer to exist.
    params.normalize(object())
    return Req("rid", "", array("q", ids), params, vocab_size=100, **options)


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
        ({"custom_params": {"token_ids": [5]}}, {"custom_logit_processor": DisallowedTokensLogitsProcessor.to_str()}),
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


VOCAB = 100


def _sent(sampling: dict[str, Any] | None = None, **fields: Any) -> SimpleNamespace:
    """A request on its way to the scheduler."""
    params = SamplingParams(**{"temperature": 0.0, "max_new_tokens": 4} | (sampling or {}))
    params.normalize(object())
    return SimpleNamespace(**{"input_ids": array("q", [1, 2, 3]), "sampling_params": params} | fields)


@pytest.mark.parametrize(
    ("sampling", "fields", "named"),
    [
        ({}, {"input_ids": array("q", [5, -1])}, "input_ids: -1 is out of range, allowed are 0 to 99."),
        ({}, {"input_ids": array("q", [5, VOCAB])}, "input_ids: 100 is out of range, allowed are 0 to 99."),
        ({}, {"return_logprob": True, "top_logprobs_num": 101}, "top_logprobs_num: 101 is out of range, at most 100."),
        ({}, {"token_ids_logprob": [VOCAB]}, "token_ids_logprob: 100"),
        ({}, {"token_ids_logprob": [1] * (VOCAB + 1)}, "number of token_ids_logprob: 101"),
        ({}, {"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len: -2 is out of range, at least -1."),
        ({"min_new_tokens": 1, "stop_token_ids": [VOCAB]}, {}, "stop_token_ids (with min_new_tokens): 100"),
        ({"min_new_tokens": 1, "stop_token_ids": [-1]}, {}, "stop_token_ids (with min_new_tokens): -1"),
        ({"min_new_tokens": 2**31, "max_new_tokens": None}, {}, "min_new_tokens: 2147483648"),
        ({"top_k": 2**31, "temperature": 1.0}, {}, "top_k: 2147483648 is out of range, at most 2147483647."),
        ({"temperature": 1e39}, {}, "temperature: 1e+39 is out of range, at most 1e+38."),
        ({"repetition_penalty": 1e-40}, {}, "repetition_penalty: 1e-40 is out of range, at least 1e-30."),
        ({"logit_bias": {"5": float("nan")}}, {}, "logit_bias: nan is out of range, at most 1e+30."),
        ({"logit_bias": {"5": float("inf")}}, {}, "logit_bias: inf"),
        ({"logit_bias": {"5": 3e38}}, {}, "logit_bias: 3e+38"),
        ({}, {"multi_item_delimiter_indices": [0, 3]}, "multi_item_delimiter_indices: 3"),
        ({}, {"token_indices_to_pool": [-1]}, "token_indices_to_pool: -1 is out of range, allowed are 0 to 2."),
    ],
)
def test_a_number_that_ends_a_scheduler_is_refused_with_its_range(
    sampling: dict[str, Any], fields: dict[str, Any], named: str
) -> None:
    message = tokenized_problem(_sent(sampling, **fields), VOCAB)
    assert message is not None and message.startswith(named)


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({}, {"input_ids": array("q", [0, VOCAB - 1])}),
        ({}, {"input_ids": None}),  # embeddings
        ({}, {"input_ids": array("q")}),  # a session's turn
        ({}, {"return_logprob": True, "top_logprobs_num": VOCAB, "logprob_start_len": -1}),
        ({}, {"return_logprob": True, "top_logprobs_num": -1}),
        ({}, {"top_logprobs_num": 10**9, "logprob_start_len": -9}),  # no log probabilities are asked for
        ({}, {"token_ids_logprob": [0, VOCAB - 1], "return_logprob": True}),
        ({"top_k": -1, "temperature": 1e-6}, {}),
        ({"temperature": 1e38, "logit_bias": {"0": -100, "99": 100}}, {}),
    ],
)
def test_numbers_at_the_ends_of_their_ranges_are_served(sampling: dict[str, Any], fields: dict[str, Any]) -> None:
    assert tokenized_problem(_sent(sampling, **fields), VOCAB) is None


@pytest.mark.parametrize(
    ("n", "fields", "values"),
    [
        # Tokens of the prompt, log probabilities of each, texts.
        (1, {"input_ids": array("q", [1] * 41944), "top_logprobs_num": VOCAB}, 41944 * 100),
        (1, {"input_ids": array("q", [1] * 41954), "top_logprobs_num": VOCAB, "logprob_start_len": 10}, 41944 * 100),
        (3, {"input_ids": array("q", [1] * 14000), "top_logprobs_num": VOCAB}, 3 * 14000 * 100),
        (1, {"input_ids": array("q", [1] * 42000), "token_ids_logprob": [5] * VOCAB}, 42000 * 100),
        (1, {"input_ids": array("q", [1] * 30000), "top_logprobs_num": VOCAB, "token_ids_logprob": [5] * 90}, 5700000),
        (1, {"input_ids": None, "input_embeds": [[0.0]] * 42000, "top_logprobs_num": VOCAB}, 42000 * 100),
        # Of a session's history the scheduler alone knows how long it is.
        (1, {"session_params": {"id": "s"}, "top_logprobs_num": VOCAB}, 50000 * 100),
        (1, {"session_params": {"id": "s"}, "top_logprobs_num": VOCAB, "logprob_start_len": 7}, 49993 * 100),
    ],
)
def test_a_prompt_has_so_many_log_probabilities(n: int, fields: dict[str, Any], values: int) -> None:
    """The scheduler makes Python numbers of them, and serves nobody meanwhile."""
    asked = {"return_logprob": True, "logprob_start_len": 0} | fields
    message = tokenized_problem(_sent({"n": n}, **asked), VOCAB, context_length=50000)
    assert message is not None and f"are {values} values, at most 4194304." in message
    assert "top_logprobs_num: " in message or "number of token_ids_logprob: " in message
    for of_the_output_alone in ({"logprob_start_len": -1}, {"return_logprob": False}):
        sent = _sent({"n": n}, **asked | of_the_output_alone)
        assert tokenized_problem(sent, VOCAB, context_length=50000) is None


@pytest.mark.parametrize(
    ("n", "fields"),
    [
        (1, {"input_ids": array("q", [1] * 41943), "top_logprobs_num": VOCAB}),
        (1, {"input_ids": array("q", [1] * 90000), "top_logprobs_num": VOCAB, "logprob_start_len": 48057}),
        (1, {"input_ids": array("q", [1] * 90000), "top_logprobs_num": VOCAB, "logprob_start_len": 10**9}),
        (1, {"input_ids": array("q", [1] * 200000), "top_logprobs_num": 20}),
        (4096, {"input_ids": array("q", [1] * 200000)}),
        (1, {"session_params": {"id": "s"}, "top_logprobs_num": 83}),
    ],
)
def test_log_probabilities_of_a_prompt_are_served_up_to_the_bound(n: int, fields: dict[str, Any]) -> None:
    asked = {"return_logprob": True, "logprob_start_len": 0} | fields
    assert tokenized_problem(_sent({"n": n}, **asked), VOCAB, context_length=50000) is None


@pytest.mark.parametrize(
    ("sampling", "fields", "values"),
    [
        ({"max_new_tokens": 41944}, {"top_logprobs_num": VOCAB}, 41944 * 100),
        ({"max_new_tokens": None}, {"top_logprobs_num": VOCAB}, 49997 * 100),  # as many as the context has room for
        ({"max_new_tokens": 10**9}, {"token_ids_logprob": [5] * 90}, 49997 * 90),
        ({"max_new_tokens": 400, "n": 200}, {"top_logprobs_num": VOCAB}, 400 * 100 * 200),
    ],
)
def test_a_text_has_so_many_log_probabilities(sampling: dict[str, Any], fields: dict[str, Any], values: int) -> None:
    sent = _sent(sampling, return_logprob=True, **fields)
    message = tokenized_problem(sent, VOCAB, context_length=50000)
    assert message is not None and f"are {values} values, at most 4194304." in message
    assert "new tokens (max_new_tokens)" in message
    sent.return_logprob = False
    assert tokenized_problem(sent, VOCAB, context_length=50000) is None


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({"max_new_tokens": 41943}, {"top_logprobs_num": VOCAB}),
        # What the OpenAI API allows is served for any length and number of texts.
        ({"max_new_tokens": None, "n": 4096}, {"top_logprobs_num": 64}),
    ],
)
def test_log_probabilities_of_a_text_are_served_up_to_the_bound(
    sampling: dict[str, Any], fields: dict[str, Any]
) -> None:
    sent = _sent(sampling, return_logprob=True, **fields)
    assert tokenized_problem(sent, VOCAB, context_length=50000) is None


def test_log_probabilities_that_nobody_asked_for_are_not_looked_up() -> None:
    """The scheduler takes the largest number in a batch, also of a request that wants none."""
    sent = _sent({}, top_logprobs_num=10**9)
    assert tokenized_problem(sent, VOCAB) is None
    assert sent.top_logprobs_num == 0
    sent = _sent({}, return_logprob=True, top_logprobs_num=5)
    assert tokenized_problem(sent, VOCAB) is None
    assert sent.top_logprobs_num == 5


def test_stop_ids_that_no_token_matches_are_dropped() -> None:
    """Beside a neighbour with min_new_tokens they would end the scheduler."""
    sent = _sent({"stop_token_ids": [-1, 7, VOCAB]})
    assert tokenized_problem(sent, VOCAB) is None
    assert sent.sampling_params.stop_token_ids == {7}
    sent = _sent({"stop_token_ids": [VOCAB]})
    assert tokenized_problem(sent, VOCAB) is None
    assert sent.sampling_params.stop_token_ids is None


def test_a_bias_that_forbids_is_minus_infinity_at_any_temperature() -> None:
    sent = _sent({"logit_bias": {"5": -3e38, "6": -1e100, "7": -1e30, "8": -math.inf}})
    assert tokenized_problem(sent, VOCAB) is None
    assert sent.sampling_params.logit_bias == {"5": -math.inf, "6": -math.inf, "7": -1e30, "8": -math.inf}


@pytest.mark.parametrize("field", ["is_normalized", "stop_str_max_len", "stop_regex_max_len"])
def test_what_sglang_computes_cannot_be_given(field: str) -> None:
    """is_normalized would keep temperature 0 from being greedy: a division by it."""
    message = raw_problem(SimpleNamespace(sampling_params={"temperature": 0, field: 1}))
    assert message is not None and field in message
    assert raw_problem(SimpleNamespace(sampling_params={"temperature": 0})) is None
    assert raw_problem(SimpleNamespace(sampling_params=None)) is None


def test_the_scheduler_checks_what_another_process_may_not_have() -> None:
    assert "input_ids: -1" in (refusal(_request(ids=[-1])) or "")
    assert "input_ids: empty" in (refusal(_request(ids=[])) or "")
    assert "top_logprobs_num: 101" in (refusal(_request(return_logprob=True, top_logprobs_num=101)) or "")


@pytest.mark.parametrize(
    ("processor", "params"),
    [
        ("garbage", None),
        ('{"callable": "8004"}', None),
        (DisallowedTokensLogitsProcessor.to_str(), None),
        (DisallowedTokensLogitsProcessor.to_str(), {"token_ids": [VOCAB]}),
    ],
)
def test_a_processor_that_fails_is_refused(processor: str, params: dict[str, Any] | None) -> None:
    """In a batch it would end the scheduler."""
    message = refusal(_request({"custom_params": params}, custom_logit_processor=processor))
    assert message is not None and message.startswith("custom_logit_processor: ")


def test_fields_of_another_type_do_not_leave_the_process() -> None:
    """The scheduler decodes by type, and dies of what it can't decode."""

    def sent(**fields: Any) -> TokenizedGenerateReqInput:
        sampling = fields.pop("sampling", {})
        return TokenizedGenerateReqInput(
            **{
                "rid": "rid",
                "input_text": "",
                "input_ids": array("q", [1]),
                "input_embeds": None,
                "mm_inputs": None,
                "token_type_ids": None,
                "sampling_params": SamplingParams(**sampling),
                "return_logprob": False,
                "logprob_start_len": -1,
                "top_logprobs_num": 0,
                "token_ids_logprob": None,
                "stream": False,
            }
            | fields
        )

    assert unreadable(sent()) is None
    assert unreadable(sent(sampling={"custom_params": {"token_ids": [1]}, "logit_bias": {"1": -math.inf}})) is None
    for fields in (
        {"positional_embed_overrides": {"a": 1}},
        {"sampling": {"custom_params": [1]}},
        {"sampling": {"custom_params": {"a": {"b": {"c": 1}}}}},
        {"sampling": {"sampling_seed": 2**70}},
        {"extra_key": ["a"]},
    ):
        message = unreadable(sent(**fields))
        assert message is not None and "passed on" in message
    request = sent()
    assert unreadable(request) is None and list(request.input_ids or ()) == [1], "the request itself is left alone"


@pytest.mark.parametrize(("num_prompts", "n", "is_refused"), [(1, 4096, False), (1, 2**32, True), (9000, 1, False)])
def test_a_request_asks_for_so_many_texts(num_prompts: int, n: int, is_refused: bool) -> None:
    """SGLang copies it n times before anything else is checked."""
    problem = samples_problem(num_prompts, n)
    assert (problem is not None) is is_refused
    assert problem is None or str(n) in problem
