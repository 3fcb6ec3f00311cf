"""Rounds of several widths on a GPU, in bf16: each has an attention backend and CUDA graphs of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.common.greedy import load_prompts
from benchmarks.common.plugins import with_plugins
from benchmarks.common.reference import Reference
from benchmarks.common.setups import BF16_NEAR_TIE
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server
from sglang_orthrus.config import WIDTHS
from tests.e2e.helpers import divergence_of, generate

pytestmark = pytest.mark.gpu

COMMON = (
    *("--dtype", "bfloat16", "--mem-fraction-static", "0.8", "--max-total-tokens", "65536", "--context-length", "2048"),
    *("--max-running-requests", "16", "--cuda-graph-max-bs-decode", "8"),
    *("--cuda-graph-backend-prefill", "disabled"),  # they take minutes to make
)
COUNT = 18
LIMIT = 96


@pytest.mark.parametrize("is_random", [False, True], ids=["adaptive", "random"])
@pytest.mark.parametrize("backend", ["fa3", "flashinfer", "triton"])
def test_texts_do_not_depend_on_widths(backend: str, is_random: bool, reference: Reference, tmp_path: Path) -> None:
    """Alone, in graphs with padding, and beyond the largest graph."""
    prompts = load_prompts(NANO, COUNT)
    expected = [reference.generate(prompt.ids, LIMIT).tokens for prompt in prompts]
    plugins = with_plugins(tmp_path, {"changing_widths": "tests.e2e.changing_widths"}) if is_random else {}
    flags = (*ORTHRUS_ARGS, *COMMON, "--attention-backend", backend, "--enable-metrics")
    with Server(NANO, *flags, env={WIDTHS: "1,8,16,32", **plugins}) as server:
        for at_once in (1, 5, 12):
            with ThreadPoolExecutor(at_once) as pool:
                replies = list(pool.map(lambda prompt: generate(server, prompt.ids, LIMIT, ignore_eos=True), prompts))
            for prompt, tokens, reply in zip(prompts, expected, replies, strict=True):
                found = divergence_of(reference, prompt.ids, tokens, reply["output_ids"], BF16_NEAR_TIE)
                assert found is None or found.near_tie, (at_once, prompt.name, found)
        log = server.log_path.read_text()
        print("\n".join(line for line in log.splitlines() if "ORTHRUS" in line or "Capture" in line))
    assert "ORTHRUS milliseconds of a round of 8 requests by width: 1: " in log
