"""Grammars that force strings without end: answered like others, in bounded memory, while others are served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from sglang_orthrus.config import SLOW_MASK_MS
from tests.e2e.helpers import both, generate, prompt_of
from tests.servers import NO_WHITE_SPACE, SETUP, TEST_ARGS

pytestmark = pytest.mark.e2e

NUM_TOKENS = 60
MAX_GROWTH = 100 << 20  # bytes
SCHEMA = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
HOSTILE: dict[str, dict[str, str]] = {
    "ebnf": {"ebnf": 'root ::= "a" root'},
    "regex": {"regex": "a{2000000}"},
    "huge regex": {"regex": "a{100000000}"},
    "schema": {"json_schema": json.dumps(SCHEMA)},
    "const of 10 kB": {"json_schema": json.dumps({"const": "x y" * 3333})},
    "const of 100 kB": {"json_schema": json.dumps({"const": "x y" * 33333})},
}
BOUNDED = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def resident_bytes(server: Server) -> int:
    """Of the server and its children."""
    assert server._process is not None, "it runs"
    process = psutil.Process(server._process.pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def assert_answers(server: Server) -> None:
    for grammar in HOSTILE.values():
        generate(server, prompt_of("arith"), 4, **grammar)  # compiled, and cached by SGLang
    before = resident_bytes(server)
    with ThreadPoolExecutor(len(HOSTILE)) as pool:
        replies = list(pool.map(lambda one: generate(server, prompt_of("arith"), NUM_TOKENS, **one), HOSTILE.values()))
    assert [len(reply["output_ids"]) for reply in replies] == [NUM_TOKENS] * len(HOSTILE)
    assert replies[0]["text"].strip("a") == ""
    assert resident_bytes(server) - before < MAX_GROWTH


def test_forced_strings_without_end(orthrus: Server) -> None:
    assert_answers(orthrus)


@pytest.mark.parametrize("name", HOSTILE)
def test_they_are_answered_as_by_plain_sglang(orthrus: Server, plain: Server, name: str) -> None:
    ours, theirs = both(generate, (orthrus, plain), prompt_of("arith"), 40, **HOSTILE[name])
    assert ours["output_ids"] == theirs["output_ids"]


@pytest.fixture(scope="module")
def cut() -> Iterator[Server]:
    """Without white space, and with no time for masks: rounds of sampled requests are cut at their first row."""
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, NO_WHITE_SPACE, env={**SETUP.env, SLOW_MASK_MS: "0"}) as server:
        yield server


@pytest.mark.slow
def test_forced_strings_without_end_nor_white_space(cut: Server) -> None:
    assert_answers(cut)


@pytest.mark.slow
def test_rounds_that_are_cut_give_valid_answers(cut: Server) -> None:
    """Sampled, with log probabilities and penalties; greedy ones beside them."""
    options: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 0.7, "frequency_penalty": 0.3}, {}]

    def ask(number: int) -> dict[str, Any]:
        sampling = {"temperature": 0, "max_new_tokens": 80, "json_schema": json.dumps(BOUNDED)}
        body = {
            "input_ids": list(prompt_of("json")),
            "sampling_params": sampling | options[number % 3],
            "return_logprob": number % 2 == 0,
        }
        reply: dict[str, Any] = cut.post("/generate", body)
        return reply

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(ask, range(12)))
    for number, reply in enumerate(replies):
        assert set(json.loads(reply["text"])) == {"name", "count"}
        assert len(json.loads(reply["text"])["name"]) <= 12
        if number % 2 == 0:
            assert len(reply["meta_info"]["output_token_logprobs"]) == len(reply["output_ids"])
