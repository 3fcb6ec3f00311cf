"""Numbers and options that end schedulers: refused by name, or served, and the server answers the next request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import dill
import pytest
import requests
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import generate, prompt_of

VOCAB = 4096
INTEGER = json.dumps({"type": "integer", "minimum": 0, "maximum": 100})
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
SCORE = {"model": "default", "items": [[3]], "label_token_ids": [1, 2]}
OLLAMA = {"model": "default", "prompt": "Hello", "stream": False}
FORBID = json.dumps({str(token): -1e100 for token in range(VOCAB)})


class ForbidAll(CustomLogitProcessor):
    """Leaves nothing to choose from."""

    def __call__(self, logits: Tensor, custom_param_list: Any = None) -> Tensor:
        return logits.fill_(float("nan"))


class ForceOne(CustomLogitProcessor):
    """Wants a token that no JSON begins with."""

    def __call__(self, logits: Tensor, custom_param_list: Any = None) -> Tensor:
        logits[:, 7] = float("inf")
        return logits


def _by_value(processor: type[CustomLogitProcessor]) -> str:
    """As `to_str`, for a server that can't import this module."""
    processor.__module__ = processor.__call__.__module__ = "__main__"
    return json.dumps({"callable": dill.dumps(processor, recurse=True).hex()})


def _native(sampling: dict[str, Any] | None = None, **fields: Any) -> tuple[str, dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": 8} | (sampling or {})
    return "/generate", {"input_ids": [5, 6, 7], "sampling_params": sampling} | fields


def _chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"model": "default", "messages": MESSAGES, "max_tokens": 8} | fields


def _text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "default", "prompt": "a", "max_tokens": 8} | fields


def _post(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=60)


@pytest.fixture(scope="module", autouse=True)
def _an_ordinary_request_is_answered_afterwards(orthrus: Server) -> Iterator[None]:
    before = generate(orthrus, prompt_of("json"), 8)["output_ids"]
    yield
    assert generate(orthrus, prompt_of("json"), 8)["output_ids"] == before


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (_native({"n": 2**32}), "n: 4294967296 texts"),
        (_native({"n": 5000}), "n: 5000 texts of 1 prompts"),
        (_native({"n": 2100}, input_ids=[[5], [6]]), "n: 2100 texts of 2 prompts"),
        (_text(n=2**32), "n: 4294967296 texts"),
        (_chat(n=2**32), "n: 4294967296 texts"),
        (_native(input_ids=[5, -1]), "input_ids: -1"),
        (_native(input_ids=[5, VOCAB]), "input_ids: 4096"),
        (_native(input_ids=[[5], [6, -4]]), "input_ids: -4"),
        (_native(input_ids=[[]]), "input_ids: empty"),
        (_text(prompt=[1, -2]), "input_ids: -2"),
        (_text(prompt=[1, 2**63]), "OverflowError"),
        (("/v1/score", SCORE | {"query": [1, -2]}), "input_ids: -2"),
        (_native(return_logprob=True, top_logprobs_num=VOCAB + 1), "top_logprobs_num: 4097"),
        (_chat(logprobs=True, top_logprobs=VOCAB + 1), "top_logprobs_num: 4097"),
        (_text(logprobs=VOCAB + 1), "top_logprobs_num: 4097"),
        # An interface that does not catch errors of requests.
        (("/api/generate", OLLAMA | {"options": {"num_predict": False}}), "can't be passed on"),
        (("/api/generate", OLLAMA | {"options": {"num_predict": 10**6}}), "maximum context length"),
        (_native(return_logprob=True, logprob_start_len=-2), "logprob_start_len: -2"),
        (
            _native(input_ids=[5] * 1025, return_logprob=True, logprob_start_len=0, top_logprobs_num=VOCAB),
            "top_logprobs_num: 4096 log probabilities of each of 1025 prompt tokens from logprob_start_len 0 on, for "
            "n = 1, are 4198400 values, at most 4194304",
        ),
        (_native({"n": 500}, return_logprob=True, logprob_start_len=0, top_logprobs_num=VOCAB), "are 6144000 values"),
        (_text(prompt=[5] * 1025, logprobs=VOCAB, echo=True), "are 4198400 values"),
        (
            _text(prompt=[5], max_tokens=1025, logprobs=VOCAB),
            "1025 new tokens (max_new_tokens), for n = 1, are 4198400",
        ),
        (_native({"stop_token_ids": [VOCAB], "min_new_tokens": 2}), "stop_token_ids (with min_new_tokens): 4096"),
        (_chat(stop_token_ids=[-1], min_tokens=2), "stop_token_ids (with min_new_tokens): -1"),
        (_native({"top_k": 2**31, "temperature": 1}), "top_k: 2147483648"),
        (_native({"temperature": 1e39}), "temperature: 1e+39"),
        (_native({"logit_bias": {"5": 3e38}}), "logit_bias: 3e+38"),
        (_native({"repetition_penalty": 1e-40}), "repetition_penalty: 1e-40"),
        (_native({"stop_regex": "("}), "missing )"),
        (_native(positional_embed_overrides={"a": 1}), "can't be passed on"),
        (_native({"custom_params": [1]}), "can't be passed on"),
        (_native(session_params={"foo": 1}), "foo"),
        (_native(custom_logit_processor="garbage"), "custom_logit_processor: "),
        (
            _native({"stop_token_ids": [VOCAB], "min_new_tokens": 2}, session_params={"id": "none"}),
            "stop_token_ids (with min_new_tokens): 4096",
        ),
    ],
)
def test_it_is_refused_by_name(orthrus: Server, request_: tuple[str, dict[str, Any]], named: str) -> None:
    response = _post(orthrus, *request_)
    assert response.status_code == 400, response.text
    assert named in response.text


@pytest.mark.parametrize(
    "request_",
    [
        _native(input_ids=[0, VOCAB - 1]),
        _native(return_logprob=True, top_logprobs_num=-1),
        _native(return_logprob=True, top_logprobs_num=VOCAB),
        _native(input_ids=[5] * 1025, return_logprob=True, top_logprobs_num=VOCAB),
        _native(input_ids=[5] * 1025, return_logprob=True, logprob_start_len=1000, top_logprobs_num=VOCAB),
        _chat(logprobs=True, top_logprobs=-1),
        _text(logprobs=-1),
        _native({"stop_token_ids": [-1, VOCAB, 2**40]}),
        _native({"temperature": 1e30}),
        _native({"logit_bias": json.loads(FORBID), "temperature": 1}),
        _native({"temperature": 0.5}, custom_logit_processor=_by_value(ForbidAll)),
    ],
)
def test_what_plain_sglang_serves_is_served(orthrus: Server, request_: tuple[str, dict[str, Any]]) -> None:
    response = _post(orthrus, *request_)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("temperature", [0, 0.5, 1])
@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({"min_new_tokens": 5}, {}),
        ({"logit_bias": json.loads(FORBID)}, {}),
        ({}, {"custom_logit_processor": _by_value(ForbidAll)}),
        ({}, {"custom_logit_processor": _by_value(ForceOne)}),
    ],
)
def test_a_grammars_end_wins(
    orthrus: Server, temperature: float, sampling: dict[str, Any], fields: dict[str, Any]
) -> None:
    given = {"json_schema": INTEGER, "temperature": temperature, "max_new_tokens": 32} | sampling
    response = _post(orthrus, *_native(given, **fields))
    assert response.status_code == 200, response.text
    reply = response.json()
    assert 0 <= int(reply["text"]) <= 100
    assert reply["meta_info"]["finish_reason"]["type"] == "stop"


def test_neighbours_of_one_processor_may_have_parameters_of_their_own(orthrus: Server) -> None:
    """SGLang's own asserts that all requests of a batch forbid the same tokens."""
    from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

    ids = list(prompt_of("json"))
    first = generate(orthrus, ids, 8)["output_ids"]
    forbidden = [[token] for token in first[:2]]
    sampling = [{"temperature": 0, "max_new_tokens": 8, "custom_params": {"token_ids": own}} for own in forbidden]
    body = {"input_ids": [ids] * 2, "sampling_params": sampling}
    body["custom_logit_processor"] = [DisallowedTokensLogitsProcessor.to_str()] * 2
    for own, reply in zip(forbidden, orthrus.post("/generate", body), strict=True):
        assert not set(own) & set(reply["output_ids"])
