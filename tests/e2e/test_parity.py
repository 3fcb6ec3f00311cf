"""The parity harness on a few prompts: greedy output and rounds, batch sizes 1 and 8, on two unlike servers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest

from benchmarks.common.equality import Answer
from benchmarks.common.greedy import Prompt, collect, load_prompts, stop_ids
from benchmarks.common.reference import Reference, Trace
from benchmarks.common.setups import SETUPS
from benchmarks.parity.greedy import judge, judge_prefill, prefill, rounding, tokens_per_cycle, trace_all
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.server import Server
from tests.servers import CONTEXT_LENGTH, NARROW_WIDTH

pytestmark = pytest.mark.e2e

COUNT = 18
MAX_NEW_TOKENS = 448
WIDTHS = {"orthrus": None, "narrow": NARROW_WIDTH}


@cache
def chosen() -> list[Prompt]:
    return [p for p in load_prompts(NANO, COUNT) if len(p.ids) + MAX_NEW_TOKENS < CONTEXT_LENGTH]


@pytest.fixture(scope="module")
def expected(plain: Server) -> dict[int, list[Answer]]:
    """Plain SGLang's answers by batch size."""
    return {batch_size: collect(plain, chosen(), batch_size) for batch_size in (1, 8)}


@pytest.fixture(scope="module")
def traces(reference: Reference) -> dict[str, list[Trace]]:
    """The reference loop's rounds by server."""
    with ThreadPoolExecutor(2) as pool:
        found = {
            name: pool.submit(trace_all, reference, chosen(), stop_ids(NANO), width) for name, width in WIDTHS.items()
        }
        return {name: future.result() for name, future in found.items()}


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("fixture", WIDTHS)
def test_greedy_parity(
    request: pytest.FixtureRequest,
    traces: dict[str, list[Trace]],
    expected: dict[int, list[Answer]],
    plain: Server,
    fixture: str,
    batch_size: int,
) -> None:
    setup = SETUPS["cpu"]
    answers = collect(request.getfixturevalue(fixture), chosen(), batch_size)
    tally = judge(chosen(), traces[fixture], expected[batch_size], answers, setup)
    assert tally.passed, tally
    rankings = prefill(plain, chosen(), answers)
    assert judge_prefill(chosen(), answers, rankings, setup).passed
    assert max(rounding(expected[1], answers, rankings)) < setup.tie_below
    assert tokens_per_cycle(chosen(), answers)["all"] > 3
