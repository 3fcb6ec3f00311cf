"""Rounds whose width changes every time, at random: nothing that a client sees depends on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.common.plugins import with_plugins
from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from sglang_orthrus.config import WIDTHS
from tests.e2e.helpers import (
    assert_same_output,
    generate,
    generate_together,
    generate_with_logprobs,
    prompt_of,
    prompts,
)
from tests.e2e.serving import paths_since, rounds_by_path
from tests.servers import GAUGES, SETUP, TEST_ARGS

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Widths of 1 to the whole block, with captured functions in place of CUDA graphs for batches of up to four."""
    plugins = {"graph_replay": "tests.e2e.graph_replay", "changing_widths": "tests.e2e.changing_widths"}
    env = with_plugins(tmp_path_factory.mktemp("site"), plugins) | {WIDTHS: "1,8,16,32"} | dict(SETUP.env)
    args = (*ORTHRUS_ARGS, *TEST_ARGS, *GAUGES, "--enable-deterministic-inference")
    with Server(NANO, *args, env=env) as server:
        yield server


def test_greedy_texts_are_plain_sglangs(changing: Server, plain: Server, reference: Reference) -> None:
    before = rounds_by_path(changing)
    for prompt in prompts()[::3]:
        expected, reply = (generate(server, prompt.ids, 96) for server in (plain, changing))
        assert_same_output(reference, prompt.ids, expected, reply)
    assert paths_since(changing, before) == {"graph"}


@pytest.mark.parametrize("in_flight", [3, 7])
def test_requests_that_come_and_go(changing: Server, plain: Server, reference: Reference, in_flight: int) -> None:
    """In graphs, and beyond the largest of them."""
    requests = [(prompt.ids, 9 + 8 * number) for number, prompt in enumerate(prompts()[1::3])]
    replies = generate_together(changing, requests, in_flight)
    for (ids, limit), reply in zip(requests, replies, strict=True):
        assert_same_output(reference, ids, generate(plain, ids, limit), reply)


def test_grammars_hold(changing: Server, plain: Server) -> None:
    schema = json.dumps({"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]})
    options: tuple[dict[str, Any], ...] = (
        {"json_schema": schema},
        {"regex": "(ab|cd){3,20}"},
        {"ebnf": 'root ::= "x" root | "y"'},
    )
    before = rounds_by_path(changing)
    for option in options:
        for family in ("json", "prose"):
            expected, reply = (generate(server, prompt_of(family), 48, **option) for server in (plain, changing))
            assert reply["output_ids"] == expected["output_ids"]
    assert paths_since(changing, before) == {"split"}


@pytest.mark.parametrize("sampling", [{}, {"frequency_penalty": 0.4, "min_new_tokens": 8}, {"repetition_penalty": 1.3}])
def test_log_probabilities_and_penalties(changing: Server, plain: Server, sampling: dict[str, Any]) -> None:
    for family in ("chat", "json"):
        expected, reply = (
            generate_with_logprobs(server, prompt_of(family), **sampling) for server in (plain, changing)
        )
        assert reply["output_ids"] == expected["output_ids"]
        ours, theirs = (each["meta_info"]["output_token_logprobs"] for each in (reply, expected))
        assert [token for _, token, *_ in ours] == [token for _, token, *_ in theirs]
        for (mine, *_), (other, *_) in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, abs=1e-3)


def test_seeded_texts_do_not_depend_on_widths(changing: Server, narrow: Server) -> None:
    """`test_sampling` holds those of a server of one width against the reference."""
    for seed in range(3):
        sampling = {"temperature": 0.8, "top_k": 40, "sampling_seed": seed}
        expected, reply = (generate(server, prompt_of("prose", seed), 64, **sampling) for server in (narrow, changing))
        assert reply["output_ids"] == expected["output_ids"]


def test_a_stop_string_ends_the_text(changing: Server, plain: Server) -> None:
    for stop in ("e", " the"):
        expected, reply = (generate(server, prompt_of("prose"), 64, stop=stop) for server in (plain, changing))
        assert (reply["output_ids"], reply["text"]) == (expected["output_ids"], expected["text"])
