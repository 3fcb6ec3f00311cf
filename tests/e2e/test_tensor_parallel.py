"""Two tensor-parallel ranks on the CPU. One rank's answers are the truth: sums differ by rounding.

The shared server `narrow` has two ranks and the synchronous scheduler, so other modules test them, too. The slow server
has SGLang's defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks.common.greedy import stop_ids
from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from sglang_orthrus.config import SLOW_MASK_MS, WIDTHS
from tests.e2e.helpers import (
    Reply,
    assert_same_outputs,
    generate,
    generate_together,
    generate_with_logprobs,
    prompt_of,
    prompts,
)
from tests.servers import CORE_FOR_EACH_RANK, SETUP, TEST_ARGS, TWO_RANKS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks of a GPU machine need two GPUs"),
]
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
)
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"json_schema": SCHEMA},
    {"regex": "(ab|cd){3,20}"},
    {"ebnf": 'root ::= "x" root | "y"'},
)


@pytest.fixture(scope="module")
def defaults() -> Iterator[Server]:
    """Widths that follow traffic, and seeds that count. Where the clock ends a block, only rank 0's counts."""
    env = {**SETUP.env, SLOW_MASK_MS: "0", WIDTHS: "1,8,16,32", **CORE_FOR_EACH_RANK}
    flags = (*TWO_RANKS, "--enable-deterministic-inference")
    with Server(NANO, *ORTHRUS_ARGS, *TEST_ARGS, *flags, env=env, timeout=600) as server:
        yield server


@pytest.fixture(scope="module", params=["narrow", pytest.param("defaults", marks=pytest.mark.slow)])
def two_ranks(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.mark.parametrize("in_flight", [1, 6])
def test_greedy_texts_are_plain_sglangs(two_ranks: Server, plain: Server, reference: Reference, in_flight: int) -> None:
    requests = [(prompt.ids, 96) for prompt in prompts()[in_flight % 2 :: 6]]
    assert_same_outputs(reference, plain, requests, generate_together(two_ranks, requests, in_flight))


def test_drafts_are_as_good_as_on_one_rank(narrow: Server, reference: Reference) -> None:
    """A shard that drafted for itself would show here alone."""
    width = narrow.get("/server_info").json()["speculative_num_draft_tokens"]
    for prompt in prompts()[::9]:
        trace = reference.generate(prompt.ids, 96, stop_ids(NANO), width=width)
        reply = generate(narrow, prompt.ids, 96)
        assert reply["meta_info"]["spec_verify_ct"] == pytest.approx(trace.rounds, rel=0.15)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: next(iter(grammar)))
def test_grammars_hold(two_ranks: Server, orthrus: Server, grammar: dict[str, Any]) -> None:
    for family in ("json", "prose"):
        expected, reply = (generate(server, prompt_of(family), 48, **grammar) for server in (orthrus, two_ranks))
        assert reply["output_ids"] == expected["output_ids"]


@pytest.mark.parametrize("sampling", [{}, {"frequency_penalty": 0.4, "min_new_tokens": 8}, {"logit_bias": {"300": 5}}])
def test_log_probabilities_and_penalties(two_ranks: Server, orthrus: Server, sampling: dict[str, Any]) -> None:
    for family in ("chat", "json"):
        expected, reply = (
            generate_with_logprobs(server, prompt_of(family), **sampling) for server in (orthrus, two_ranks)
        )
        assert reply["output_ids"] == expected["output_ids"]
        for name in ("output_token_logprobs", "output_token_ids_logprobs"):
            ours, theirs = (each["meta_info"][name] for each in (reply, expected))
            assert torch.tensor(_numbers(ours)).allclose(torch.tensor(_numbers(theirs)), atol=1e-3)


def _numbers(listed: Any) -> list[float]:
    """The log probabilities in a list of (log probability, id, text), however nested."""
    if isinstance(listed[0], float):
        return [listed[0]]
    return [number for one in listed for number in _numbers(one)]


@pytest.mark.slow
def test_seeded_texts_do_not_depend_on_blocks_or_scheduler(narrow: Server, defaults: Server) -> None:
    for seed in range(3):
        sampling = {"temperature": 0.8, "top_k": 40, "sampling_seed": seed}
        expected, reply = (generate(server, prompt_of("prose", seed), 48, **sampling) for server in (narrow, defaults))
        assert reply["output_ids"] == expected["output_ids"]


def test_ranks_stay_together_through_all_kinds_of_requests(two_ranks: Server, plain: Server) -> None:
    """Ranks that disagreed would wait for each other, or write different tokens to the cache, which texts then show."""
    options: tuple[dict[str, Any], ...] = (
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 1.2, "json_schema": SCHEMA},
        {"temperature": 0.7, "repetition_penalty": 1.2, "top_k": 50},
        {"stop": ["e"]},
        *GRAMMARS,
    )

    def ask(number: int) -> Reply:
        ids, sampling = prompts()[number % len(prompts())].ids, options[number % len(options)]
        return generate(two_ranks, ids, 20 + number % 30, **sampling)

    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(ask, range(42)))
    assert all(reply["meta_info"]["finish_reason"]["type"] in ("stop", "length") for reply in replies)
    for number, reply in enumerate(replies):
        if options[number % len(options)].get("json_schema") and reply["meta_info"]["finish_reason"]["type"] == "stop":
            assert set(json.loads(reply["text"])) == {"name", "count"}
    ids = prompt_of("code")
    assert generate(two_ranks, ids, 64)["output_ids"] == generate(plain, ids, 64)["output_ids"]
