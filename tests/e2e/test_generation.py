"""Greedy generation over HTTP: ORTHRUS gives plain SGLang's answers, in fewer steps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from openai import OpenAI

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import REQUESTS
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import (
    assert_same_output,
    assert_same_outputs,
    both,
    generate,
    generate_together,
    prompt_of,
    prompts,
    tokens_per_cycle,
    truth,
)
from tests.servers import CONTEXT_LENGTH

pytestmark = pytest.mark.e2e

BLOCK = 32


def chat(server: Server, **request: Any) -> Any:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)
    return client.chat.completions.create(model="default", **request)


@pytest.mark.parametrize("name", REQUESTS)
def test_chat_completions_equal_plain_ones(orthrus: Server, plain: Server, name: str) -> None:
    ours, theirs = both(lambda server: chat(server, **REQUESTS[name]).choices[0], (orthrus, plain))
    assert ours.finish_reason == theirs.finish_reason
    assert ours.message.content == theirs.message.content
    calls = [
        [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        for choice in (ours, theirs)
    ]
    assert calls[0] == calls[1]
    assert calls[0] or ours.message.content


def test_text_completions_equal_plain_ones(orthrus: Server, plain: Server) -> None:
    texts = []
    for server in (orthrus, plain):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        answer = client.completions.create(
            model="default", prompt="Step 1: 3 + 4 = 7\nStep 2:", max_tokens=24, temperature=0
        )
        texts.append(answer.choices[0].text)
    assert texts[0] == texts[1]


def test_a_stream_delivers_a_round_at_a_time(orthrus: Server) -> None:
    ids = prompt_of("json")
    whole = generate(orthrus, ids)
    body = {
        "input_ids": list(ids),
        "sampling_params": {"temperature": 0, "max_new_tokens": 256},
        "stream": True,
    }
    lengths, text = [], ""
    with requests.post(f"{orthrus.url}/generate", json=body, stream=True, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                lengths.append(chunk["meta_info"]["completion_tokens"])
                text = chunk["text"]
    assert text == whole["text"]
    assert lengths == sorted(lengths) and lengths[-1] == len(whole["output_ids"])
    # One chunk for the prefill's token, one per round, and perhaps one for the end.
    assert len(lengths) <= whole["meta_info"]["spec_verify_ct"] + 2 < len(whole["output_ids"])


def test_requests_of_mixed_lengths_join_and_leave_a_batch(orthrus: Server, plain: Server, reference: Reference) -> None:
    requests_ = [(prompt.ids, 5 + 23 * (number % 7)) for number, prompt in enumerate(prompts())]
    replies = generate_together(orthrus, requests_, in_flight=6)
    assert_same_outputs(reference, plain, requests_, replies)


def test_max_tokens_cuts_inside_a_block(orthrus: Server) -> None:
    ids = prompt_of("json", 1)
    whole = generate(orthrus, ids)["output_ids"]
    for length in (1, 2, 3, 7, 11, len(whole) - 1):
        reply = generate(orthrus, ids, length)
        assert reply["output_ids"] == whole[:length]
        assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": length}
        assert reply["meta_info"]["completion_tokens"] == length


@pytest.mark.parametrize("family", ["json", "tools", "arith", "prose"])
def test_end_of_text_inside_a_block_ends_the_answer(
    orthrus: Server, plain: Server, reference: Reference, family: str
) -> None:
    ids = prompt_of(family)
    reply = generate(orthrus, ids)
    assert_same_output(reference, ids, truth(plain, ids), reply)
    assert reply["meta_info"]["finish_reason"]["type"] == "stop"
    eos = reply["meta_info"]["finish_reason"]["matched"]
    assert reply["output_ids"].index(eos) == len(reply["output_ids"]) - 1


def test_stop_token_ids_cut_inside_a_block(orthrus: Server, plain: Server, reference: Reference) -> None:
    ids = prompt_of("json", 2)
    whole = generate(orthrus, ids)["output_ids"]
    for position in (0, 1, 5, len(whole) // 2):
        stop: dict[str, Any] = {"stop_token_ids": [whole[position]]}
        reply = generate(orthrus, ids, **stop)
        assert reply["output_ids"] == whole[: whole.index(whole[position]) + 1]
        assert_same_output(reference, ids, generate(plain, ids, **stop), reply)


def test_stop_strings_cut_inside_a_block(orthrus: Server, plain: Server) -> None:
    ids = prompt_of("json", 2)
    text = generate(plain, ids)["text"]
    for stop in (text[3:6], text[len(text) // 2 : len(text) // 2 + 4], text[-5:-2]):
        ours, theirs = both(generate, (orthrus, plain), ids, stop=[stop])
        assert ours["text"] == theirs["text"] == text[: text.index(stop)]
        assert ours["meta_info"]["finish_reason"] == theirs["meta_info"]["finish_reason"]


def test_a_reused_prefix_gives_the_answer_of_a_cold_run(orthrus: Server, reference: Reference) -> None:
    """The radix tree must hold AR-view K/V only, for prompts and for generated tokens."""
    ids = prompt_of("qa")
    orthrus.get("/flush_cache?timeout=30")
    cold = generate(orthrus, ids)
    assert cold["meta_info"]["cached_tokens"] == 0
    warm = generate(orthrus, ids)
    assert warm["meta_info"]["cached_tokens"] > 0
    assert_same_output(reference, ids, cold, warm)

    follow_up = [*ids, *cold["output_ids"], *prompt_of("arith")]
    warm = generate(orthrus, follow_up)
    assert warm["meta_info"]["cached_tokens"] >= len(ids) + len(cold["output_ids"]) - 1
    orthrus.get("/flush_cache?timeout=30")
    cold = generate(orthrus, follow_up)
    assert cold["meta_info"]["cached_tokens"] == 0
    assert_same_output(reference, follow_up, cold, warm)


def test_requests_near_the_context_limit(orthrus: Server, plain: Server, reference: Reference) -> None:
    """Blocks that would reach beyond the context, alone and together."""
    filler = prompt_of("prose") + prompt_of("qa")
    long = (filler * (CONTEXT_LENGTH // len(filler) + 1))[:CONTEXT_LENGTH]
    requests_ = [(long[: CONTEXT_LENGTH - room], room) for room in (8, BLOCK - 1, BLOCK + 1, 70)]
    for in_flight in (1, len(requests_)):
        replies = generate_together(orthrus, requests_, in_flight)
        assert_same_outputs(reference, plain, requests_, replies)


@pytest.mark.parametrize("family", ["json", "tools"])
def test_drafts_are_accepted(orthrus: Server, narrow: Server, family: str) -> None:
    requests_ = [(prompt.ids, 256) for prompt in prompts() if prompt.family == family]
    for replies in both(generate_together, (orthrus, narrow), requests_, 1):
        assert sum(map(tokens_per_cycle, replies)) / len(replies) > 4


def test_accept_length_is_reported_everywhere(orthrus: Server) -> None:
    meta = generate(orthrus, prompt_of("json"))["meta_info"]
    assert meta["spec_verify_ct"] > 0
    assert meta["spec_accept_length"] == pytest.approx(meta["completion_tokens"] / meta["spec_verify_ct"])
    assert meta["spec_accept_length"] > 2
    values = [
        float(line.split()[-1])
        for line in orthrus.get("/metrics").text.splitlines()
        if line.startswith("sglang:spec_accept_length{")
    ]
    assert values and max(values) > 1
    assert "accept len: " in orthrus.log_path.read_text()
