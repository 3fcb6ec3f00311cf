"""The rules of the benchmarks of structured generation, and that their data is what they say."""

from __future__ import annotations

import json

import jsonschema
import torch

from benchmarks.draw_block import FIGURE, TRACE, agreeing, draw
from benchmarks.replay import Way, replay
from benchmarks.structured import drafting, quantile
from benchmarks.structured_cases import Block, case_of, foreign_cases, is_valid, nano, tool_cases
from sglang_orthrus.settings import DraftMode


def test_the_schemas_are_many_and_valid() -> None:
    cases = foreign_cases()
    assert len({case.name for case in cases}) == len(cases) >= 60
    for case in cases:
        jsonschema.validators.validator_for(case.schema).check_schema(case.schema)


def test_answers_are_judged_by_their_grammar() -> None:
    case = case_of("", "", {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
    assert [is_valid(case, text) for text in ('{"a": 1}', '{"a": "1"}', '{"a": 1')] == [True, False, False]
    (tool,) = tool_cases(1)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert [is_valid(tool, text) for text in (call, call[:-5], "no call", f"{call}\n{call}")] == [
        True,
        False,
        False,
        True,
    ]


def test_quantiles_are_taken_from_within_buckets() -> None:
    buckets = {0.001: 0.0, 0.002: 10.0, 0.004: 20.0, float("inf"): 20.0}
    assert quantile(buckets, 0.25) == 1.5
    assert quantile(buckets, 0.75) == 3.0
    assert quantile({0.001: 1.0, float("inf"): 9.0}, 0.5) is None
    assert quantile({0.001: 0.0, float("inf"): 0.0}, 0.5) is None


def test_metrics_of_a_run_are_differences() -> None:
    name = "sglang_orthrus:grammar_"

    def reading(none: float, repaired: float, forced: float, count: float) -> dict[str, float]:
        drafts = {"none": none, "repaired": repaired, "forced": forced}
        return {f'{name}drafts_total{{change="{change}"}}': value for change, value in drafts.items()} | {
            f'{name}walk_seconds_bucket{{le="{bound}"}}': count for bound in ("0.001", "+Inf")
        }

    figures = drafting(reading(1, 1, 1, 2), reading(9, 2, 2, 6))
    assert figures == {"repaired": 0.1, "forced": 0.1, "walk_ms": {"median": 0.5, "p99": 0.99}}
    assert drafting(reading(1, 1, 1, 2), reading(1, 1, 1, 2)) == {}


def test_a_replay_counts_rounds() -> None:
    """Drafts that are right give one round, drafts that are all wrong one per token, and forced ones fewer."""
    tokenizer, _ = nano()
    schema = {"type": "object", "properties": {"long_key": {"type": "boolean"}}, "required": ["long_key"]}
    case = case_of("", "", schema | {"additionalProperties": False})
    end = tokenizer.token_to_id("<|im_end|>")
    answer = [*tokenizer.encode('{"long_key": true}', add_special_tokens=False).ids, end]
    right = [(answer[length:] + [end] * 31)[:31] for length in range(1, len(answer))]
    wrong = [[17] * 31] * (len(answer) - 1)
    figures = {
        name: [
            [
                Block(case, answer[:length], torch.tensor(drafts)[:, None], answer)
                for length, drafts in enumerate(blocks, start=1)
            ]
        ]
        for name, blocks in (("right", right), ("wrong", wrong))
    }
    off, repair = Way(DraftMode.OFF), Way(DraftMode.REPAIR)
    assert replay(figures["right"], off, False)["tokens_per_cycle"] == len(answer) - 1
    assert replay(figures["wrong"], off, False)["tokens_per_cycle"] == 1
    repaired = replay(figures["wrong"], repair, False)
    assert repaired["tokens_per_cycle"] > 2
    assert repaired["forced"] > 0


def test_the_figure_is_drawn_from_its_trace() -> None:
    trace = json.loads(TRACE.read_text(encoding="utf-8"))
    assert draw(trace) == FIGURE.read_text(encoding="utf-8")
    assert len(trace["emitted"]) > trace["emitted_without_walk"]


def test_drafts_agree_up_to_the_first_difference() -> None:
    assert agreeing([1, 2, 3], [1, 2, 4]) == 2
    assert agreeing([1, 2], [1, 2, 3]) == 2
    assert agreeing([1, 2, 3], [1]) == 1
