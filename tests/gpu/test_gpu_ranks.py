"""Two tensor-parallel ranks on two GPUs of one host, in bf16: CUDA graphs with collectives in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from benchmarks.common.greedy import load_prompts
from benchmarks.common.reference import Reference
from benchmarks.common.setups import BF16_NEAR_TIE
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import Reply, divergence_of, generate, prompt_of, prompts
from tests.e2e.test_tensor_parallel import SCHEMA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

COMMON = (
    *("--dtype", "bfloat16", "--mem-fraction-static", "0.4", "--max-total-tokens", "65536", "--context-length", "2048"),
    # Some batches have no graph. On two GPUs their rounds take 0.1 s each.
    *("--max-running-requests", "10", "--cuda-graph-max-bs-decode", "8"),
    *("--cuda-graph-backend-prefill", "disabled", "--tp-size", "2", "--enable-deterministic-inference"),
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9, "top_p": 0.9},
    {"temperature": 1.2, "json_schema": SCHEMA},
    {"temperature": 0.7, "repetition_penalty": 1.2, "top_k": 50},
    {"json_schema": SCHEMA},
    {"regex": "(ab|cd){3,20}"},
    {"stop": ["e"]},
)
LIMIT = 96


@pytest.fixture(scope="module", params=["fa3", "flashinfer"])
def two_ranks(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(NANO, *ORTHRUS_ARGS, *COMMON, "--attention-backend", request.param, timeout=600) as server:
        yield server
        log = server.log_path.read_text()
        print("\n".join(line[:200] for line in log.splitlines() if "ORTHRUS" in line and "TP0" in line))


def test_texts_are_those_of_the_reference(two_ranks: Server, reference: Reference) -> None:
    """Alone, in graphs with padding, and beyond the largest graph, but for near ties."""
    some = load_prompts(NANO, 18)
    expected = [reference.generate(prompt.ids, LIMIT) for prompt in some]
    for at_once in (1, 5, 12):
        with ThreadPoolExecutor(at_once) as pool:
            replies = list(pool.map(lambda prompt: generate(two_ranks, prompt.ids, LIMIT, ignore_eos=True), some))
        for prompt, trace, reply in zip(some, expected, replies, strict=True):
            found = divergence_of(reference, prompt.ids, trace.tokens, reply["output_ids"], BF16_NEAR_TIE)
            assert found is None or found.near_tie, (at_once, prompt.name, found)


def test_ranks_stay_together_through_all_kinds_of_requests(two_ranks: Server) -> None:
    """Ranks that disagreed would wait for each other."""

    def ask(number: int) -> Reply:
        ids, sampling = prompts()[number % len(prompts())].ids, OPTIONS[number % len(OPTIONS)]
        return generate(two_ranks, ids, 20 + number % 30, **sampling)

    with ThreadPoolExecutor(24) as pool:
        replies = list(pool.map(ask, range(140)))
    for number, reply in enumerate(replies):
        kind = reply["meta_info"]["finish_reason"]["type"]
        assert kind in ("stop", "length")
        if OPTIONS[number % len(OPTIONS)].get("json_schema") and kind == "stop":
            assert set(json.loads(reply["text"])) == {"name", "count"}
    # A text of one token has no rounds.
    assert sum(reply["meta_info"].get("spec_accept_length", 0) > 2 for reply in replies) > len(replies) / 4


@pytest.mark.parametrize("options", [{}, {"frequency_penalty": 0.4, "min_new_tokens": 8}])
def test_seeded_texts_are_the_same_alone_and_again(two_ranks: Server, options: dict[str, Any]) -> None:
    """Rank 0 draws, or all draw the same; neither depends on what a clock says."""
    sampling = {"temperature": 0.8, "top_k": 40, "sampling_seed": 5, **options}
    first, second = (generate(two_ranks, prompt_of("prose"), 48, **sampling)["output_ids"] for _ in range(2))
    assert first == second
