"""The HTTP interfaces: batches, several answers, streams, usage, tool calls and reasoning equal plain SGLang's."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import requests

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import REQUESTS
from sglang_orthrus.cli.server import Server
from tests.e2e.chats import CHAT, assembled, chat, content, events
from tests.e2e.helpers import Reply, assert_same_output, both, generate, prompt_of, tokens_per_cycle

pytestmark = pytest.mark.e2e

COMPLETIONS = "/v1/completions"
STEPS = "Step 1: 3 + 4 = 7\nStep 2:"
FAMILIES = ("json", "arith", "tools")
GREEDY = {"temperature": 0, "max_new_tokens": 100}


def tokens(answer: dict[str, Any]) -> tuple[int, ...]:
    """The counts of prompt, completion and all tokens."""
    return tuple(answer["usage"][f"{kind}_tokens"] for kind in ("prompt", "completion", "total"))


# -- /generate


BATCHES: dict[str, dict[str, Any]] = {
    "ids": {"sampling_params": GREEDY},
    "a list of sampling parameters": {
        "sampling_params": [
            GREEDY,
            {"temperature": 0, "max_new_tokens": 7},
            {"temperature": 0, "max_new_tokens": 60, "stop": [": "]},
        ]
    },
    "two answers each": {"sampling_params": {**GREEDY, "n": 2}},
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_in_one_request(orthrus: Server, plain: Server, reference: Reference, name: str) -> None:
    prompts = [prompt_of(family) for family in FAMILIES]
    body = {"input_ids": [list(ids) for ids in prompts], **BATCHES[name]}
    ours, theirs = both(Server.post, (orthrus, plain), "/generate", body)
    copies = len(theirs) // len(prompts)
    assert len(ours) == len(theirs) == (6 if "two" in name else 3)
    for number, (expected, reply) in enumerate(zip(theirs, ours, strict=True)):
        assert_same_output(reference, prompts[number // copies], expected, reply)
        for count in ("prompt_tokens", "completion_tokens"):
            assert reply["meta_info"][count] == expected["meta_info"][count]
    assert tokens_per_cycle(ours[0]) > 3


def test_a_batch_of_texts_in_one_stream(orthrus: Server, plain: Server) -> None:
    body = {"text": [STEPS, "Hello", "The customer is"], "sampling_params": GREEDY}
    texts = []
    for server in (orthrus, plain):
        last = {event["index"]: event["text"] for event in events(server, "/generate", body)}
        texts.append([last[index] for index in sorted(last)])
    assert texts[0] == texts[1]
    assert texts[0] == [reply["text"] for reply in orthrus.post("/generate", body)]


# -- /v1/completions

COMPLETION_REQUESTS: dict[str, dict[str, Any]] = {
    "one": {"prompt": STEPS},
    "texts": {"prompt": [STEPS, "Hello", "The customer is"]},
    "ids": {"prompt": [list(prompt_of(family)) for family in FAMILIES]},
    "two answers": {"prompt": STEPS, "n": 2},
    "two answers each": {"prompt": [STEPS, "Hello"], "n": 2},
    "echo": {"prompt": STEPS, "echo": True},
    "echo of a batch": {"prompt": [STEPS, "Hello"], "echo": True},
    "stop": {"prompt": STEPS, "stop": "Answer"},
    "one token": {"prompt": STEPS, "max_tokens": 1},
}


def completion(name: str) -> dict[str, Any]:
    return {"model": "default", "temperature": 0, "max_tokens": 60, **COMPLETION_REQUESTS[name]}


@pytest.mark.parametrize("name", COMPLETION_REQUESTS)
def test_completions(orthrus: Server, plain: Server, name: str) -> None:
    ours, theirs = both(Server.post, (orthrus, plain), COMPLETIONS, completion(name))
    assert ours["choices"] == theirs["choices"]
    assert ours["usage"] == theirs["usage"]


@pytest.mark.parametrize("name", COMPLETION_REQUESTS)
def test_streamed_completions_add_up(orthrus: Server, plain: Server, name: str) -> None:
    body = {**completion(name), "stream_options": {"include_usage": True}}
    streams = both(events, (orthrus, plain), COMPLETIONS, body)
    whole = plain.post(COMPLETIONS, completion(name))
    for stream in streams:
        assert stream[-1]["choices"] == []
        assert tokens(stream[-1]) == tokens(whole)
        text, finish = defaultdict[int, str](str), dict[int, str | None]()
        for choice in (event["choices"][0] for event in stream[:-1]):
            text[choice["index"]] += choice["text"]
            finish[choice["index"]] = choice["finish_reason"] or finish.get(choice["index"])
        assert text == {choice["index"]: choice["text"] for choice in whole["choices"]}
        assert finish == {choice["index"]: choice["finish_reason"] for choice in whole["choices"]}


def test_the_first_stop_string_of_the_text_ends_it(orthrus: Server, plain: Server) -> None:
    body = {**completion("one"), "stop": ["Answer", "\n"]}
    ours, theirs = both(Server.post, (orthrus, plain), COMPLETIONS, body)
    assert theirs["choices"][0]["matched_stop"] == "\n"
    assert ours["choices"] == theirs["choices"]


def test_continuous_usage_counts_what_was_sent(orthrus: Server) -> None:
    body = {**completion("one"), "prompt": list(prompt_of("json"))}
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = events(orthrus, COMPLETIONS, {**body, "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in stream]
    assert counts == sorted(counts)
    assert counts[-1] == orthrus.post(COMPLETIONS, body)["usage"]["completion_tokens"]
    assert len(counts) < counts[-1]


# -- /v1/chat/completions

QUESTION = [{"role": "user", "content": "What is 47 + 85?"}]
CHAT_REQUESTS: dict[str, dict[str, Any]] = {
    **REQUESTS,
    "required tool": {**REQUESTS["tool"], "tool_choice": "required", "max_tokens": 80},
    "named tool": {
        **REQUESTS["tool"],
        "tool_choice": {"type": "function", "function": {"name": "book_flight"}},
        "max_tokens": 80,
    },
    "no tool": {**REQUESTS["tool"], "tool_choice": "none"},
    "continued": {
        "messages": [*QUESTION, {"role": "assistant", "content": "47 + 85 ="}],
        "continue_final_message": True,
    },
    "stopped": {"messages": QUESTION, "stop": ["12"], "seed": 5, "max_completion_tokens": 50},
    "thinking": {"messages": QUESTION, "chat_template_kwargs": {"enable_thinking": True}},
}


@pytest.mark.parametrize("name", CHAT_REQUESTS)
def test_chat_in_two_equal_answers(orthrus: Server, plain: Server, name: str) -> None:
    ours, theirs = both(chat, (orthrus, plain), {**CHAT_REQUESTS[name], "n": 2})
    for choice, expected in zip(ours["choices"], theirs["choices"], strict=True):
        assert content(choice["message"]) == content(expected["message"])
        assert choice["finish_reason"] == expected["finish_reason"]
        assert choice["matched_stop"] == expected["matched_stop"]
    assert content(ours["choices"][0]["message"]) == content(ours["choices"][1]["message"])
    assert ours["usage"] == theirs["usage"]


@pytest.mark.parametrize("name", CHAT_REQUESTS)
def test_streamed_chat_adds_up(orthrus: Server, plain: Server, name: str) -> None:
    whole = chat(plain, CHAT_REQUESTS[name])
    body = {"model": "default", "temperature": 0, **CHAT_REQUESTS[name], "stream_options": {"include_usage": True}}
    ours, theirs = both(events, (orthrus, plain), CHAT, body)
    assert assembled(ours) == assembled(theirs)
    assert tokens(ours[-1]) == tokens(theirs[-1]) == tokens(whole)
    (message,) = assembled(ours).values()
    assert message.pop("finish") == whole["choices"][0]["finish_reason"]
    # Of a call that is cut off, SGLang streams what there is, and returns none at the end.
    if whole["choices"][0]["finish_reason"] != "length":
        assert message == content(whole["choices"][0]["message"])


def test_tool_calls_come_out_of_a_block(orthrus: Server) -> None:
    """The call's name, arguments and end may all lie in one round."""
    (message,) = assembled(events(orthrus, CHAT, {"model": "default", **REQUESTS["tool"]})).values()
    ((name, arguments),) = message["calls"]
    assert (name, json.loads(arguments)) == (
        "book_flight",
        {"origin": "Oslo", "destination": "Madrid", "date": "2027-05-02"},
    )
    assert message["finish"] == "tool_calls"


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_reasoning_is_told_from_the_answer(small: Server, plain: Server, streamed: bool) -> None:
    raw = chat(plain, CHAT_REQUESTS["thinking"])
    text = raw["choices"][0]["message"]["content"]
    parts = plain.post("/separate_reasoning", {"text": text, "reasoning_parser": "qwen3"})
    assert "carry 1" in parts["reasoning_text"] and "132" in parts["text"]

    if streamed:
        body = {"model": "default", **CHAT_REQUESTS["thinking"], "stream_options": {"include_usage": True}}
        stream = events(small, CHAT, body)
        (message,) = assembled(stream).values()
        used = tokens(stream[-1])
    else:
        answer = chat(small, CHAT_REQUESTS["thinking"])
        message = content(answer["choices"][0]["message"])
        used = tokens(answer)
        assert 0 < answer["usage"]["reasoning_tokens"] < answer["usage"]["completion_tokens"]
    assert message["reasoning"].strip() == parts["reasoning_text"].strip()
    assert message["content"].strip() == parts["text"].strip()
    assert used == tokens(raw)


def test_reasoning_can_be_left_in_the_text(small: Server, plain: Server) -> None:
    request = {**CHAT_REQUESTS["thinking"], "separate_reasoning": False}
    ours, theirs = both(lambda server: chat(server, request)["choices"][0]["message"], (small, plain))
    assert content(ours) == content(theirs)


@pytest.mark.parametrize("name", ["tool", "json", "chat"])
def test_a_reasoning_parser_leaves_other_answers_alone(small: Server, plain: Server, name: str) -> None:
    request = {**REQUESTS[name], "chat_template_kwargs": {"enable_thinking": False}}
    ours, theirs = both(lambda server: chat(server, request)["choices"][0]["message"], (small, plain))
    assert content(ours) == content(theirs)
    (message,) = assembled(events(small, CHAT, {"model": "default", **request})).values()
    assert {**message, "finish": None} == {**content(theirs), "finish": None}


# -- interfaces of other vendors

MESSAGES: dict[str, Any] = {"model": "default", "messages": QUESTION, "max_tokens": 80, "temperature": 0}
OTHERS: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    # Path, request, what to compare of the answer.
    "SageMaker": ("/invocations", MESSAGES, lambda answer: (answer["choices"], answer["usage"])),
    "Vertex": (
        "/vertex_generate",
        {"instances": [{"text": STEPS}, {"text": "Hello"}], "parameters": {"sampling_params": GREEDY}},
        lambda answer: [reply["output_ids"] for reply in answer["predictions"]],
    ),
    "Anthropic": ("/v1/messages", MESSAGES, lambda answer: (answer["content"], answer["usage"])),
    "Ollama": (
        "/api/generate",
        {"model": "default", "prompt": STEPS, "stream": False, "options": {"temperature": 0, "num_predict": 40}},
        lambda answer: (answer["response"], answer["eval_count"]),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_interfaces_of_other_vendors(orthrus: Server, plain: Server, name: str) -> None:
    path, body, compared = OTHERS[name]
    ours, theirs = both(lambda server: compared(server.post(path, body)), (orthrus, plain))
    assert ours == theirs
    assert ours


def test_anthropic_streams_add_up(orthrus: Server, plain: Server) -> None:
    texts = []
    for server in (orthrus, plain):
        deltas = [event.get("delta", {}) for event in events(server, "/v1/messages", MESSAGES)]
        texts.append("".join(delta.get("text", "") for delta in deltas))
    assert texts[0] == texts[1] == plain.post("/v1/messages", MESSAGES)["content"][0]["text"]


def test_responses(orthrus: Server, plain: Server) -> None:
    outputs = []
    for server in (orthrus, plain):
        model = server.get("/v1/models").json()["data"][0]["id"]
        body = {"model": model, "input": QUESTION[0]["content"], "temperature": 0, "max_output_tokens": 80}
        answer: Reply = server.post("/v1/responses", body)
        outputs.append([part["text"] for item in answer["output"] for part in item.get("content") or []])
    assert outputs[0] == outputs[1]
    assert "132" in outputs[0][-1]


# -- refusals

REFUSED_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"query": "Hello", "documents": ["a", "b"]},
    "/v1/decisions": {
        "model": "default",
        "input": "Hello",
        "questions": [{"id": "q", "type": "yes_no", "question": "Is it?"}],
    },
    "/v1/embeddings": {"model": "default", "input": "Hello"},
    "/v1/classify": {"model": "default", "input": "Hello"},
    "/classify": {"text": "Hello"},
    "/encode": {"text": "Hello"},
}


@pytest.mark.parametrize("path", REFUSED_ROUTES)
def test_routes_that_need_another_model_are_refused(orthrus: Server, path: str) -> None:
    response = requests.post(orthrus.url + path, json=REFUSED_ROUTES[path], timeout=60)
    assert response.status_code == 400, response.text
    assert response.text
    assert generate(orthrus, prompt_of("arith"), 8)["meta_info"]["completion_tokens"] == 8


def test_a_refusal_ends_a_stream_with_an_error(orthrus: Server) -> None:
    body = {"text": STEPS, "stream": True, "return_routed_experts": True}
    response = requests.post(f"{orthrus.url}/generate", json=body, timeout=60)
    assert "return_routed_experts" in response.text and "ORTHRUS" in response.text


def turns(server: Server, **options: Any) -> list[Any]:
    """Three turns of a session; the first ends inside a round."""
    session = server.post("/open_session", {"capacity_of_str_len": 1000, **options})
    found: list[Any] = []
    rid = None
    for text in (STEPS, " Then 4 + 5 =", " So"):
        body = {"text": text, "sampling_params": GREEDY, "session_params": {"id": session, "rid": rid}}
        if not found:
            body["sampling_params"] = {**GREEDY, "stop": ["\n"]}
        reply = server.post("/generate", body)
        rid = reply["meta_info"]["id"]
        found.append((reply["text"], reply["output_ids"], reply["meta_info"]["prompt_tokens"]))
    requests.post(f"{server.url}/close_session", json={"session_id": session}, timeout=60).raise_for_status()
    return found


def test_a_session_goes_on_from_the_end_of_the_answer(orthrus: Server, plain: Server) -> None:
    """And not from what the last round committed beyond it."""
    ours, theirs = both(turns, (orthrus, plain))
    assert ours == theirs
