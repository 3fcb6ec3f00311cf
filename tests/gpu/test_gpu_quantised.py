"""Quantised checkpoints and flags: ORTHRUS against plain SGLang on the same quantised weights.

Checkpoints of other quantisers are compared, too, if ORTHRUS_QUANTISED names a directory of them: docs/quantization.md
says how to make them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.common.equality import Answer, find_divergence
from benchmarks.common.greedy import collect, load_prompts
from benchmarks.common.setups import BF16_NEAR_TIE, ONE_WIDTH
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar
from sglang_orthrus.models.graft import graft
from tests.quantised import write_w4a16

pytestmark = pytest.mark.gpu

COMMON = (
    *("--dtype", "bfloat16", "--attention-backend", "fa3", "--sampling-backend", "pytorch"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "32768", "--context-length", "2048"),
    *("--max-running-requests", "8", "--cuda-graph-max-bs-decode", "4", "--cuda-graph-backend-prefill", "disabled"),
)
FLAGS = {"fp8": ("--quantization", "fp8"), "fp8 KV": ("--kv-cache-dtype", "fp8_e4m3")}
MADE_ELSEWHERE = tuple(sorted(Path(os.environ.get("ORTHRUS_QUANTISED", "/nowhere")).glob("*/config.json")))
CASES = ("both views", "AR view", *FLAGS, *(config.parent.name for config in MADE_ELSEWHERE))
AT_ONCE = 3
COUNT = 18

Answers = tuple[list[Answer], list[Answer]]


def checkpoint_of(case: str, folder: Path) -> Path:
    """Nano in one form or another, made if need be."""
    if case == "both views":
        return write_w4a16(NANO, folder / "both")
    if case == "AR view":
        return graft(write_w4a16(export_ar(NANO, folder / "ar"), folder / "quantised"), NANO, folder / "grafted")
    return next((config.parent for config in MADE_ELSEWHERE if config.parent.name == case), NANO)


def answers_of(case: str, folder: Path) -> Answers:
    """Plain SGLang's, one request at a time, and ORTHRUS's, several at once: with graphs and without."""
    model = checkpoint_of(case, folder)
    flags = (*COMMON, *FLAGS.get(case, ()))
    plain = Server(export_ar(model, folder / "plain"), *flags, env=plain_env())
    ours = Server(model, *ORTHRUS_ARGS, *flags, env=ONE_WIDTH)
    prompts = load_prompts(NANO, COUNT)

    def ask(server: Server, at_once: int) -> list[Answer]:
        with server:
            return collect(server, prompts, at_once)

    with ThreadPoolExecutor(2) as pool:
        expected, found = pool.submit(ask, plain, 1), pool.submit(ask, ours, 6)
        return expected.result(), found.result()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Answers]]]:
    """Of all cases, some at once: a server spends most of its start-up on a processor core."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {case: pool.submit(answers_of, case, tmp_path_factory.mktemp("case")) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_plain_sglangs_on_the_same_weights(case: str, answers: dict[str, Future[Answers]]) -> None:
    expected, found = answers[case].result()
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
