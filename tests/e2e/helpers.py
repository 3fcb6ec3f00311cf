"""Requests and comparisons for the end-to-end tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeVar

from sglang.srt.sampling.custom_logit_processor import DeepseekOCRNoRepeatNGramLogitProcessor as NoRepeat
from torch import Tensor

from benchmarks.common.equality import NEAR_TIE, Divergence, find_divergence
from benchmarks.common.greedy import Prompt, load_prompts
from benchmarks.common.reference import Reference, top2_gap
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.server import Server

T = TypeVar("T")
Reply = dict[str, Any]
Request = tuple[Sequence[int], int]  # ids, max_new_tokens
TRUTHS_IN_FLIGHT = 8
STOPS = {4088, 4090}  # <|endoftext|> and <|im_end|>, which end nano's texts
_TRUTHS: dict[tuple[str, tuple[int, ...], int], Reply] = {}


@cache
def prompts() -> tuple[Prompt, ...]:
    """Four held-out prompts of every family."""
    return tuple(load_prompts(NANO, 4 * 9))


def prompt_of(family: str, index: int = 0) -> tuple[int, ...]:
    """The ids of one held-out prompt."""
    return next(prompt.ids for prompt in prompts() if prompt.name == f"{family}/{index}")


def generate(server: Server, ids: Sequence[int], max_new_tokens: int = 256, **sampling: Any) -> Reply:
    """One greedy request."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, **sampling}
    return server.post("/generate", {"input_ids": list(ids), "sampling_params": sampling})


def generate_with_logprobs(server: Server, ids: Sequence[int], **sampling: Any) -> Reply:
    """One greedy request of 48 tokens, with the log probabilities of each, of the best three, and of two named ids."""
    body = {
        "input_ids": list(ids),
        "sampling_params": {"temperature": 0, "max_new_tokens": 48, **sampling},
        "return_logprob": True,
        "top_logprobs_num": 3,
        "token_ids_logprob": [5, 4000],
    }
    return server.post("/generate", body)


def generate_together(server: Server, requests: Sequence[Request], in_flight: int) -> list[Reply]:
    """Requests, `in_flight` at a time: others join as one leaves."""
    with ThreadPoolExecutor(in_flight) as pool:
        return list(pool.map(lambda request: generate(server, *request), requests))


def both(ask: Callable[..., T], servers: tuple[Server, Server], *args: Any, **kwargs: Any) -> list[T]:
    """The same of two servers, at once: a request keeps little more than one core busy."""
    with ThreadPoolExecutor(len(servers)) as pool:
        return list(pool.map(lambda server: ask(server, *args, **kwargs), servers))


def truths(plain: Server, requests: Iterable[Request]) -> list[Reply]:
    """Plain SGLang's answers for `assert_same_output`, which allows for rounding.

    Every request is sent once a session, several at a time.
    """
    wanted = [(plain.url, tuple(ids), length) for ids, length in requests]
    new = [key for key in dict.fromkeys(wanted) if key not in _TRUTHS]
    replies = generate_together(plain, [(ids, length) for _, ids, length in new], TRUTHS_IN_FLIGHT)
    _TRUTHS.update(zip(new, replies, strict=True))
    return [_TRUTHS[key] for key in wanted]


def truth(plain: Server, ids: Sequence[int], max_new_tokens: int = 256) -> Reply:
    """One of them."""
    (reply,) = truths(plain, [(ids, max_new_tokens)])
    return reply


def divergence_of(
    reference: Reference,
    ids: Sequence[int],
    expected: Sequence[int],
    actual: Sequence[int],
    tie_below: float = NEAR_TIE,
) -> Divergence | None:
    """Where two answers to a prompt first differ, and whether the AR view has a near tie there."""

    def gap_after(common: Sequence[int]) -> float:
        return float(top2_gap(reference.ar_logits([*ids, *common])[-1]))

    return find_divergence(expected, actual, gap_after, tie_below)


def assert_same_output(reference: Reference, ids: Sequence[int], expected: Reply, actual: Reply) -> None:
    """Equal token by token, unless they part at a near tie of the AR view."""
    divergence = divergence_of(reference, ids, expected["output_ids"], actual["output_ids"])
    assert divergence is None or divergence.near_tie, divergence
    if divergence is None:
        assert actual["text"] == expected["text"]
        assert actual["meta_info"]["finish_reason"] == expected["meta_info"]["finish_reason"]


def assert_same_outputs(
    reference: Reference, plain: Server, requests: Sequence[Request], replies: Sequence[Reply]
) -> None:
    """Each as `assert_same_output` wants it, of requests without options."""
    for (ids, _), expected, reply in zip(requests, truths(plain, requests), replies, strict=True):
        assert_same_output(reference, ids, expected, reply)


def tokens_per_cycle(reply: Reply) -> float:
    """Tokens per draft-and-verify round; the prefill's token is not counted."""
    return (len(reply["output_ids"]) - 1) / reply["meta_info"]["spec_verify_ct"]


def adjusted(logits: Tensor, ids: Sequence[int], said: Sequence[int], options: dict[str, Any]) -> Tensor:
    """What SGLang's documentation of the options says of one row of logits. logits: [V]"""
    logits = logits.clone()
    if len(said) < options.get("min_new_tokens", 0):
        logits[list(STOPS)] = float("-inf")
    for token in set(said):
        times = list(said).count(token)
        logits[token] -= options.get("frequency_penalty", 0.0) * times + options.get("presence_penalty", 0.0)
        scale = options.get("repetition_penalty", 1.0)
        logits[token] = logits[token] * scale if logits[token] < 0 else logits[token] / scale
    for key, bias in options.get("logit_bias", {}).items():
        logits[int(key)] += bias
    params = options.get("custom_params", {})
    if "token_ids" in params:
        logits[params["token_ids"]] = float("-inf")
    if "ngram_size" in params:
        request = SimpleNamespace(origin_input_ids=list(ids), output_ids=list(said))
        logits = NoRepeat()(logits[None], [params | {"__req__": request}])[0]
    return logits
