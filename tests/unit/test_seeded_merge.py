"""Slices of a seeded parity run add up to the whole."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any

import pytest

from benchmarks.common.greedy import Prompt
from benchmarks.common.slices import Slice
from benchmarks.parity.seeded import Answer, Case, tokens_and_rounds
from benchmarks.parity.seeded_merge import conclude, merge

PROMPTS = [Prompt(f"prose/{index}", "prose", (index,)) for index in range(7)]


def result(number: int, differences: list[dict[str, Any]] | None = None, **changes: Any) -> dict[str, Any]:
    """Of one slice of two, over 150 answers."""
    counts = {
        "prompts of the whole run": 12,
        "max new tokens": 64,
        "slices": 2,
        "slice": number,
        "prompts": 6,
        "answers": 150,
        "answers that are not the greedy one": 10 + number,
        "tokens": 1000,
        "differences": differences or [],
        # The second slice drafts badly and is long: the mean of ratios would not do.
        "tokens and rounds": {"seeded": {"greedy": [[100, 10], [300, 300]][number]}},
        "provenance": {"commit": "abc", "command": ["--slice", f"{number}/2"]},
    }
    return conclude(counts | changes)


def difference(margin: float | None) -> dict[str, Any]:
    return {"case": "greedy", "prompt": "prose/0", "index": 3, "margin": margin}


def test_counts_add_up() -> None:
    merged = merge([result(1, [difference(2e-6)]), result(0, [difference(1e-6)])])
    assert (merged["prompts"], merged["answers"], merged["tokens"]) == (12, 300, 2000)
    assert merged["answers that are not the greedy one"] == 21
    assert [found["margin"] for found in merged["differences"]] == [1e-6, 2e-6]
    assert merged["tokens and rounds"] == {"seeded": {"greedy": [400, 310]}}
    assert merged["tokens per cycle, seeded"] == {"greedy": 1.29}
    assert [source["command"][1] for source in merged["provenance of slices"]] == ["0/2", "1/2"]


def test_the_rule_is_applied_to_the_sum() -> None:
    """One difference in 150 answers is too many, one in 300 is not, two are."""
    one, none = result(0, [difference(1e-6)]), result(1)
    assert not one["passed"] and none["passed"]
    assert merge([one, none])["passed"]
    assert not merge([one, result(1, [difference(1e-6)])])["passed"]


@pytest.mark.parametrize("margin", [0.3, None])
def test_no_slice_may_hide_what_rounding_does_not_explain(margin: float | None) -> None:
    assert not merge([result(0, answers=400, differences=[difference(margin)]), result(1)])["passed"]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([result(0)], "each once"),
        ([result(0), result(0)], "each once"),
        ([result(0), result(1, None, **{"max new tokens": 32})], "different runs"),
        ([result(0), result(1, provenance={"commit": "def"})], "different code"),
    ],
)
def test_only_all_slices_of_one_run_are_merged(slices: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(slices)


def test_slices_share_the_prompts_out() -> None:
    parts = [Slice.parse(f"{number}/3").of(PROMPTS) for number in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    assert sorted((prompt for part in parts for prompt in part), key=lambda prompt: prompt.ids) == PROMPTS
    with pytest.raises(ArgumentTypeError):
        Slice.parse("3/3")


def test_the_token_of_the_prefill_is_not_counted() -> None:
    requests = [Case(PROMPTS[0], label, {}) for label in ("greedy", "top_k", "greedy")]
    answers = [Answer((1, 2, 3), 1), Answer((1, 2), 1), Answer((1,), 0)]
    assert tokens_and_rounds(requests, answers) == {"greedy": [2, 1], "top_k": [1, 1]}
