"""The soak's generator is a function of its seed, and each of its checks refuses a wrong answer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest

from benchmarks.common.equality import Divergence
from benchmarks.common.servers import lacking_flags
from benchmarks.volume.soak.checks import check, compare, ranked_divergence
from benchmarks.volume.soak.client import Answer, Reply, read_stream, read_whole
from benchmarks.volume.soak.merge import judged_again, merged
from benchmarks.volume.soak.report import growth, kinds, latencies, memory_report
from benchmarks.volume.soak.requests import ABORT_ALL, Mix, Request
from benchmarks.volume.soak.run import is_excused

PLAIN = Request(0, "generate: greedy", "/generate", {}, limit=4)
GOOD = Answer("a b c d", [5, 6, 7, 8], "length", tokens=(3, 4, 0))


def reply(*answers: Answer, **more: Any) -> Reply:
    return Reply(200, list(answers), **more)


def test_flags_that_a_running_server_lacks_are_named() -> None:
    """Without a parser tool calls stay text, and would count as failures."""
    info = {"tool_call_parser": "qwen25", "enable_metrics": True, "enable_custom_logit_processor": True}
    assert lacking_flags(info) == []
    assert lacking_flags(info | {"tool_call_parser": None}) == ["--tool-call-parser"]
    assert lacking_flags({}) == ["--tool-call-parser", "--enable-metrics", "--enable-custom-logit-processor"]


# -- the generator


def test_a_request_is_a_function_of_seed_and_number() -> None:
    first, second = ([Mix(seed, processor="p").request(number) for number in range(300)] for seed in (3, 3))
    assert first == second
    assert first != [Mix(4, processor="p").request(number) for number in range(300)]
    assert json.loads(json.dumps([request.as_json() for request in first]))


def test_every_kind_of_request_comes() -> None:
    found = kinds(Mix(0, processor="p").request(number) for number in range(4000))
    wanted = """abort batch chat completion cut ebnf echo generate greedy ignore_eos json json_schema logit_bias
        logprobs min_new_tokens n penalties prefix processor regex sampled seeded session stop stop_regex
        stop_token_ids stream
        structural_tag thinking"""
    assert set(wanted.split()) <= set(found)
    assert {"tool auto", "tool named", "tool required", "to the context's end"} <= set(found)
    assert {"control: abort all", "control: update weights", "control: pause, retract and flush"} <= set(found)


def test_no_request_asks_for_what_ends_plain_sglang() -> None:
    """A grammar that ends before a least number of tokens."""
    for number in range(3000):
        request = Mix(1).request(number)
        sampling = request.body.get("sampling_params", request.body)
        if request.valid:
            assert not sampling.get("min_new_tokens") and not sampling.get("min_tokens")


# -- one answer


def test_a_good_answer_passes() -> None:
    assert check(PLAIN, reply(GOOD)) == []


WRONG: dict[str, tuple[Request, Answer]] = {
    "too long": (PLAIN, replace(GOOD, ids=[5, 6, 7, 8, 9], tokens=(3, 5, 0))),
    "too short for its finish reason": (PLAIN, replace(GOOD, ids=[5, 6], tokens=(3, 2, 0))),
    "a wrong count": (PLAIN, replace(GOOD, tokens=(3, 5, 0))),
    "more reasoning than text": (PLAIN, replace(GOOD, tokens=(3, 4, 33))),
    "no finish reason": (PLAIN, replace(GOOD, finish=None)),
    "a negative id": (PLAIN, replace(GOOD, ids=[5, 6, 7, -8])),
    "a forbidden id": (replace(PLAIN, banned=(7,)), GOOD),
    "a stop string": (replace(PLAIN, stops=("b c",)), GOOD),
    "another id than the one that stopped it": (PLAIN, replace(GOOD, finish="stop", matched=9)),
    "an early end": (replace(PLAIN, min_tokens=4), replace(GOOD, finish="stop", matched=8)),
    "an abort without effect": (replace(PLAIN, act="abort"), GOOD),
    "an empty stream": (replace(PLAIN, act="cut"), replace(GOOD, ids=[], tokens=(3, 0, 0))),
    "no JSON": (replace(PLAIN, valid={"schema": {}}), replace(GOOD, text="{", finish="stop")),
    "JSON of another schema": (
        replace(PLAIN, valid={"schema": {"type": "integer"}}),
        replace(GOOD, text="true", finish="stop"),
    ),
    "text that the expression does not match": (
        replace(PLAIN, valid={"regex": "[a-z]"}),
        replace(GOOD, text="ab", finish="stop"),
    ),
    "unbalanced text": (replace(PLAIN, valid={"nested": True}), replace(GOOD, text="((x)", finish="stop")),
    "an open tag": (replace(PLAIN, valid={"tags": True}), replace(GOOD, text="<tool_call>", finish="stop")),
    "no call": (replace(PLAIN, valid={"call": True, "strict": False}), replace(GOOD, finish="tool_calls")),
    "a call of another function": (
        replace(PLAIN, valid={"call": True, "strict": False}),
        replace(GOOD, finish="tool_calls", calls=[("hang_up", '{"city": "Oslo"}')]),
    ),
    "a call with wrong arguments": (
        replace(PLAIN, valid={"call": True, "strict": True}),
        replace(GOOD, finish="tool_calls", calls=[("set_alarm", '{"hour": 99}')]),
    ),
    "no log probabilities": (replace(PLAIN, logprobs={"top": 0, "ids": 0}), GOOD),
    "a missing log probability": (
        replace(PLAIN, logprobs={"top": 0, "ids": 0}),
        replace(GOOD, logprobs=[-1.0, -1.0, -1.0]),
    ),
    "an infinite log probability": (
        replace(PLAIN, logprobs={"top": 0, "ids": 0}),
        replace(GOOD, logprobs=[-1.0, -1.0, -math.inf, -1.0]),
    ),
    "too few alternatives": (
        replace(PLAIN, logprobs={"top": 2, "ids": 0}),
        replace(GOOD, logprobs=[-1.0] * 4, top=[[(-1.0, 5)]] * 4),
    ),
    "alternatives out of order": (
        replace(PLAIN, logprobs={"top": 1, "ids": 0}),
        replace(GOOD, logprobs=[-1.0] * 4, top=[[(-2.0, 5)]] * 4),
    ),
    "too few ids' log probabilities": (
        replace(PLAIN, logprobs={"top": 0, "ids": 2}),
        replace(GOOD, logprobs=[-1.0] * 4, at_ids=[[(-1.0, 5)]] * 4),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_found(name: str) -> None:
    request, answer = WRONG[name]
    assert len(check(request, reply(answer))) >= 1


RIGHT: dict[str, tuple[Request, Answer]] = {
    "an end before the abort": (
        replace(PLAIN, act="abort", body={"sampling_params": {"stop_regex": "[0-9]{2}"}}),
        replace(GOOD, text="a b c 42", finish="stop", matched="[0-9]{2}"),
    ),
    "arguments that no strict schema binds": (
        replace(PLAIN, valid={"call": True, "strict": False}),
        replace(GOOD, finish="tool_calls", calls=[("set_alarm", "10")]),
    ),
    "the token that SGLang samples under a limit of none": (
        replace(PLAIN, limit=0, logprobs={"top": 0, "ids": 0}),
        replace(GOOD, ids=[], tokens=(3, 0, 0), logprobs=[-1.0]),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_is_left_alone(name: str) -> None:
    request, answer = RIGHT[name]
    assert check(request, reply(answer)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        Reply(500, error="boom"),
        Reply(0, error="no answer"),
        Reply(200, [GOOD], error="in the stream"),
        reply(GOOD, GOOD),
        reply(),
        reply(GOOD, usage=(3, 5, 0)),
        reply(GOOD, usage=(3, 4, 33)),
    ],
    ids=["5xx", "silence", "an error in a stream", "two answers", "no answer", "a wrong sum", "reasoning in the sum"],
)
def test_a_wrong_reply_is_found(wrong: Reply) -> None:
    assert check(PLAIN, wrong)


# -- against plain SGLang


def never(number: int, expected: Sequence[int], actual: Sequence[int]) -> Divergence | None:
    raise AssertionError("the ids are equal")


def gap(value: float) -> Any:
    return lambda number, expected, actual: Divergence(3, expected[-1], actual[-1], value)


def alone(number: int) -> Answer:
    return replace(GOOD, logprobs=[-1.0] * 4)


OTHER = replace(GOOD, ids=[5, 6, 7, 9], text="a b c e")


def test_equal_replies_pass() -> None:
    assert compare(PLAIN, reply(GOOD), reply(GOOD), never, alone).problems == []


@pytest.mark.parametrize(
    "change",
    [
        {"text": "other"},
        {"finish": "stop"},
        {"matched": 8},
        {"tokens": (3, 4, 2)},
        {"calls": [("f", "{}")]},
        {"reasoning": "hm"},
        {"logprobs": [-1.0, -1.0, -1.0, -1.5]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_equal_ids_with_another_rest_are_found(change: dict[str, Any]) -> None:
    ours, theirs = replace(GOOD, **{"logprobs": [-1.0] * 4, **change}), replace(GOOD, logprobs=[-1.0] * 4)
    assert compare(PLAIN, reply(ours), reply(theirs), never, alone).problems


def test_log_probabilities_that_plain_sglang_gives_alone_pass() -> None:
    """It forgets penalties of a request that it retracts."""
    ours, theirs = replace(GOOD, logprobs=[-1.0] * 4), replace(GOOD, logprobs=[-1.0, -1.0, -1.0, -0.8])
    assert compare(PLAIN, reply(ours), reply(theirs), never, alone).problems == []


def test_other_ids_pass_at_a_near_tie_only() -> None:
    near = compare(PLAIN, reply(OTHER), reply(GOOD), gap(1e-5), alone)
    assert not near.problems and len(near.near_ties) == 1
    assert compare(PLAIN, reply(OTHER), reply(GOOD), gap(0.5), alone).problems


def test_a_cut_stream_is_a_prefix() -> None:
    cut = replace(PLAIN, act="cut")
    short = replace(GOOD, ids=[5, 6], text="a b", finish=None, tokens=(3, 2, 0))
    assert compare(cut, reply(short), reply(GOOD), never, alone).problems == []
    assert compare(cut, reply(replace(short, ids=[5, 9])), reply(GOOD), gap(0.5), alone).problems
    assert compare(PLAIN, reply(short), reply(GOOD), gap(math.inf), alone).problems


def test_other_usage_and_numbers_of_answers_are_found() -> None:
    assert compare(PLAIN, reply(GOOD, usage=(3, 4, 0)), reply(GOOD, usage=(3, 5, 0)), never, alone).problems
    assert compare(PLAIN, reply(GOOD), reply(GOOD, GOOD), never, alone).problems


def test_a_divergence_is_judged_by_plain_sglangs_ranking() -> None:
    ranked = replace(GOOD, top=[[(-1.0, 5), (-3.0, 1)]] * 3 + [[(-1.0, 8), (-1.00005, 9)]])
    tie = ranked_divergence(ranked, [5, 6, 7, 8], [5, 6, 7, 9], 1e-4)
    assert tie is not None and tie.near_tie
    far = ranked_divergence(ranked, [5, 6, 7, 8], [5, 6, 9, 8], 1e-4)
    assert far is not None and not far.near_tie
    assert ranked_divergence(ranked, [5, 6, 7, 9], [5, 6, 7, 8], 1e-4) is None, "plain SGLang alone gives ours"
    assert ranked_divergence(ranked, [5, 6, 9], [5, 6, 7, 8], 1e-4) is None, "which may be longer"


def test_an_abort_of_everything_excuses_what_ran_then() -> None:
    everything = replace(PLAIN, act="control", kind="control: abort all")
    abort = Reply(200, started=5.0, seconds=0.1)
    aborted = replace(GOOD, finish="abort")
    batch = [PLAIN, everything]
    during = reply(aborted, started=4.0, seconds=2.0)
    assert is_excused(during, [during, abort], batch)
    after = reply(aborted, started=6.0, seconds=2.0)
    assert not is_excused(after, [after, abort], batch)
    assert not is_excused(reply(GOOD, started=4.0, seconds=2.0), [during, abort], batch)


# -- reading


def test_streams_read_as_whole_answers_do() -> None:
    def answer(choice: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [choice]}

    call = {"id": "x", "index": 0, "function": {"name": "f", "arguments": "{}"}}
    message = {"content": "ab", "reasoning_content": "r", "tool_calls": [call]}
    whole: dict[str, Any] = {
        "choices": [{"index": 0, "finish_reason": "stop", "matched_stop": 7, "message": message}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "reasoning_tokens": 1},
        "sglext": {"output_ids": [[6, 7]]},
    }
    parts: list[dict[str, Any]] = [{"reasoning_content": "r"}, {"content": "a"}, {"content": "b"}]
    parts += [{"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{"}}]}]
    parts += [{"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}]
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in parts
    ]
    end = {"index": 0, "delta": {}, "finish_reason": "stop", "matched_stop": 7}
    events += [answer(end), {"choices": [], "usage": whole["usage"], "sglext": whole["sglext"]}]
    path = "/v1/chat/completions"
    assert read_stream(path, events) == read_whole(path, whole)


def test_the_last_event_of_a_generate_stream_counts() -> None:
    def event(ids: list[int], finish: Any) -> dict[str, Any]:
        meta = {"prompt_tokens": 3, "completion_tokens": len(ids), "finish_reason": finish}
        return {"text": "x" * len(ids), "output_ids": ids, "meta_info": meta}

    last = event([5, 6], {"type": "length", "length": 2})
    assert read_stream("/generate", [event([5], None), last]) == read_whole("/generate", last)


# -- figures


def test_growth_is_found_in_the_last_half_alone() -> None:
    flat = [(100 * step, 500.0 - 40 * max(0, 10 - step)) for step in range(20)]
    rise = growth(flat)
    assert rise is not None and rise["mib_in_the_last_half"] == 0
    leak = growth([(count, value + 0.01 * count) for count, value in flat])
    assert leak is not None and leak["mib_per_1000_requests"] == pytest.approx(10, abs=1e-6)
    assert growth(flat[:3]) is None
    report = memory_report([(count, {"main": value, "sglang::scheduler": 1.0}) for count, value in flat])
    assert set(report["growth"]) == {"all", "main", "sglang::scheduler"}


def test_latencies_leave_out_what_was_cut() -> None:
    cut = replace(PLAIN, act="cut")
    timed = [(PLAIN, Reply(200, [GOOD], seconds=1.0)), (cut, Reply(200, [GOOD], seconds=9.0))]
    assert latencies(timed)["all"] == {"requests": 1, "p50": 1.0, "p99": 1.0}


# -- slices


def test_slices_are_counted_together() -> None:
    def part(requests: int, failures: int, seed: int) -> dict[str, Any]:
        return {
            **{
                "requests": requests,
                "failures": failures,
                "seconds": 10.0,
                "compared_with_plain": requests,
                "seed": seed,
            },
            **{"near_ties": {"below": 1e-4, "found": [1] * failures}, "ended_early": "", "kinds": {"chat": requests}},
            **{
                "tokens_per_cycle": 2.0,
                "failed": [{"request": None, "problems": [seed]}] * failures,
                "plain_too": [],
                "in_flight": 16,
            },
            **{"latency_seconds": {}, "pool": {}, "resident_memory": {}, "provenance": {"commit": "a"}},
        }

    whole = merged([part(3000, 0, 1), part(1000, 2, 2)])
    assert (whole["requests"], whole["failures"], whole["kinds"]) == (4000, 2, {"chat": 4000})
    assert [failure["problems"] for failure in whole["failed"]] == [[2], [2]] and whole["excused"] == []
    assert [one["seed"] for one in whole["slices"]] == [1, 2]
    # One near tie in 200 requests is allowed over all.
    assert whole["near_ties"]["allowed"] == 20


def test_a_failure_is_judged_again_by_todays_checks() -> None:
    mix = Mix(6)
    number = next(number for number in range(100, 10**6) if mix.request(number).kind == ABORT_ALL) + 2
    failure = {"problems": ["an error"], "request": {"number": number}}
    waited = asdict(reply(error="Aborted by AbortReq."))
    assert judged_again(failure | {"ours": waited}, mix, 16) == [], "everything was aborted two requests before"
    other = asdict(reply(error="Internal error"))
    assert judged_again(failure | {"ours": other}, mix, 16) != []


def test_slices_of_unlike_commits_are_not_one_run() -> None:
    parts = [{"provenance": {"commit": commit}} for commit in "ab"]
    with pytest.raises(SystemExit, match="one commit"):
        merged(parts)
