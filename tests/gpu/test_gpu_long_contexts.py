"""Contexts of 16k tokens up to the limit, prefilled in chunks while others decode, against plain SGLang."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.common.equality import find_divergence
from benchmarks.common.greedy import MAX_NEW_TOKENS, Prompt, collect
from benchmarks.common.setups import SETUPS
from benchmarks.speed.prompts import PromptPool
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar

pytestmark = pytest.mark.gpu

CONTEXT = 40_960
LIMITS = (
    *("--context-length", str(CONTEXT), "--chunked-prefill-size", "2048", "--max-total-tokens", "163840"),
    *("--mem-fraction-static", "0.5", "--max-running-requests", "12", "--cuda-graph-max-bs-decode", "8"),
    *("--cuda-graph-backend-prefill", "disabled"),
)
# nano was trained on shorter ones.
LONGER = ("--json-model-override-args", json.dumps({"max_position_embeddings": CONTEXT}))


# The last fills the context with its answer. In fp32 all of them take too long.
LENGTHS = {"flashinfer-bf16": (16_384, 32_768, CONTEXT - MAX_NEW_TOKENS), "triton-fp32": (16_384,)}


def _prompts(lengths: Sequence[int]) -> list[Prompt]:
    """Short ones, and in between long ones."""
    pool = PromptPool(NANO)
    short = pool.take(9)
    long = [pool.take(5, length)[number] for number, length in enumerate(lengths)]
    return [prompt for number, one in enumerate(long) for prompt in (*short[3 * number : 3 * number + 3], one)]


@pytest.mark.parametrize("setup", LENGTHS)
def test_long_contexts(setup: str, tmp_path: Path) -> None:
    prompts = _prompts(LENGTHS[setup])
    args, env = (*SETUPS[setup].args[:4], *LIMITS, *LONGER), SETUPS[setup].env
    exported = export_ar(NANO, tmp_path / "ar")
    with Server(exported, *args, env={**plain_env(), **env}) as server:
        expected = collect(server, prompts, 1)
    for overlap in ((), ("--disable-overlap-schedule",)):
        with Server(NANO, *ORTHRUS_ARGS, *args, *overlap, env=env) as server:
            for in_flight in (1, len(prompts)):
                answers = collect(server, prompts, in_flight)
                for plain, ours in zip(expected, answers, strict=True):
                    found = find_divergence(plain.tokens, ours.tokens, plain.gap_after, SETUPS[setup].tie_below)
                    assert found is None or found.gap < found.tie_below, found
                assert all(answer.rounds for answer in answers if len(answer.tokens) > 1)
