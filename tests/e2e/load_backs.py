"""Prompts whose KV is evicted to the host, and what must hold once it is loaded back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from benchmarks.common import pool
from benchmarks.common.greedy import Prompt
from benchmarks.common.reference import Reference
from benchmarks.speed.prompts import PromptPool
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.server import Server
from tests.e2e.helpers import STOPS, Reply, divergence_of, generate, generate_together, tokens_per_cycle
from tests.e2e.serving import gauge

# Five prompts and their answers fit the pool. All of them do not, and the host keeps all.
POOL = 2304
HICACHE = (
    *("--enable-hierarchical-cache", "--max-total-tokens", str(POOL), "--max-running-requests", "8"),
    *("--context-length", "2048", "--enable-metrics", "--decode-log-interval", "1"),
)
_LENGTH, _COUNT, _KEPT, _LIMIT = 300, 14, 5, 64
_LARGEST_PAGE = 16


@cache
def _prompts() -> tuple[Prompt, ...]:
    """Different from the start, so that each has its own KV but for a few tokens."""
    return tuple(PromptPool(NANO).take(_COUNT, _LENGTH))


@cache
def _expected(reference: Reference) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(reference.generate(prompt.ids, _LIMIT, STOPS).tokens) for prompt in _prompts())


def _host_hits(reply: Reply) -> int:
    """Prompt tokens whose KV was loaded back for this request."""
    return int((reply["meta_info"].get("cached_tokens_details") or {"host": 0})["host"])


def _ask(server: Server, prompts: Sequence[Prompt]) -> list[Reply]:
    return [generate(server, prompt.ids, _LIMIT) for prompt in prompts]


def _assert_expected(reference: Reference, numbers: Sequence[int], replies: Sequence[Reply], tie_below: float) -> None:
    for number, reply in zip(numbers, replies, strict=True):
        prompt, expected = _prompts()[number], _expected(reference)[number]
        found = divergence_of(reference, prompt.ids, expected, reply["output_ids"], tie_below)
        assert found is None or found.near_tie, (prompt.name, found)


def _assert_pool_is_whole(server: Server) -> None:
    """No slot is in use, also not by a copy to the host; and a flushed pool holds a request that needs nearly all."""
    assert pool.wait_until_idle(server.url)["max_total_num_tokens"] == POOL
    server.get("/flush_cache?timeout=30")
    long = [token for prompt in _prompts() for token in prompt.ids][: POOL - 300]
    reply = generate(server, long, 4)
    assert reply["meta_info"]["cached_tokens"] == 0
    assert len(reply["output_ids"]) == 4
    pool.wait_until_idle(server.url)


def assert_load_backs_change_nothing(server: Server, reference: Reference, tie_below: float) -> None:
    """One request at a time: prompts found on the device, and the same found on the host.

    Both prefill the same few tokens and read the same KV, so that tokens and rounds are equal without exception.
    """
    kept, others = _prompts()[:_KEPT], _prompts()[_KEPT:]
    server.get("/flush_cache?timeout=30")
    before = gauge(server, "load_back_tokens_total")
    _ask(server, kept)
    on_device = _ask(server, kept)
    assert gauge(server, "load_back_tokens_total") == before
    _ask(server, others)
    on_host = _ask(server, kept)
    for prompt, device, host in zip(kept, on_device, on_host, strict=True):
        assert _host_hits(device) == 0, prompt.name
        assert device["meta_info"]["cached_tokens"] > _LENGTH - 2 * _LARGEST_PAGE
        assert _host_hits(host) > _LENGTH - 2 * _LARGEST_PAGE, (prompt.name, host["meta_info"])
        assert host["output_ids"] == device["output_ids"], prompt.name
        assert host["meta_info"]["spec_verify_ct"] == device["meta_info"]["spec_verify_ct"], prompt.name
    loaded = gauge(server, "load_back_tokens_total") - before
    assert loaded >= sum(map(_host_hits, on_host))
    cycles = [tokens_per_cycle(reply) for reply in on_host]
    print(f"{loaded:.0f} tokens loaded back; tokens per cycle: {', '.join(f'{cycle:.2f}' for cycle in cycles)}")
    assert sum(cycles) / len(cycles) > 3, "a drafter without its KV drafts badly"
    _assert_expected(reference, range(_KEPT), on_host, tie_below)
    _assert_pool_is_whole(server)


def assert_load_backs_beside_rounds(server: Server, reference: Reference, tie_below: float) -> None:
    """Eight requests at a time: KV goes to the host and comes back while other requests draft and verify."""
    server.get("/flush_cache?timeout=30")
    # Each twice, since write_through_selective keeps what was hit; and it is evicted before its turn comes again.
    numbers = 2 * [number for number in range(_COUNT) for _ in range(2)]
    asked = [(_prompts()[number].ids, _LIMIT) for number in numbers]
    replies = generate_together(server, asked, in_flight=8)
    hits = sum(map(_host_hits, replies))
    print(f"{hits} of {_LENGTH * len(asked)} prompt tokens were loaded back")
    assert hits > 5 * _LENGTH
    _assert_expected(reference, numbers, replies, tie_below)
    cycles = [tokens_per_cycle(reply) for reply in replies if reply["meta_info"]["spec_verify_ct"]]
    assert sum(cycles) / len(cycles) > 3
    _assert_pool_is_whole(server)


CHECKS: tuple[Callable[[Server, Reference, float], None], ...] = (
    assert_load_backs_change_nothing,
    assert_load_backs_beside_rounds,
)
