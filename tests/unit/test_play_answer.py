"""What the page says of an answer: rounds from chunks, accepted drafts, errors in words, counters."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_orthrus.cli.play.answer import Answer, Drafts, accepted_ids, own_texts
from sglang_orthrus.cli.play.counters import grammar_drafts, since
from sglang_orthrus.cli.play.request import MOST_TOKENS, Question
from sglang_orthrus.cli.play.words import blamed_field, error_words


def chunk(ids: list[int], text: str, count: int | None = None, **meta: Any) -> dict[str, Any]:
    return {"output_ids": ids, "text": text, "meta_info": {"completion_tokens": count or len(ids), **meta}}


def counted(rounds: int, accepted: int) -> dict[str, int]:
    return {
        "spec_verify_ct": rounds,
        "spec_num_correct_drafts": accepted,
        "spec_num_proposed_drafts": 31 * rounds,
    }


def answered(*lengths: int, rounds: int | None = None, accepted: int) -> Answer:
    """An answer of one token from prefill, and then chunks of these lengths."""
    answer, total = Answer(), 0
    for length in (1, *lengths):
        total += length
        answer.take(chunk(list(range(total)), "x" * total, **counted(rounds or len(lengths), accepted)))
    return answer


@pytest.mark.parametrize("is_incremental", [False, True])
def test_chunks_hold_all_the_text_or_the_new_text(is_incremental: bool) -> None:
    answer = Answer()
    first = answer.take(chunk([5], "A"))
    second = answer.take(chunk([6, 7], " b c", 3) if is_incremental else chunk([5, 6, 7], "A b c"))
    assert (first.ids, first.text) == ((5,), "A") and (second.ids, second.text) == ((6, 7), " b c")
    assert answer.text == "A b c" and answer.num_tokens == 3


def test_ids_that_belong_to_the_next_chunk_wait_for_it() -> None:
    answer = Answer()
    assert answer.take(chunk([5, 6, 7], "A", 1)).ids == (5,)
    assert answer.take(chunk([5, 6, 7], "A b c")).ids == (6, 7)


def test_plain_sglang_says_nothing_of_drafts() -> None:
    answer = Answer()
    answer.take(chunk([5], "A", finish_reason={"type": "stop"}))
    assert answer.drafts is None and accepted_ids(answer) is None and answer.finish_reason["type"] == "stop"


def test_a_round_ends_with_a_token_of_the_autoregressive_views_own() -> None:
    answer = answered(3, 1, 4, accepted=2 + 0 + 3)
    assert answer.drafts == Drafts(3, 5, 93)
    assert answer.accepted_by_round() == [0, 2, 0, 3]
    assert accepted_ids(answer) == [[], [1, 2], [], [5, 6, 7]]


def test_a_stop_may_cut_the_last_rounds_own_token_off() -> None:
    assert answered(3, 4, accepted=2 + 4).accepted_by_round() == [0, 2, 4]


@pytest.mark.parametrize(("rounds", "accepted"), [(3, 5), (2, 9), (2, 1)])
def test_nothing_is_claimed_where_chunks_are_not_rounds_or_counts_disagree(rounds: int, accepted: int) -> None:
    assert answered(3, 4, rounds=rounds, accepted=accepted).accepted_by_round() is None


def test_own_text_is_what_follows_the_accepted_drafts() -> None:
    answer = Answer()
    for ids, text in ([1], "It"), ([1, 2, 3], "It was a"), ([1, 2, 3, 4], "It was a b"):
        answer.take(chunk(ids, text))
    assert own_texts(answer.rounds, ["", " was", ""]) == ["It", " a", " b"]
    assert own_texts(answer.rounds, ["", " is", ""]) == ["It", "", " b"]  # not in the text: nothing is marked


def test_errors_lose_the_lines_of_source_code() -> None:
    raw = 'Failed to compile json grammar: [10:44:11] /project/cpp/json.cc:4175: Unsupported type "objec"\n'
    message = error_words({"type": "abort", "message": raw, "status_code": 400})
    assert message == 'Failed to compile json grammar: Unsupported type "objec"'
    assert blamed_field(message) == "schema"


def test_errors_of_fields_name_the_field() -> None:
    raw = (
        "1 validation error:\n  {'type': 'missing', 'loc': ('body', 'tools', 0, 'function'), 'msg': 'Field required', "
        "'input': {'a': 1}}\n\n  File \"http_server.py\", line 1906\n    POST /tokenize "
        "[{'type': 'missing', 'loc': ('body', 'tools', 0, 'function'), 'msg': 'Field required', 'input': {'a': 1}}]"
    )
    message = error_words({"object": "error", "message": raw, "code": 400})
    assert message == "tools[0].function: Field required"
    assert blamed_field(message) == "tools"


def test_other_errors_are_about_no_box() -> None:
    assert blamed_field(error_words({"error": {"message": "The input is too long."}})) is None
    assert error_words("x" * 10_000).endswith(" ...")


def test_counters_are_those_of_drafts_under_a_grammar() -> None:
    text = (
        '# TYPE sglang_orthrus:grammar_drafts_total counter\nsglang_orthrus:grammar_drafts_total{change="none"} 77.0\n'
        'sglang_orthrus:grammar_drafts_total{change="repaired",pid="1"} 11.0\n'
        'sglang_orthrus:grammar_drafts_total{change="repaired",pid="2"} 2.0\nother{change="forced"} 5.0\n'
    )
    assert grammar_drafts(text) == {"none": 77, "repaired": 13}
    assert since(grammar_drafts(""), grammar_drafts(text)) == {"none": 77, "repaired": 13, "forced": 0}


def test_a_question_is_the_same_for_both_servers_and_greedy() -> None:
    question = Question.parse({"prompt": "Hi", "system": "Be kind.", "schema": "{}", "tools": [1], "thinking": True})
    assert question.tokenize_body() == {
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        "chat_template_kwargs": {"enable_thinking": True},
        "tools": [1],
    }
    assert question.generate_body([7]) == {
        "input_ids": [7],
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": 256, "json_schema": "{}"},
    }
    bare = Question.parse({"prompt": "Hi", "schema": " \n"})
    assert "json_schema" not in bare.generate_body([7])["sampling_params"] and "tools" not in bare.tokenize_body()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "JSON object"),
        ({"prompt": "  "}, "message is empty"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "Hi", "tools": {}}, "tools must be a JSON array"),
        ({"prompt": "Hi", "max_tokens": MOST_TOKENS + 1}, f"from 1 to {MOST_TOKENS}"),
        ({"prompt": "Hi", "max_tokens": True}, "whole number"),
    ],
)
def test_a_bad_question_is_refused_in_words(body: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Question.parse(body)
