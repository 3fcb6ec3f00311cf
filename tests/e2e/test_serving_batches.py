"""Batches whose requests come, stop and go anywhere in a round, and verify widths below the block size."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest

from benchmarks.common.equality import Answer, Rounds, compare_rounds
from benchmarks.common.greedy import stop_ids
from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import (
    Reply,
    assert_same_output,
    assert_same_outputs,
    both,
    generate,
    generate_together,
    prompt_of,
    prompts,
    tokens_per_cycle,
    truth,
)
from tests.e2e.serving import streaming
from tests.servers import CONTEXT_LENGTH, NARROW_WIDTH

pytestmark = pytest.mark.e2e

BLOCK = 32
CROWD = 32
LATECOMERS = 4


@pytest.fixture(params=["orthrus", "narrow"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def stream_after(server: Server, start: Event, first_chunk: Event, ids: Sequence[int], length: int) -> Reply:
    assert start.wait(120)
    with streaming(server, ids, length) as chunks:
        for chunk in chunks:
            first_chunk.set()
            last = chunk
    return last


def test_a_batch_of_32_that_others_join(server: Server, plain: Server, reference: Reference) -> None:
    """All in one call, so that they run together; then each latecomer comes when the one before has its first token."""
    short = [prompt.ids for prompt in prompts() if len(prompt.ids) < 128]
    crowd = [(short[number % len(short)], 72 - 2 * number) for number in range(CROWD)]
    late = [(prompt_of("prose", number), 2 + 13 * number) for number in range(LATECOMERS)]

    events = [Event() for _ in range(LATECOMERS + 1)]
    with ThreadPoolExecutor(LATECOMERS) as pool:
        futures: list[Future[Reply]] = [
            pool.submit(stream_after, server, events[number], events[number + 1], *request)
            for number, request in enumerate(late)
        ]
        events[0].set()
        replies = together(server, crowd)
    replies += [future.result() for future in futures]
    expected = together(plain, [*crowd, *late])
    for (ids, _), wanted, reply in zip([*crowd, *late], expected, replies, strict=True):
        assert_same_output(reference, ids, wanted, reply)
    assert most_at_once(replies) >= CROWD - LATECOMERS


def most_at_once(replies: Sequence[Reply]) -> int:
    """How many of these requests ran at the same time, by the server's own times: from prefill to end."""
    spans = [(reply["meta_info"]["forward_entry_time"], reply["meta_info"]["request_finished_ts"]) for reply in replies]
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


def together(server: Server, requests: Sequence[tuple[Sequence[int], int]]) -> list[Reply]:
    """Requests (ids, max_new_tokens) in one call; half of them ignore the end of the text."""
    body = {
        "input_ids": [list(ids) for ids, _ in requests],
        "sampling_params": [
            {"temperature": 0, "max_new_tokens": length, "ignore_eos": number < CROWD and number % 2 == 0}
            for number, (_, length) in enumerate(requests)
        ],
    }
    replies: list[Reply] = server.post("/generate", body)
    return replies


def test_prompts_from_one_token_to_the_context_limit(server: Server, plain: Server, reference: Reference) -> None:
    long = (prompt_of("prose") + prompt_of("qa")) * CONTEXT_LENGTH
    requests_ = [(long[:length], 24) for length in (1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1)]
    # SGLang keeps seven positions for itself.
    requests_ += [(long[: CONTEXT_LENGTH - room], room) for room in (7, 20)]
    replies = generate_together(server, requests_, in_flight=4)
    assert_same_outputs(reference, plain, requests_, replies)


def test_ignore_eos_goes_on_after_the_end_of_the_text(server: Server, plain: Server, reference: Reference) -> None:
    for family in ("json", "tools"):
        ids = prompt_of(family)
        reply = generate(server, ids, 64, ignore_eos=True)
        assert reply["meta_info"]["finish_reason"] == {"type": "length", "length": 64}
        assert stop_ids(NANO) & set(reply["output_ids"][:-1])
        assert_same_output(reference, ids, generate(plain, ids, 64, ignore_eos=True), reply)


def test_one_token_and_the_first_of_several_stops(server: Server, plain: Server, reference: Reference) -> None:
    ids = prompt_of("json", 1)
    whole = generate(plain, ids)
    text, tokens = whole["text"], whole["output_ids"]
    half = len(text) // 2
    never = "\x00 never"
    for sampling in (
        {"max_new_tokens": 1},
        {"max_new_tokens": 1, "stop": [text[:1]]},
        {"stop": [never, text[half : half + 5], "}}}}"], "stop_token_ids": [tokens[-2], stop_ids(NANO).pop()]},
        {"stop": [never, text[-3:]], "stop_token_ids": [tokens[5], tokens[len(tokens) // 2]]},
    ):
        ours, theirs = both(generate, (server, plain), ids, **sampling)
        assert_same_output(reference, ids, theirs, ours)
        assert ours["output_ids"] == tokens[: len(ours["output_ids"])]


def test_a_stop_string_that_spans_two_rounds(server: Server, plain: Server, reference: Reference) -> None:
    """A chunk of a stream ends where a round ends: stop at characters from both of its sides."""
    ids = prompt_of("prose")
    whole = generate(plain, ids)["text"]
    with streaming(server, ids) as chunks:
        ends = [len(chunk["text"]) for chunk in chunks]
    spanning = [end for end in ends if end < len(whole) and whole.find(whole[end - 4 : end + 4]) == end - 4]
    assert len(spanning) >= 4
    for end in spanning[:4]:
        stop = whole[end - 4 : end + 4]
        ours, theirs = both(generate, (server, plain), ids, stop=[stop])
        assert_same_output(reference, ids, theirs, ours)
        assert ours["text"] == whole[: end - 4]
        assert ours["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


@pytest.mark.parametrize("case", ["string after string", "string after token", "string after the end"])
def test_the_first_of_several_stops_in_one_round_wins(orthrus: Server, plain: Server, case: str) -> None:
    ids = prompt_of("json")
    whole = generate(plain, ids)
    assert generate(orthrus, ids)["meta_info"]["spec_verify_ct"] == 1
    early, late = whole["text"][10:16], whole["text"][40:46]
    sampling: dict[str, Any] = {
        "string after string": {"stop": [late, early]},
        "string after token": {"stop": [late], "stop_token_ids": [whole["output_ids"][5]]},
        "string after the end": {"stop": ["\n"]},
    }[case]
    ours, theirs = both(generate, (orthrus, plain), ids, **sampling)
    assert ours["output_ids"] == theirs["output_ids"]
    assert ours["meta_info"]["finish_reason"] == theirs["meta_info"]["finish_reason"]


def test_narrow_blocks_take_as_many_rounds_as_in_the_reference_loop(
    narrow: Server, plain: Server, reference: Reference
) -> None:
    assert narrow.get("/server_info").json()["speculative_num_draft_tokens"] == NARROW_WIDTH
    speed = {}
    for family in ("json", "tools", "arith", "prose"):
        ids = prompt_of(family)
        reply = generate(narrow, ids, 64)
        assert_same_output(reference, ids, truth(plain, ids, 64), reply)
        trace = reference.generate(ids, 64, stop_ids(NANO), width=NARROW_WIDTH)
        answer = Answer(tuple(reply["output_ids"]), reply["meta_info"]["spec_verify_ct"])
        rounds = compare_rounds(trace.tokens, trace.rounds, trace.draft_gaps, answer)
        assert rounds in (Rounds.EQUAL, Rounds.NEAR_TIE), (family, trace.rounds, answer.rounds)
        speed[family] = tokens_per_cycle(reply)
    assert max(speed.values()) <= NARROW_WIDTH
    assert speed["json"] > 0.8 * NARROW_WIDTH


def test_a_batch_of_narrow_blocks(narrow: Server, plain: Server, reference: Reference) -> None:
    requests_ = [(prompt.ids, 3 + 5 * number) for number, prompt in enumerate(prompts()[::5])]
    replies = generate_together(narrow, requests_, in_flight=4)
    assert_same_outputs(reference, plain, requests_, replies)
