"""The rules of the benchmarks of structured generation, and that their data is what they say."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from benchmarks.common.slices import Slice
from benchmarks.structured.cases import Block, case_of, foreign_cases, is_valid, nano, tool_cases
from benchmarks.structured.draw_block import FIGURE, TRACE, agreeing, draw
from benchmarks.structured.figures import Row, grammar_counts, quantile, rates
from benchmarks.structured.merge import merge
from benchmarks.structured.replay import Setting, replay


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
            f'{name}{time}_seconds_bucket{{le="{bound}"}}': count * share
            for time, share in (("walk", 1), ("choose", 2))
            for bound in ("0.001", "+Inf")
        }

    counts = grammar_counts(reading(1, 1, 1, 2), reading(9, 2, 2, 6))
    assert counts == {
        "drafts": {"none": 8, "repaired": 1, "forced": 1},
        "walk_buckets": {"0.001": 4, "+Inf": 4},
        "choose_buckets": {"0.001": 8, "+Inf": 8},
    }
    figures = rates(
        counts | {"tokens": 30, "answers": 3, "aborted": 1, "rounds": 4, "seconds": 2.0, "preparing_seconds": 0.5}
    )
    assert figures == {
        "tokens_per_second": 15.0,
        "tokens_per_cycle": 7.0,
        "repaired": 0.1,
        "forced": 0.1,
        "walk_ms": {"median": 0.5, "p99": 0.99},
        "choose_ms": {"median": 0.5, "p99": 0.99},
    }
    assert grammar_counts(reading(1, 1, 1, 2), reading(1, 1, 1, 2)) == {}


def slice_result(index: int, count: int, *rows: Row) -> Row:
    return {"provenance": {"commit": "c"}, "slice": [index, count], "rows": list(rows)}


def row_of(server: str, prompts: str, answers: int, tokens: int, rounds: int, none: int, repaired: int) -> Row:
    setting = {"backend": "xgrammar", "whitespace": "any", "server": server, "prompts": prompts, "concurrency": 4}
    counts: Row = dict.fromkeys(("answers", "ended", "valid", "identical"), answers)
    counts |= {
        "aborted": 0,
        "tokens": tokens,
        "rounds": rounds,
        "seconds": 2.0,
        "preparing_seconds": 0.5,
        "different": [f"{prompts}/{tokens}"],
    }
    if none:
        drafts = {"none": none, "repaired": repaired, "forced": 0}
        counts |= {"drafts": drafts, "walk_buckets": {"0.001": rounds, "0.002": rounds, "+Inf": rounds}}
    return setting | counts | rates(counts)


def test_slices_add_up_to_the_whole() -> None:
    """Rates are those of the sums, not means of the slices' rates; a set may be too small for some slices."""
    first = slice_result(0, 2, row_of("plain", "own", 3, 30, 0, 0, 0), row_of("repair", "own", 3, 33, 3, 90, 10))
    second = slice_result(
        1,
        2,
        row_of("plain", "own", 1, 90, 0, 0, 0),
        row_of("repair", "own", 1, 90, 57, 0, 0),
        row_of("repair", "tools", 2, 12, 5, 5, 5),
    )
    whole = merge([second, first])
    assert whole["slices"] == 2
    found = {(row["server"], row["prompts"]): row for row in whole["rows"]}
    assert found["plain", "own"]["tokens_per_cycle"] is None
    assert found["plain", "own"]["tokens_per_second"] == 30.0
    own = found["repair", "own"]
    assert (own["answers"], own["identical"], own["tokens"], own["rounds"]) == (4, 4, 123, 60)
    assert own["different"] == ["own/33", "own/90"]
    assert own["tokens_per_cycle"] == round(119 / 60, 3)
    assert (own["repaired"], own["walk_ms"]["median"]) == (0.1, 0.5)
    assert found["repair", "tools"]["repaired"] == 0.5
    assert len(found) == 3


def test_slices_of_different_runs_are_refused() -> None:
    done, begun = row_of("plain", "own", 3, 30, 0, 0, 0), row_of("repair", "own", 3, 33, 3, 90, 10)
    for parts in (
        [slice_result(0, 2, done)],
        [slice_result(0, 2, done), slice_result(0, 2, done)],
        [slice_result(0, 2, done, begun), slice_result(1, 2, done)],
    ):
        with pytest.raises(ValueError, match="slices"):
            merge(parts)


def test_a_slice_is_named_by_its_place() -> None:
    assert Slice.parse("0/2") == (0, 2)
    for text in ("2/2", "1", "-1/2", "0/0", "a/b"):
        with pytest.raises(ValueError):
            Slice.parse(text)


def test_a_replay_counts_rounds() -> None:
    """Drafts that are right give one round, drafts that are all wrong one per token, and forced ones fewer."""
    tokenizer, _ = nano()
    schema = {"type": "object", "properties": {"long_key": {"type": "boolean"}}, "required": ["long_key"]}
    case = case_of("", "", schema | {"additionalProperties": False})
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
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
    off, repair = Setting(max_repairs=0), Setting()
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
