"""The parity harness on a few prompts: greedy output and rounds, batch sizes 1 and 8, overlap on and off."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.parity import (
    Answer,
    Prompt,
    collect,
    judge,
    load_prompts,
    stop_ids,
    teacher_forced,
    tokens_per_cycle,
    trace_all,
)
from sglang_orthrus.demo import NANO
from sglang_orthrus.server import Server
from tests.conftest import CONTEXT_LENGTH
from tests.reference import Reference, Trace

pytestmark = pytest.mark.e2e

COUNT = 18
MAX_NEW_TOKENS = 448


@cache
def chosen() -> list[Prompt]:
    return [p for p in load_prompts(NANO, COUNT) if len(p.ids) + MAX_NEW_TOKENS < CONTEXT_LENGTH]


@pytest.fixture(scope="module")
def traces(reference: Reference) -> list[Trace]:
    return trace_all(reference, chosen(), stop_ids(NANO))


@pytest.fixture(scope="module")
def expected(plain: Server) -> dict[int, list[Answer]]:
    return {batch_size: collect(plain, chosen(), batch_size) for batch_size in (1, 8)}


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("fixture", ["orthrus", "orthrus_without_overlap"])
def test_greedy_parity(
    request: pytest.FixtureRequest,
    reference: Reference,
    traces: list[Trace],
    expected: dict[int, list[Answer]],
    plain: Server,
    fixture: str,
    batch_size: int,
) -> None:
    answers = collect(request.getfixturevalue(fixture), chosen(), batch_size)
    tally = judge(reference, chosen(), traces, expected[batch_size], answers)
    assert tally.passed, tally
    assert teacher_forced(plain, chosen(), answers).passed
    assert tokens_per_cycle(chosen(), answers)["all"] > 3
