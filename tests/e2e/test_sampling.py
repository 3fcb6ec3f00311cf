"""Served requests with temperature: their distribution, their seeds, and their neighbours.

The truth is the plain-PyTorch reference with SGLang's own sampling functions; `make seeded` compares with a server.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import requests
import torch
from scipy.stats import chi2
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from tokenizers import Tokenizer

from benchmarks.common.equality import NEAR_TIE
from benchmarks.common.greedy import stop_ids
from benchmarks.common.reference import Reference
from benchmarks.parity.seeded import FILTERS, Case, cases
from benchmarks.parity.seeded_rules import margin, noise
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from sglang_orthrus.sampling.distributions import sorted_support
from tests.e2e.helpers import Reply, adjusted, generate, prompt_of, prompts, tokens_per_cycle
from tests.servers import LLGUIDANCE, SETUP

pytestmark = pytest.mark.e2e

FALSE_ALARM = 1e-6
SAMPLES = 200
AT_ONCE = 20
LENGTH = 3
LETTERS_WANTED = 16
TOKENIZER = Tokenizer.from_file(str(NANO / "tokenizer.json"))
SPELLED = [TOKENIZER.decode([token]) for token in range(TOKENIZER.get_vocab_size())]
STOPS = stop_ids(NANO)
# A name follows, and most drafts of it are wrong. Options leave few enough names to count them.
PROMPT = tuple(TOKENIZER.encode("The ").ids)
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature and top_k": {"temperature": 1.6, "top_k": 3},
    "top_p and min_p": {"temperature": 0.5, "top_p": 0.9, "min_p": 0.3},
    "grammar": {"temperature": 2.0, "top_p": 0.95, "regex": "[a-f]{3}"},
    # What is allowed depends on the letters before, and most drafts are repaired or forced.
    "forced": {"temperature": 3.0, "regex": "a[b-d]f|[bf]cd|e(ab|dc)|d[a-f]c"},
    "all": {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
}


@pytest.fixture(scope="module")
def orthrus_with_llguidance() -> Iterator[Server]:
    with Server(NANO, *ORTHRUS_ARGS, *SETUP.args, *LLGUIDANCE, env=SETUP.env) as server:
        yield server


@cache
def beginnings_of(regex: str) -> set[str]:
    """Of all texts that a grammar of ours allows, these texts included."""
    texts = (text for text in map("".join, product("abcdef", repeat=LENGTH)) if re.fullmatch(regex, text))
    return {text[:length] for text in texts for length in range(LENGTH + 1)}


@cache
def allowed_after(text: str, regex: str) -> list[int]:
    """Tokens, unless the text is whole."""
    beginnings = beginnings_of(regex)
    return [token for token, spelled in enumerate(SPELLED) if spelled and text + spelled in beginnings]


def next_tokens(reference: Reference, ids: Sequence[int], options: dict[str, Any]) -> dict[int, float]:
    """What may follow, as plain SGLang masks and filters it."""
    logits = reference.ar_logits([*PROMPT, *ids])[-1:]
    if "regex" in options:
        allowed = torch.zeros(logits.shape[1], dtype=torch.bool)
        allowed[allowed_after("".join(SPELLED[token] for token in ids), options["regex"])] = True
        logits = logits.masked_fill(~allowed, float("-inf"))
    probs = torch.softmax(logits / options["temperature"], dim=-1)
    top_k = torch.tensor([options.get("top_k", 1 << 30)])
    top_p, min_p = torch.tensor([options.get("top_p", 1.0)]), torch.tensor([options.get("min_p", 0.0)])
    filtered = sorted_support(probs, top_k, top_p, min_p, None).probabilities(probs.shape[1])[0]
    return {int(token): float(filtered[token]) for token in filtered.nonzero().flatten()}


def is_whole(ids: Sequence[int], options: dict[str, Any]) -> bool:
    """Whether a grammar allows nothing but one of the stop tokens."""
    return "regex" in options and len("".join(SPELLED[token] for token in ids)) == LENGTH


def expected_texts(reference: Reference, options: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Texts without a stop token, and their probabilities; those that are hardly ever seen are left out."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        whole = {text: mass for text, mass in found.items() if is_whole(text, options)}
        found = whole | {
            (*text, token): mass * p
            for text, mass in found.items()
            if text not in whole
            for token, p in next_tokens(reference, text, options).items()
            if mass * p * SAMPLES > 1
        }
    return found


def misfit(texts: Sequence[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """The p-value of chi-square, with rare texts taken together."""
    common = {text: mass * len(texts) for text, mass in expected.items() if mass * len(texts) >= 5}
    found = [texts.count(text) for text in common]
    wanted = list(common.values())
    rest = len(texts) - sum(wanted)
    if rest >= 5:
        found.append(len(texts) - sum(found))
        wanted.append(rest)
    statistic = sum((one - other) ** 2 / other for one, other in zip(found, wanted, strict=True))
    return float(chi2.sf(statistic, len(wanted) - 1))


@pytest.fixture(scope="module", params=["orthrus", pytest.param("orthrus_with_llguidance", marks=pytest.mark.slow)])
def sampled(request: pytest.FixtureRequest) -> dict[str, list[Reply]]:
    """Requests with every kind of option, mixed in every batch, greedy ones among them."""
    server: Server = request.getfixturevalue(request.param)

    def ask(options: dict[str, Any]) -> list[Reply]:
        # A text of a grammar ends with it.
        sampling = {"max_new_tokens": LENGTH, "ignore_eos": "regex" not in options, "n": AT_ONCE, **options}
        return server.post("/generate", {"input_ids": list(PROMPT), "sampling_params": sampling})

    with ThreadPoolExecutor(1 + 2 * len(OPTIONS)) as pool:
        greedy = pool.submit(ask, {"temperature": 0})
        replies = list(pool.map(ask, [*OPTIONS.values()] * (SAMPLES // AT_ONCE)))
    assert len({tuple(reply["output_ids"]) for reply in greedy.result()}) == 1
    return {
        name: [reply for asked in replies[kind :: len(OPTIONS)] for reply in asked] for kind, name in enumerate(OPTIONS)
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_served_texts_follow_the_distribution(sampled: dict[str, list[Reply]], reference: Reference, name: str) -> None:
    """A correct server fails one of these with probability 1e-6."""
    texts = [tuple(token for token in reply["output_ids"] if token not in STOPS) for reply in sampled[name]]
    expected = expected_texts(reference, OPTIONS[name])
    assert len(texts) == SAMPLES and len(set(texts)) > 10
    assert misfit(texts, expected) > FALSE_ALARM


def test_drafts_of_the_samples_were_accepted_and_rejected(sampled: dict[str, list[Reply]]) -> None:
    """Whole texts in one round, and texts of as many rounds as tokens, were among them."""
    rounds = {reply["meta_info"]["spec_verify_ct"] for replies in sampled.values() for reply in replies}
    assert {1, LENGTH - 1} <= rounds


def expected_token(logits: torch.Tensor, options: dict[str, Any], position: int) -> int:
    """Plain SGLang alone: noise goes by token id, or by rank where there are filters."""
    if options["temperature"] == 0:
        return int(logits.argmax())
    probs = torch.softmax(logits[None] / options["temperature"], dim=-1)
    perturbation = noise(options["sampling_seed"], position, probs.shape[1])
    if not {"top_k", "top_p"} & set(options):
        return int((probs[0].log().double() + perturbation).argmax())
    top_k = torch.tensor([options.get("top_k", 1 << 30)])
    support = sorted_support(probs, top_k, torch.tensor([options.get("top_p", 1.0)]), torch.zeros(1), None)
    assert support.ids is not None
    return int(support.ids[0, (support.weights[0].double().log() + perturbation).argmax()])


def test_seeded_answers_do_not_depend_on_the_batch(narrow: Server, reference: Reference) -> None:
    """Hot enough that most answers are nobody's greedy ones; eight requests of different kinds in flight."""
    chosen = [prompt for prompt in prompts() if prompt.name in ("prose/0", "chat/1")]
    requests_ = [
        Case(case.prompt, case.label, case.options | {"temperature": 2.5 * case.options["temperature"]})
        for case in cases(chosen, seeds=(3,))
    ]

    def ask(case: Case) -> Reply:
        return generate(narrow, case.prompt.ids, 24, **case.options)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, requests_))
    near_ties = 0
    for case, reply in zip(requests_, replies, strict=True):
        tokens = reply["output_ids"]
        logits = reference.ar_logits([*case.prompt.ids, *tokens])
        for index, token in enumerate(tokens):
            position = len(case.prompt.ids) + index - 1
            wanted = expected_token(logits[position], case.options, position)
            if token != wanted:
                distance = margin(logits[position], case.options, position, (wanted, token))
                assert distance < NEAR_TIE, (case, index, wanted, token, distance)
                near_ties += 1
                break
    assert near_ties <= 1
    greedy = {c.prompt.name: r["output_ids"] for c, r in zip(requests_, replies, strict=True) if c.label == "greedy"}
    others = [r["output_ids"] != greedy[c.prompt.name] for c, r in zip(requests_, replies, strict=True)]
    assert sum(others) > len(others) / 3
    assert {len(FILTERS) * 2 + 1} == {len(requests_) // len(chosen)}


ADJUSTED: dict[str, dict[str, Any]] = {
    "penalties": {"frequency_penalty": 0.4, "presence_penalty": -0.3, "repetition_penalty": 1.2, "min_new_tokens": 30},
    "bias": {"logit_bias": {"300": 6.0, "12": -3.0}, "top_p": 0.9},
    "all": {"frequency_penalty": 0.5, "logit_bias": {"300": 3.0}, "top_k": 20, "min_new_tokens": 10},
    "custom": {"custom_params": {"token_ids": [220, 300, 12]}, "repetition_penalty": 1.3, "top_p": 0.95},
    "grammar": {"regex": f"[a-f]{{{LETTERS_WANTED}}}"},
    "grammar and all": {"regex": f"[a-f]{{{LETTERS_WANTED}}}", "logit_bias": {"68": 3.0}, "presence_penalty": 0.5}
    | {"top_p": 0.9},
}


@pytest.mark.slow
def test_seeds_act_on_adjusted_logits(narrow: Server, reference: Reference) -> None:
    """Penalties, scaling, grammar mask, bias, custom processors, temperature, filters, noise; all in one batch."""
    ids = prompt_of("prose")
    requests_ = {name: {"temperature": 1.8, "sampling_seed": 11, **options} for name, options in ADJUSTED.items()}

    def ask(options: dict[str, Any]) -> Reply:
        body = {"input_ids": list(ids), "sampling_params": {"max_new_tokens": 32, **options}}
        if "custom_params" in options:
            body["custom_logit_processor"] = DisallowedTokensLogitsProcessor().to_str()
        return narrow.post("/generate", body)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, requests_.values()))
    for (name, options), reply in zip(requests_.items(), replies, strict=True):
        tokens = reply["output_ids"]
        logits = reference.ar_logits([*ids, *tokens])
        position = len(ids) - 1
        for index, token in enumerate(tokens):
            row = logits[position + index].clone()
            if "regex" in options:
                left = LETTERS_WANTED - sum(len(SPELLED[said]) for said in tokens[:index])
                if left == 0:
                    break  # the end of the text is all that is left
                pattern = re.compile(f"[a-f]{{1,{left}}}")
                row[[token for token in range(len(row)) if not pattern.fullmatch(SPELLED[token])]] = float("-inf")
            row = adjusted(row, ids, tokens[:index], options)
            wanted = expected_token(row, options, position + index)
            if wanted != token:
                assert margin(row, options, position + index, (wanted, token)) < NEAR_TIE, (name, index, wanted, token)
                break
        assert len(tokens) > 4, name


def test_common_noise_keeps_drafts_alike(narrow: Server) -> None:
    """A drafter with noise of its own would still give the right text, only slower."""
    ids = next(prompt.ids for prompt in prompts() if prompt.family == "chat")
    reply = generate(narrow, ids, temperature=1.0, sampling_seed=5)
    assert tokens_per_cycle(reply) > 1.5


def test_min_p_with_a_seed_is_refused(narrow: Server) -> None:
    body = {"text": "Hello", "sampling_params": {"temperature": 1.0, "min_p": 0.1}}
    response = requests.post(f"{narrow.url}/generate", json=body, timeout=60)
    assert response.status_code == 400
    assert "min_p" in response.text
    post = partial(generate, narrow, (5, 6, 7), 4)
    assert post(min_p=0.1)["output_ids"] == post()["output_ids"], "greedy requests may have it"
