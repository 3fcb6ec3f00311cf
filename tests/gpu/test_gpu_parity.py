"""The parity suite on a GPU; `python -m benchmarks.parity SETUP` runs it on all prompts and keeps the figures."""

from __future__ import annotations

import pytest

from benchmarks.common.setups import SETUPS
from benchmarks.parity.greedy import run
from sglang_orthrus.cli.demo import NANO

pytestmark = pytest.mark.gpu

COUNT = 27


@pytest.mark.parametrize("setup", ["flashinfer-bf16", "fa3-bf16", "triton-fp32"])
def test_greedy_parity(setup: str) -> None:
    result = run(NANO, SETUPS[setup], COUNT)
    assert result["passed"], result
    rounds = result["tokens_per_cycle_on_equal_texts"]
    assert rounds["served"] == pytest.approx(rounds["reference"], rel=0.02)
