"""Greedy answers of ORTHRUS and of plain SGLang, with the same flags and weights."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.common.equality import Answer, find_divergence
from benchmarks.common.greedy import collect, load_prompts
from benchmarks.common.setups import BF16_NEAR_TIE, ONE_WIDTH
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar

COMMON = (
    *("--dtype", "bfloat16", "--attention-backend", "fa3", "--sampling-backend", "pytorch"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "32768", "--context-length", "2048"),
    *("--max-running-requests", "8", "--cuda-graph-max-bs-decode", "4", "--cuda-graph-backend-prefill", "disabled"),
)
COUNT = 18
# On a first start SGLang may compile kernels for more than five minutes.
START_SECONDS = 900

Answers = tuple[list[Answer], list[Answer]]


def answers_of(model: Path, flags: Sequence[str], folder: Path) -> Answers:
    """Plain SGLang's, one request at a time, and ORTHRUS's, several at once: with graphs and without.

    flags: beside `COMMON`; the last one of a name counts.
    """
    flags = (*COMMON, *flags)
    plain = Server(export_ar(model, folder / "plain"), *flags, env=plain_env(), timeout=START_SECONDS)
    ours = Server(model, *ORTHRUS_ARGS, *flags, env=ONE_WIDTH, timeout=START_SECONDS)
    prompts = load_prompts(NANO, COUNT)

    def ask(server: Server, at_once: int) -> list[Answer]:
        with server:
            return collect(server, prompts, at_once)

    with ThreadPoolExecutor(2) as pool:
        expected, found = pool.submit(ask, plain, 1), pool.submit(ask, ours, 6)
        return expected.result(), found.result()


def check(case: str, answers: Answers) -> None:
    """Equal but for near ties, with drafts that are worth something."""
    expected, found = answers
    divergences = [
        find_divergence(theirs.tokens, ours.tokens, theirs.gap_after, BF16_NEAR_TIE)
        for theirs, ours in zip(expected, found, strict=True)
    ]
    rounds = [(len(answer.tokens) - 1) / answer.rounds for answer in found if answer.rounds]
    mean = sum(rounds) / len(rounds)
    gaps = [divergence.gap for divergence in divergences if divergence]
    print(f"{case}: {divergences.count(None)} of {len(found)} equal, gaps {gaps}, {mean:.1f} tokens per cycle")
    assert all(divergence is None or divergence.near_tie for divergence in divergences), divergences
    assert mean > 3, "drafts of a view that is loaded wrongly are worth nothing"
