"""Hostile requests to every interface that generates. Own generators: pure, seeded, without further packages."""

from __future__ import annotations

import base64
import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.volume.fuzz.grammars import constraint, schema
from benchmarks.volume.fuzz.values import TEXTS, biases, ids, value

SMALL = 8  # tokens, where a request leaves the limit alone


@dataclass(frozen=True)
class Hostile:
    """A request as bytes.

    Attributes:
        kind: where it came from and what was changed; requests of one kind that ends a server are sent once.
        source: "own", "schemathesis" or "hypothesis".
    """

    number: int
    kind: str
    path: str
    payload: bytes
    method: str = "POST"
    source: str = "own"
    content_type: str = "application/json"

    def as_json(self) -> dict[str, Any]:
        """For a report: the payload as text, or as base64 if it is none."""
        found: dict[str, Any] = {"number": self.number, "kind": self.kind, "method": self.method, "path": self.path}
        try:
            text = self.payload.decode()
            return found | {"payload": text if len(text) < 20_000 else f"{text[:2000]}... {len(text)} characters"}
        except UnicodeDecodeError:
            return found | {"payload_base64": base64.b64encode(self.payload[:20_000]).decode()}


def encoded(body: Any) -> bytes:
    """JSON with Python's NaN and infinities, and surrogates escaped."""
    return json.dumps(body).encode()


_SAMPLING = {"temperature": 0, "max_new_tokens": SMALL}
_CHAT = [{"role": "user", "content": "What is 3 + 4?"}]
_TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
_OPENAI = {"model": "default", "temperature": 0, "max_tokens": SMALL}

BASES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "Step 1:", "sampling_params": _SAMPLING},
    "/v1/completions": {"prompt": "Step 1:", **_OPENAI},
    "/v1/chat/completions": {"messages": _CHAT, **_OPENAI},
    "/v1/responses": {"model": "default", "input": "Hello", "temperature": 0, "max_output_tokens": SMALL},
    "/v1/messages": {"model": "default", "messages": _CHAT, "max_tokens": SMALL, "temperature": 0},
    "/v1/score": {"model": "default", "query": "Is it", "items": [" so", " not"], "label_token_ids": [300, 301]},
    "/v1/rerank": {"query": "Hello", "documents": ["a", "b"]},
    "/v1/classify": {"model": "default", "input": "Hello"},
    "/classify": {"text": "Hello"},
    "/encode": {"text": "Hello"},
    "/v1/embeddings": {"model": "default", "input": "Hello"},
    "/v1/tokenize": {"model": "default", "prompt": "Hello"},
    "/v1/detokenize": {"model": "default", "tokens": [5, 6]},
    "/v1/messages/count_tokens": {"model": "default", "messages": _CHAT},
    "/invocations": {"messages": _CHAT, **_OPENAI},
    "/vertex_generate": {"instances": [{"text": "Hello"}], "parameters": {"sampling_params": _SAMPLING}},
    "/api/generate": {"model": "default", "prompt": "Hello", "stream": False, "options": {"num_predict": SMALL}},
    "/api/chat": {"model": "default", "messages": _CHAT, "stream": False, "options": {"num_predict": SMALL}},
    "/open_session": {"capacity_of_str_len": 1000},
    "/close_session": {"session_id": "nobody"},
    "/abort_request": {"rid": "nobody"},
    "/parse_function_call": {"text": "Hello", "tool_call_parser": "qwen25", "tools": [_TOOL]},
    "/separate_reasoning": {"text": "<think>a</think>b", "reasoning_parser": "qwen3"},
}
_WEIGHTS = (42, 14, 20, 4, 4, *[1] * (len(BASES) - 5))

_SAMPLING_FIELDS = (
    *("max_new_tokens", "min_new_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k"),
    *("min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "n", "beam_width", "ignore_eos"),
    *("skip_special_tokens", "spaces_between_special_tokens", "no_stop_trim", "stream_interval", "logit_bias"),
    *("sampling_seed", "custom_params", "watermark", "json_schema", "regex", "ebnf", "structural_tag", "unknown"),
)
_OPENAI_FIELDS = (
    *("max_tokens", "min_tokens", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p"),
    *(
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "n",
        "best_of",
        "ignore_eos",
        "logit_bias",
        "seed",
    ),
    *("logprobs", "top_logprobs", "echo", "suffix", "stream", "stream_options", "response_format", "regex", "ebnf"),
    *("json_schema", "custom_params", "custom_logit_processor", "session_params", "lora_path", "rid", "priority"),
    *("skip_special_tokens", "no_stop_trim", "tools", "tool_choice", "messages", "prompt", "model", "user"),
    *("chat_template_kwargs", "continue_final_message", "reasoning_effort", "max_completion_tokens", "input_ids"),
    *("parallel_tool_calls", "separate_reasoning", "extra_key", "cache_salt", "return_hidden_states", "watermark"),
    *("return_token_ids", "return_output_ids_in_sglext", "data_parallel_rank", "routed_dp_rank", "bootstrap_room"),
)
_GENERATE_FIELDS = (
    *("rid", "text", "input_ids", "input_embeds", "image_data", "audio_data", "video_data", "mm_hashes", "modalities"),
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "return_text_in_logprobs"),
    *("stream", "log_metrics", "return_hidden_states", "return_routed_experts", "routed_experts_start_len"),
    *("session_params", "session_id", "lora_path", "custom_logit_processor", "bootstrap_host", "bootstrap_room"),
    *("require_reasoning", "priority", "extra_key", "data_parallel_rank", "routed_dp_rank", "conversation_id"),
    *("return_flat_raw_top_logprobs", "return_sampling_mask", "sampling_logprobs_mode", "sampling_params", "no_logs"),
    *("return_prompt_token_ids", "token_type_ids", "return_bytes", "return_entropy", "cache_salt", "watermark"),
)


def request(seed: int, number: int) -> Hostile:
    """The hostile request of that number."""
    random = Random(f"fuzz/{seed}/{number}")
    path = random.choices(tuple(BASES), _WEIGHTS)[0]
    body = copy.deepcopy(BASES[path])
    maker = random.choices((_fields, _grammar, _tokens, _logprobs, _pair, _whole), (50, 24, 8, 6, 4, 8))[0]
    if path not in ("/generate", "/v1/completions", "/v1/chat/completions") and maker in (_tokens, _logprobs, _pair):
        maker = _fields
    changed, sent = maker(random, path, body)
    payload = sent if isinstance(sent, bytes) else encoded(sent)
    return Hostile(number, f"{path} {changed}", path, payload)


def _fields(random: Random, path: str, body: dict[str, Any]) -> tuple[str, Any]:
    """One to three fields hold what they should not."""
    changed = []
    for _ in range(random.choices((1, 2, 3), (70, 20, 10))[0]):
        target, names, prefix = _target(random, path, body)
        name = random.choice((*names, *target)) if names else random.choice((*target, "unknown"))
        target[name] = _hostile(random, name)
        changed.append(prefix + name)
    return ", ".join(changed), body


def _target(random: Random, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """Where to change something, and the fields that may stand there."""
    if path == "/generate":
        if isinstance(body.get("sampling_params"), dict) and random.random() < 0.6:
            return body["sampling_params"], _SAMPLING_FIELDS, "sampling_params."
        return body, _GENERATE_FIELDS, ""
    for name in ("options", "parameters"):
        if isinstance(body.get(name), dict) and random.random() < 0.5:
            return body[name], (), f"{name}."
    return body, _OPENAI_FIELDS if "temperature" in body else (), ""


def _hostile(random: Random, name: str) -> Any:
    """A value that knows what the field is about, or any."""
    if random.random() < 0.4:
        return value(random)
    special: dict[str, Callable[[], Any]] = {
        "logit_bias": lambda: biases(random),
        "stop_token_ids": lambda: ids(random),
        "token_ids_logprob": lambda: ids(random),
        "input_ids": lambda: ids(random),
        "tokens": lambda: ids(random),
        "label_token_ids": lambda: ids(random),
        "prompt": lambda: random.choice((ids(random), [ids(random)], random.choice(TEXTS), [random.choice(TEXTS)] * 3)),
        "stop": lambda: random.choice(([""], ["a"] * 40, ["a" * 3000], [None], random.choice(TEXTS))),
        "stop_regex": lambda: random.choice(("", "[", "(a*)*b", "a{3000}", ".*", ["a"] * 40, "(?=a)", "\\")),
        "custom_logit_processor": lambda: random.choice(("", "x", '{"callable": "00"}', '{"callable": "zz"}', "{}")),
        "custom_params": lambda: random.choice(({"token_ids": ids(random)}, {"__req__": 1}, {"a": {"b": {}}})),
        "session_params": lambda: {
            "id": random.choice(("nobody", None, 5)),
            "rid": random.choice((None, "x")),
            "offset": random.choice((0, -5, 10**9)),
        },
        "n": lambda: random.choice((0, -1, 2, 200, 1.5)),
        "rid": lambda: random.choice(("same", "", ["a", "b"], "x" * 5000, 5)),
        "response_format": lambda: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema(random)}},
        "tools": lambda: [
            {"type": "function", "function": {"name": "f", "strict": True, "parameters": schema(random)}}
        ],
        "tool_choice": lambda: random.choice(("required", {"type": "function", "function": {"name": "g"}}, "sideways")),
        "messages": lambda: random.choice(
            (
                [{"role": "user", "content": random.choice(TEXTS)}],
                [{"role": random.choice(("tool", "nobody", "system", "assistant"))}],
                [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}],
                [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
                _CHAT * 300,
            )
        ),
        "text": lambda: random.choice((random.choice(TEXTS), [random.choice(TEXTS)] * 2, "a " * 3000, [])),
    }
    return special[name]() if name in special else value(random)


def _grammar(random: Random, path: str, body: dict[str, Any]) -> tuple[str, Any]:
    name, wanted = constraint(random)
    sampled = {"temperature": random.choice((0, 0, 1.0))}
    kind = f"grammar: {name}"
    if path == "/generate":
        body["sampling_params"] |= wanted | sampled
        extra = random.choices(
            ({}, {"min_new_tokens": 5}, {"ignore_eos": True}, {"stop_token_ids": [300]}), (85, 5, 5, 5)
        )
        body["sampling_params"] |= extra[0]
        return kind, body
    if path == "/v1/completions":
        body |= {key: text for key, text in wanted.items() if key != "structural_tag"} | sampled
        return kind, body
    form = random.choice(("response_format", "tools", "own"))
    if form == "response_format":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema(random)}}
    elif form == "tools":
        function = {"name": "f", "strict": random.random() < 0.7, "parameters": schema(random)}
        body |= {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    else:
        body |= wanted
    return f"grammar: {form} {name}", body | ({"temperature": sampled["temperature"]} if "temperature" in body else {})


def _tokens(random: Random, path: str, body: dict[str, Any]) -> tuple[str, Any]:
    """Ids out of range, wherever an id may stand."""
    name = random.choice(("prompt", "stop_token_ids", "logit_bias", "token_ids_logprob"))
    sampling = body["sampling_params"] if path == "/generate" else body
    if name == "prompt":
        body.pop("text", None)
        body["input_ids" if path != "/v1/completions" else "prompt"] = ids(random)
    elif name == "token_ids_logprob":
        body |= {"return_logprob": True, name: ids(random)}
    else:
        sampling[name] = biases(random) if name == "logit_bias" else ids(random)
        if random.random() < 0.4:
            sampling["min_new_tokens" if path == "/generate" else "min_tokens"] = 4
    return f"ids: {name}", body


def _logprobs(random: Random, path: str, body: dict[str, Any]) -> tuple[str, Any]:
    number = random.choice((-1, -2, 0, 1, 20, 21, 4096, 4097, 10**6, 2**31, 2**63, 1.5, "5", None, True))
    if path == "/generate":
        start = random.choice((None, 0, -1, -5, 3, 10**6, 2**63))
        body |= {"return_logprob": True, "top_logprobs_num": number, "logprob_start_len": start}
    elif path == "/v1/completions":
        body |= {"logprobs": number, "echo": random.random() < 0.4}
    else:
        body |= {"logprobs": True, "top_logprobs": number}
    if random.random() < 0.4:
        body["stream"] = True
    return "logprobs", body


def _pair(random: Random, path: str, body: dict[str, Any]) -> tuple[str, Any]:
    """Options that each are fine and together leave no token."""
    target = body["sampling_params"] if path == "/generate" else body
    least = "min_new_tokens" if path == "/generate" else "min_tokens"
    name, options = random.choice(
        (
            ("ended grammar", {"regex": "a", least: 6}),
            ("integer", {"json_schema": '{"type":"integer","minimum":0,"maximum":100}', least: 5}),
            ("bias against a grammar", {"regex": "[ab]+", "logit_bias": {str(i): -math.inf for i in range(4096)}}),
            ("bias against all", {"logit_bias": {str(i): -100 for i in range(4096)}}),
            ("least above the limit", {least: 50}),
            ("every id stops", {"stop_token_ids": list(range(4096)), least: 4}),
            ("ignored end", {"regex": "a", "ignore_eos": True}),
        )
    )
    target |= options | {"temperature": random.choice((0, 1.0))}
    return f"pair: {name}", body


def _whole(random: Random, path: str, body: dict[str, Any]) -> tuple[str, Any]:
    """The body as such is no body."""
    text = encoded(body)
    makers: tuple[tuple[str, Callable[[], bytes]], ...] = (
        ("cut", lambda: text[: random.randrange(len(text))]),
        ("invalid UTF-8", lambda: text.replace(b"e", b"\xff\xfe", 1)),
        ("surrogate bytes", lambda: text.replace(b"e", b"\xed\xa0\x80", 1)),
        ("empty", lambda: b""),
        ("list", lambda: b"[]"),
        ("null", lambda: b"null"),
        ("number", lambda: b"1e999"),
        ("deep", lambda: b"[" * 3000 + b"]" * 3000),
        ("deep object", lambda: b'{"a":' * 3000 + b"1" + b"}" * 3000),
        ("doubled key", lambda: text[:-1] + b"," + text[1:]),
        ("megabyte", lambda: encoded(body | {"user": "a" * 10**6})),
        ("any value", lambda: encoded(value(random))),
        ("missing field", lambda: encoded({key: body[key] for key in list(body)[1:]})),
        ("trailing", lambda: text + b"x"),
    )
    name, make = random.choice(makers)
    return f"body: {name}", make()
