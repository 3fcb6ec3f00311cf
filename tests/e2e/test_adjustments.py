"""Options that change logits, and log probabilities, against the plain-PyTorch reference and plain SGLang.

Plain SGLang penalises one token late under overlap scheduling, so the truth for penalties is the rule itself, and
`make adjustments` compares with a plain server that runs without overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import sglang as sgl
import torch
from sglang.srt.sampling.custom_logit_processor import DeepseekOCRNoRepeatNGramLogitProcessor as NoRepeat
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor

from benchmarks.common.equality import NEAR_TIE, find_divergence
from benchmarks.common.greedy import load_prompts
from benchmarks.common.reference import Reference, top2_gap
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar
from tests.e2e.helpers import Reply, adjusted, both, prompt_of
from tests.patching import patched_sglang
from tests.servers import SETUP, TEST_ARGS

pytestmark = pytest.mark.e2e


MAX_NEW_TOKENS = 48
PENALTIES: dict[str, dict[str, Any]] = {
    "frequency": {"frequency_penalty": 0.6},
    "presence": {"presence_penalty": 0.9},
    "repetition": {"repetition_penalty": 1.3},
    "min_new_tokens": {"min_new_tokens": 40},
    "bias": {"logit_bias": {"300": 4.0, "12": -3.0, "220": 1.5}},
    "all": {
        "frequency_penalty": 0.4,
        "presence_penalty": -0.3,
        "repetition_penalty": 1.2,
        "min_new_tokens": 24,
        "logit_bias": {"300": 2.0},
    },
}


CUSTOM: dict[str, tuple[dict[str, Any], str]] = {
    "disallowed": (
        {"custom_params": {"token_ids": [220, 300, 12]}},
        DisallowedTokensLogitsProcessor().to_str(),
    ),
    # It reads the request's output: no pair of tokens twice.
    "reads the output": (
        {"custom_params": {"ngram_size": 2, "window_size": 12}, "frequency_penalty": 0.2},
        NoRepeat().to_str(),
    ),
}


def ask(server: Server, ids: Sequence[int], options: dict[str, Any], **top_level: Any) -> Reply:
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, **options}
    return server.post("/generate", {"input_ids": list(ids), "sampling_params": sampling, **top_level})


def assert_follows(reference: Reference, ids: Sequence[int], options: dict[str, Any], reply: Reply) -> None:
    """Every token is the best one after adjustment, up to a near tie."""
    tokens = reply["output_ids"]
    rows = reference.ar_logits([*ids, *tokens])
    for index, token in enumerate(tokens):
        logits = adjusted(rows[len(ids) + index - 1], ids, tokens[:index], options)
        if int(logits.argmax()) != token:
            assert float(top2_gap(logits)) < NEAR_TIE, (index, token, int(logits.argmax()), float(top2_gap(logits)))
            return


@pytest.fixture(scope="module", params=["orthrus", "narrow"])
def served(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


def chosen() -> list[tuple[int, ...]]:
    return [prompt_of("prose"), prompt_of("json")]


def test_penalties_and_biases_hold_at_every_position(served: Server, reference: Reference) -> None:
    """Options of all kinds in one batch; some blocks hold a token twice."""
    requests = [(ids, options) for options in PENALTIES.values() for ids in chosen()]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda request: ask(served, *request), requests))
    for (ids, options), reply in zip(requests, replies, strict=True):
        assert_follows(reference, ids, options, reply)
    assert any(len(set(reply["output_ids"])) < len(reply["output_ids"]) for reply in replies)
    assert any(reply["meta_info"]["spec_verify_ct"] < len(reply["output_ids"]) / 2 for reply in replies)


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_processors_hold_at_every_position(served: Server, reference: Reference, name: str) -> None:
    options, processor = CUSTOM[name]
    with ThreadPoolExecutor(4) as pool:
        other = pool.submit(ask, served, prompt_of("chat"), {})
        replies = list(pool.map(lambda ids: ask(served, ids, options, custom_logit_processor=processor), chosen()))
    for ids, reply in zip(chosen(), replies, strict=True):
        assert_follows(reference, ids, options, reply)
    assert_follows(reference, prompt_of("chat"), {}, other.result())


LOGPROBS: dict[str, dict[str, Any]] = {
    "output": {"return_logprob": True},
    "top": {"return_logprob": True, "top_logprobs_num": 3},
    "ids": {"return_logprob": True, "token_ids_logprob": [5, 300, 12]},
    "input": {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2, "token_ids_logprob": [7]},
    "a part of the input": {"return_logprob": True, "logprob_start_len": 5},
}
LISTS = ("token_logprobs", "top_logprobs", "token_ids_logprobs")


def flat(meta: dict[str, Any]) -> Iterator[tuple[str, float | None, int]]:
    """Every log probability with its name and token."""
    for side in ("input", "output"):
        for kind in LISTS:
            for index, place in enumerate(meta.get(f"{side}_{kind}") or ()):
                entries = [place] if kind == "token_logprobs" else place or ()
                for value, token, _ in entries:
                    yield f"{side} {kind} {index}", value, token


@pytest.mark.parametrize("name", LOGPROBS)
def test_log_probabilities_are_plain_sglangs(served: Server, plain: Server, name: str) -> None:
    for server in (served, plain):
        server.get("/flush_cache?timeout=30")
    with ThreadPoolExecutor(4) as pool:
        without = pool.submit(ask, served, prompt_of("arith"), {})
        ours = list(pool.map(lambda ids: ask(served, ids, {}, **LOGPROBS[name]), chosen()))
    assert "output_token_logprobs" not in without.result()["meta_info"]
    for ids, reply in zip(chosen(), ours, strict=True):
        expected = ask(plain, ids, {}, **LOGPROBS[name])
        assert_same_log_probabilities(reply, expected)


def assert_same_log_probabilities(reply: Reply, expected: Reply) -> None:
    assert reply["output_ids"] == expected["output_ids"]
    found, wanted = list(flat(reply["meta_info"])), list(flat(expected["meta_info"]))
    assert len(found) == len(wanted) >= len(reply["output_ids"])
    for (place, value, token), (other_place, other_value, other_token) in zip(found, wanted, strict=True):
        assert place == other_place
        if value is None or other_value is None:
            assert value is other_value
            continue
        assert abs(value - other_value) < 1e-4 or abs(value - other_value) < 1e-5 * abs(other_value), place
        # Of equals either may come first.
        assert token == other_token or "top_" in place


def test_neighbours_ask_for_different_numbers_of_log_probabilities(orthrus: Server, plain: Server) -> None:
    """In one prefill batch; large numbers are selected for each request by itself."""
    for server in (orthrus, plain):
        server.get("/flush_cache?timeout=30")
    numbers = [3, 200, 0, 4096]
    ids = [prompt_of("prose"), prompt_of("json"), prompt_of("chat"), prompt_of("arith")]
    body = {
        "input_ids": [list(own) for own in ids],
        "sampling_params": {"temperature": 0, "max_new_tokens": 3},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": numbers,
    }
    for own, number, reply, expected in zip(
        ids, numbers, orthrus.post("/generate", body), plain.post("/generate", body), strict=True
    ):
        assert_same_log_probabilities(reply, expected)
        top = reply["meta_info"].get("input_top_logprobs") or ()
        assert [len(place or ()) for place in top[1:]] == [number] * (len(own) - 1 if number else 0)


@pytest.mark.parametrize("name", ["output", "top", "ids"])
def test_log_probabilities_under_a_grammar(orthrus: Server, plain: Server, name: str) -> None:
    """Alone, so that the last of the batch's requests ends behind a round that has begun."""
    options = {"regex": r"(yes|no), because [a-z]{3,12} is (one|two|three)\."}
    ours, expected = both(ask, (orthrus, plain), prompt_of("chat"), options, **LOGPROBS[name])
    assert expected["meta_info"]["finish_reason"]["type"] == "stop"
    assert_same_log_probabilities(ours, expected)
    assert ask(orthrus, prompt_of("chat"), options)["output_ids"] == ours["output_ids"]


def test_log_probabilities_of_sampled_tokens_are_those_before_filters(served: Server, reference: Reference) -> None:
    ids, options = prompt_of("prose"), {"temperature": 0.8, "top_k": 20, "frequency_penalty": 0.3}
    reply = ask(served, ids, options, return_logprob=True)
    tokens = reply["output_ids"]
    rows = reference.ar_logits([*ids, *tokens])
    for index, (value, token, _) in enumerate(reply["meta_info"]["output_token_logprobs"]):
        logits = adjusted(rows[len(ids) + index - 1], ids, tokens[:index], options)
        assert token == tokens[index]
        assert abs(value - float(torch.log_softmax(logits / 0.8, dim=-1)[token])) < 1e-4


def test_openai_logprobs(served: Server, plain: Server) -> None:
    found = []
    for server in (served, plain):
        client = openai.Client(api_key="none", base_url=f"{server.url}/v1")
        chat = client.chat.completions.create(
            model="default",
            messages=[{"role": "user", "content": "Hello"}],
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            max_tokens=12,
        )
        text = client.completions.create(model="default", prompt="Step 1:", temperature=0, logprobs=2, max_tokens=8)
        of_chat, of_text = chat.choices[0].logprobs, text.choices[0].logprobs
        assert of_chat is not None and of_chat.content is not None and of_text is not None
        found.append(([(c.token, c.logprob) for c in of_chat.content], of_text.token_logprobs))
    (ours, our_text), (theirs, their_text) = found
    assert [token for token, _ in ours] == [token for token, _ in theirs]
    assert [p for _, p in ours] == pytest.approx([p for _, p in theirs], abs=1e-4)
    assert our_text == pytest.approx(their_text, abs=1e-4)


def test_select_rests_on_log_probabilities(served: Server, plain: Server) -> None:
    """By its default method; the two others of SGLang's frontend die on plain SGLang as well."""

    @sgl.function
    def pick(s: Any, question: str) -> Any:
        s += sgl.user(question)
        s += sgl.assistant(sgl.select("answer", choices=["Hello", "Goodbye", "42"]))

    found = []
    for server in (served, plain):
        state = pick.run("Bye", backend=sgl.RuntimeEndpoint(server.url, chat_template_name="qwen"))
        found.append((state["answer"], state.get_meta_info("answer")["normalized_prompt_logprobs"]))
    (ours, logprobs), (theirs, other_logprobs) = found
    assert ours == theirs
    assert logprobs == pytest.approx(other_logprobs, abs=1e-4) and len(set(logprobs)) == 3


def test_scores_are_plain_sglangs(served: Server, plain: Server) -> None:
    body = {"model": "default", "query": "Hello", "items": ["a", "b"], "label_token_ids": [5, 6]}
    ours, theirs = both(lambda server: server.post("/v1/score", body)["scores"], (served, plain))
    assert [p for row in ours for p in row] == pytest.approx([p for row in theirs for p in row], rel=1e-3)


def test_several_samples_of_a_request(orthrus: Server) -> None:
    sampling = {"temperature": 1.5, "max_new_tokens": 24, "n": 4}
    replies = orthrus.post("/generate", {"input_ids": list(prompt_of("prose")), "sampling_params": sampling})
    assert len(replies) == 4
    assert len({tuple(reply["output_ids"]) for reply in replies}) > 1


# Nano says: It was a stormy morning ...
STOPPING: dict[str, dict[str, Any]] = {
    "stop": {"stop": ["xyz", "morning"]},
    "stop, kept": {"stop": "morning", "no_stop_trim": True},
    "stop_regex": {"stop_regex": "m[aeiou]r"},
    "stop_token_ids": {"stop_token_ids": [1289]},
    "stop_token_ids, kept": {"stop_token_ids": [1289], "no_stop_trim": True},
    "special tokens": {"skip_special_tokens": False, "stop": "nothing"},
    "special tokens at the end": {"skip_special_tokens": False, "no_stop_trim": True},
}


@pytest.mark.parametrize("name", STOPPING)
def test_stops_are_plain_sglangs(orthrus: Server, plain: Server, name: str) -> None:
    """The strings lie inside the first block. What a regex matches is never cut off."""
    ids = prompt_of("qa" if "special" in name else "prose")
    ours, theirs = both(ask, (orthrus, plain), ids, STOPPING[name])
    assert ours["output_ids"] == theirs["output_ids"] and ours["text"] == theirs["text"]
    assert ours["meta_info"]["finish_reason"] == theirs["meta_info"]["finish_reason"]
    assert ours["meta_info"]["finish_reason"]["type"] == "stop"
    is_cut_off = name in ("stop", "stop_token_ids")
    assert ("special" in name or is_cut_off) == ("morning" not in ours["text"])
    assert ("end" in name) == ours["text"].endswith("<|im_end|>")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("overlap", [(), ("--disable-overlap-schedule",)], ids=["overlap", "no overlap"])
def test_adjustments_against_plain_sglang(tmp_path: Path, overlap: tuple[str, ...]) -> None:
    """100 prompts, every option alone and all together, batch sizes 1 and 8.

    Without overlap, plain SGLang leaves the order of different penalties to the addresses of classes, so that a patched
    one answers to all options together (patches/0023).
    """
    chosen = [prompt.ids for prompt in load_prompts(NANO, 100)[:100]]
    alone = [(ids, options) for name, options in PENALTIES.items() if name != "all" for ids in chosen]
    together = [(ids, PENALTIES["all"]) for ids in chosen]
    asked = alone + together
    exported = export_ar(NANO, tmp_path / "nano-ar")
    patched = patched_sglang("0023-penalties-in-one-order", tmp_path / "overlay")

    def collect(
        model: Path, args: Sequence[str], env: dict[str, str], requests: Sequence[Any], sizes: Sequence[int]
    ) -> list[list[Reply]]:
        with Server(model, *TEST_ARGS, *args, env={**SETUP.env, **env}) as server:
            return [_all(lambda request: ask(server, *request), requests, size) for size in sizes]

    plain_args = ("--disable-overlap-schedule",)
    (expected,) = collect(exported, plain_args, plain_env(), alone, (1,))
    expected += collect(exported, plain_args, {**plain_env(), **patched}, together, (1,))[0]
    ours = collect(NANO, ("--speculative-algorithm", "ORTHRUS", *overlap), {}, asked, (1, 8))
    reference = Reference(NANO)
    for replies in ours:
        near_ties = 0
        for (ids, options), reply, wanted in zip(asked, replies, expected, strict=True):
            divergence = find_divergence(wanted["output_ids"], reply["output_ids"], lambda common: 0.0)
            if divergence is not None:
                assert_follows(reference, ids, options, reply)
                near_ties += 1
        assert near_ties * 200 <= len(asked)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_plain_sglang_penalises_late_under_overlap_until_it_is_patched(tmp_path: Path) -> None:
    """patches/0005: without overlap, with it, and with it on a copy of SGLang that has the patch."""
    exported = export_ar(NANO, tmp_path / "nano-ar")
    patched = patched_sglang("0005-penalties-under-overlap", tmp_path / "overlay")

    def answers(args: Sequence[str], env: dict[str, str]) -> list[list[int]]:
        with Server(exported, *TEST_ARGS, *args, env={**SETUP.env, **plain_env(), **env}) as server:
            return [
                ask(server, prompt.ids, PENALTIES[name])["output_ids"]
                for prompt in load_prompts(NANO, 9)
                for name in ("frequency", "presence", "repetition")
            ]

    wanted = answers(("--disable-overlap-schedule",), {})
    assert answers((), {}) != wanted, "SGLang has closed the gap: drop the patch"
    assert answers((), patched) == wanted


def _all(function: Callable[[Any], Reply], items: Sequence[Any], in_flight: int) -> list[Reply]:
    with ThreadPoolExecutor(in_flight) as pool:
        return list(pool.map(function, items))
