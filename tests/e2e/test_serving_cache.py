"""The radix cache at page sizes 1 and 16, eviction, and prefill in chunks smaller than a block or a page."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import (
    assert_same_output,
    assert_same_outputs,
    generate,
    generate_together,
    prompt_of,
    prompts,
    tokens_per_cycle,
    truth,
    truths,
)
from tests.e2e.serving import assert_nothing_leaked, free_slots, pool_size, streaming
from tests.servers import CONTEXT_LENGTH, PAGE, SMALL_POOL

pytestmark = pytest.mark.e2e


@pytest.fixture(params=["orthrus", "small"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def page_size(server: Server) -> int:
    return int(server.get("/server_info").json()["page_size"])


def test_both_page_sizes_are_served(orthrus: Server, small: Server) -> None:
    assert (page_size(orthrus), page_size(small)) == (1, PAGE)
    assert pool_size(small) == SMALL_POOL


def test_a_prefix_that_ends_inside_a_former_answer(server: Server, plain: Server, reference: Reference) -> None:
    ids = prompt_of("prose")
    server.get("/flush_cache?timeout=30")
    answer = generate(server, ids, 64)["output_ids"]
    requests_, replies = [], []
    for kept in (20, 37, 48):
        branch = [*ids, *answer[:kept], *prompt_of("chat")]
        requests_.append((branch, 40))
        replies.append(generate(server, *requests_[-1]))
        shared = (len(ids) + kept) // page_size(server) * page_size(server)
        assert shared <= replies[-1]["meta_info"]["cached_tokens"] <= len(ids) + kept
        assert shared > len(ids)
    assert_same_outputs(reference, plain, requests_, replies)


def test_branches_of_one_prefix(server: Server, plain: Server, reference: Reference) -> None:
    """They share slots while they run together, and each has a cached prefix afterwards."""
    stem = prompt_of("tools")[:200]
    branches = [
        (stem + prompt_of(family, 1)[:60], 32) for family in ("json", "arith", "prose", "qa", "chat", "convert")
    ]
    server.get("/flush_cache?timeout=30")
    generate(server, stem, 1)
    for _ in range(2):
        replies = generate_together(server, branches, in_flight=len(branches))
        for reply in replies:
            assert reply["meta_info"]["cached_tokens"] >= len(stem) // PAGE * PAGE
        assert_same_outputs(reference, plain, branches, replies)


def test_a_full_pool_evicts_the_oldest(small: Server, plain: Server, reference: Reference) -> None:
    """The last prompt is still cached, the first one no longer."""
    text = tuple(token for prompt in prompts() for token in prompt.ids)
    cold = [text[start : start + 300] for start in range(0, 10 * 300, 300)]
    expected = dict(zip(cold, truths(plain, [(ids, 24) for ids in cold]), strict=True))
    small.get("/flush_cache?timeout=30")
    for ids, is_cached in [*((ids, False) for ids in cold), (cold[-1], True), (cold[0], False)]:
        reply = generate(small, ids, 24)
        assert_same_output(reference, ids, expected[ids], reply)
        assert (reply["meta_info"]["cached_tokens"] > len(ids) - 2 * PAGE) == is_cached
        assert is_cached or reply["meta_info"]["cached_tokens"] < PAGE
    assert free_slots(small) == SMALL_POOL


def test_flush_cache_forgets_all(small: Server, plain: Server, reference: Reference) -> None:
    ids = prompt_of("qa")
    for flush, cached in ((True, 0), (False, len(ids) // PAGE * PAGE), (True, 0)):
        if flush:
            assert_nothing_leaked(small)
        reply = generate(small, ids, 24)
        assert reply["meta_info"]["cached_tokens"] == cached
        assert_same_output(reference, ids, truth(plain, ids, 24), reply)


def test_prompts_around_a_page_and_up_to_the_context_limit(small: Server, plain: Server, reference: Reference) -> None:
    long = (prompt_of("prose") + prompt_of("qa")) * CONTEXT_LENGTH
    requests_ = [(long[:length], 24) for length in (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1)]
    requests_ += [(long[: CONTEXT_LENGTH - room], room) for room in (7, 20)]
    small.get("/flush_cache?timeout=30")
    replies = generate_together(small, requests_, in_flight=4)
    assert_same_outputs(reference, plain, requests_, replies)
    assert_nothing_leaked(small)


def test_chunked_prompts_arrive_while_others_decode(small: Server, plain: Server, reference: Reference) -> None:
    """Chunks are smaller than a block, and the rounds of the others go on between prompts."""
    running = [(prompt_of("prose", number), 100) for number in range(2)]
    arriving = [(prompt_of("tools", number), 40) for number in (0, 1, 2)]
    small.get("/flush_cache?timeout=30")
    with (
        ThreadPoolExecutor() as pool,
        streaming(small, *running[0]) as first,
        streaming(small, *running[1]) as second,
    ):
        for stream in (first, second):
            next(stream)
        arrivals = [pool.submit(generate, small, *request) for request in arriving]
        replies = [list(first)[-1], list(second)[-1], *(arrival.result() for arrival in arrivals)]
    assert_same_outputs(reference, plain, [*running, *arriving], replies)
    for reply in replies:
        assert tokens_per_cycle(reply) > 2
    assert_nothing_leaked(small)
