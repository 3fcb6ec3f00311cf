"""Greedy parity on a GPU: FlashInfer, bf16, the bundled checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.parity import collect, load_prompts, tokens_per_cycle
from benchmarks.parity_rules import find_divergence
from sglang_orthrus.checkpoint import export_ar
from sglang_orthrus.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.server import Server, plain_env
from tests.reference import Reference, top2_gap

pytestmark = pytest.mark.gpu

ARGS = ("--dtype", "bfloat16", "--attention-backend", "flashinfer", "--mem-fraction-static", "0.3")
# Others saw first divergences of the released checkpoints in bf16 at gaps up to this; ours has yet to be measured.
BF16_NEAR_TIE = 0.25


def test_bf16_output_parts_from_plain_sglang_at_near_ties_only(tmp_path: Path, reference: Reference) -> None:
    prompts = load_prompts(NANO, 18)
    with Server(NANO, *ORTHRUS_ARGS, *ARGS) as server:
        answers = collect(server, prompts, 8)
    with Server(export_ar(NANO, tmp_path / "ar"), *ARGS, env=plain_env()) as server:
        plain = collect(server, prompts, 8)
    for prompt, expected, actual in zip(prompts, plain, answers, strict=True):

        def gap_after(common: Sequence[int], ids: tuple[int, ...] = prompt.ids) -> float:
            return float(top2_gap(reference.ar_logits([*ids, *common])[-1]))

        divergence = find_divergence(expected.tokens, actual.tokens, gap_after)
        assert divergence is None or divergence.gap < BF16_NEAR_TIE, (prompt.name, divergence)
    assert tokens_per_cycle(prompts, answers)["all"] > 6
