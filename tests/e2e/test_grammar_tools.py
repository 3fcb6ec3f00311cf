"""Tool calls under grammars, two at a time where the user asks for two: plain SGLang's, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import requests

from examples.train_nano.corpus import held_out
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar
from tests.e2e.chats import CHAT, assembled, content, events
from tests.e2e.helpers import both
from tests.servers import LLGUIDANCE, SETUP, TEST_ARGS

pytestmark = pytest.mark.e2e

# Users who want two calls, in nano's own words.
SAMPLES = [sample for sample in held_out("tools", 200) if sample.answer.count("<tool_call>") == 2][:3]
Outcome = tuple[int, list[dict[str, Any]]]


def request_of(sample: Any, strict: bool = False, **options: Any) -> dict[str, Any]:
    tools = [{**tool, "function": {**tool["function"], "strict": strict}} for tool in sample.tools]
    return {
        "model": "default",
        "temperature": 0,
        "max_tokens": 160,
        "messages": sample.messages,
        "tools": tools,
        **options,
    }


def named(sample: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": sample.tools[-1]["function"]["name"]}}


REQUESTS: dict[str, dict[str, Any]] = {
    f"{kind} {number}": request
    for number, sample in enumerate(SAMPLES)
    for kind, request in {
        "auto": request_of(sample),
        "strict": request_of(sample, strict=True),
        "required": request_of(sample, strict=True, tool_choice="required"),
        "one required": request_of(sample, strict=True, tool_choice="required", parallel_tool_calls=False),
        "loosely required": request_of(sample, tool_choice="required"),
        "named": request_of(sample, strict=True, tool_choice=named(sample)),
    }.items()
}


@pytest.fixture(scope="module")
def llguidance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """ORTHRUS and plain SGLang with the other engine."""
    exported: Path = export_ar(NANO, tmp_path_factory.mktemp("plain") / "nano-ar")
    with (
        Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *LLGUIDANCE, env=SETUP.env) as ours,
        Server(exported, *TEST_ARGS, *LLGUIDANCE, env={**plain_env(), **SETUP.env}) as theirs,
    ):
        yield ours, theirs


def outcome(server: Server, request: dict[str, Any]) -> Outcome:
    """The status and the choices."""
    reply = requests.post(server.url + CHAT, json=request, timeout=120)
    choices = reply.json()["choices"] if reply.ok else []
    return reply.status_code, [content(choice["message"]) | {"finish": choice["finish_reason"]} for choice in choices]


def outcomes(server: Server) -> dict[str, Outcome]:
    """Of all requests, six in flight."""
    with ThreadPoolExecutor(6) as pool:
        return dict(zip(REQUESTS, pool.map(lambda request: outcome(server, request), REQUESTS.values()), strict=True))


def assert_calls_are_valid(found: dict[str, Outcome]) -> None:
    """Every strict call that came to its end is of a tool that there is, with arguments that follow its schema."""
    for name, (_, choices) in found.items():
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in REQUESTS[name]["tools"]}
        for choice in choices:
            if name.startswith(("auto", "loosely")) or choice["finish"] == "length":
                continue
            for tool, arguments in choice["calls"]:
                jsonschema.validate(json.loads(arguments), schemas[tool])


def num_calls(found: dict[str, Outcome], kind: str) -> list[int]:
    return [len(found[f"{kind} {number}"][1][0]["calls"]) for number in range(len(SAMPLES))]


def test_two_calls_in_one_answer(orthrus: Server, plain: Server) -> None:
    ours, theirs = both(outcomes, (orthrus, plain))
    assert ours == theirs
    assert_calls_are_valid(ours)
    assert all(choice["calls"] for _, choices in ours.values() for choice in choices)
    for kind in ("auto", "strict", "required"):
        assert num_calls(ours, kind) == [2] * len(SAMPLES)


@pytest.mark.parametrize("name", ["strict 0", "required 0", "named 0"])
def test_streams_of_two_calls_add_up(orthrus: Server, plain: Server, name: str) -> None:
    streams = both(lambda server: assembled(events(server, CHAT, REQUESTS[name])), (orthrus, plain))
    assert streams[0] == streams[1]
    assert len(streams[0][0]["calls"]) >= (2 if name == "strict 0" else 1)


@pytest.mark.slow
def test_tool_calls_under_llguidance(llguidance: tuple[Server, Server]) -> None:
    """Errors of the engine included, and answers without a call where one is required: plain SGLang's."""
    ours, theirs = map(outcomes, llguidance)
    assert ours == theirs
    assert_calls_are_valid(ours)
    streams = [assembled(events(server, CHAT, REQUESTS["auto 0"])) for server in llguidance]
    assert streams[0] == streams[1]
    assert len(streams[0][0]["calls"]) == 2
