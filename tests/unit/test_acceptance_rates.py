"""What is expected of requests, learnt from their rounds at any width."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pytest

from sglang_orthrus.round.acceptance_rates import AcceptanceRates

WIDTHS = (1, 8, 16, 32)
GREEDY, GRAMMAR = (False, False), (True, False)


def lengths(rate: float, width: int, count: int, seed: int = 0) -> list[int]:
    """Tokens of rounds whose every draft is accepted at this rate."""
    accepted = np.random.default_rng(seed).geometric(1 - rate, count)
    return np.minimum(accepted, width).tolist()


def observe(rates: AcceptanceRates, key: Hashable, width: int, accept_len: int) -> None:
    """A round of one request."""
    rates.observe_round([key], width, [accept_len])


def tokens_of(rates: AcceptanceRates, key: Hashable, width: int) -> float:
    """That a round of this width is expected to commit of a request."""
    return float(rates.expected([key])[0, rates.widths.index(width)])


def mean_tokens(rate: float, width: int) -> float:
    return (1 - rate**width) / (1 - rate)


def test_nothing_is_known_of_a_new_server_and_drafts_look_worth_it() -> None:
    rates = AcceptanceRates(WIDTHS)
    rates.start("a", GREEDY)
    expected = [tokens_of(rates, "a", width) for width in WIDTHS]
    assert expected[0] == 1.0
    assert expected == sorted(expected)
    assert expected[-1] > 8.0


def test_expectations_are_possible_and_grow_with_the_width_seen_or_not() -> None:
    rates = AcceptanceRates(WIDTHS)
    draws = np.random.default_rng(1)
    keys = list(range(8))
    for key in keys:
        rates.start(key, key % 2)
    for _ in range(200):
        width = int(draws.choice(WIDTHS))
        rates.observe_round(keys, width, draws.integers(1, width + 1, len(keys)).tolist())
        expected = rates.expected(keys)
        assert (expected >= 1.0).all() and (expected <= WIDTHS).all()
        assert (expected[:, 0] == 1.0).all()


@pytest.mark.parametrize("width", [8, 16, 32])
def test_a_width_is_learnt_at_the_width(width: int) -> None:
    rates = AcceptanceRates(WIDTHS)
    rates.start("a", GREEDY)
    seen = lengths(0.8, width, 400)
    for accept_len in seen:
        observe(rates, "a", width, accept_len)
    # The newest 23 rounds count on average: six standard errors.
    assert tokens_of(rates, "a", width) == pytest.approx(np.mean(seen), abs=6 * float(np.std(seen)) / 23**0.5)


def test_a_wider_width_tells_exactly_what_narrower_ones_would_have_committed() -> None:
    rates = AcceptanceRates(WIDTHS)
    rates.start("a", GREEDY)
    for accept_len in [4, 32, 12] * 60:
        observe(rates, "a", 32, accept_len)
    assert tokens_of(rates, "a", 8) == pytest.approx(20 / 3, rel=0.05)
    assert tokens_of(rates, "a", 16) == pytest.approx(32 / 3, rel=0.05)


def test_a_whole_width_committed_says_at_least() -> None:
    """Rounds of 8 that were all accepted say that 32 would go on, and half of them that it would a little."""
    rates = AcceptanceRates(WIDTHS)
    for key, lens in (("all", [8]), ("half", [8, 4])):
        rates.start(key, key)
        for accept_len in lens * 60:
            observe(rates, key, 8, accept_len)
    assert tokens_of(rates, "all", 32) > 24
    assert 6 < tokens_of(rates, "half", 32) < 16


def test_a_constant_rate_is_continued() -> None:
    rates = AcceptanceRates(WIDTHS)
    keys = list(range(32))
    for key in keys:
        rates.start(key, GREEDY)
    for seed in range(40):
        rates.observe_round(keys, 8, lengths(0.9, 8, len(keys), seed))
    for width in (16, 32):
        assert rates.expected(keys)[:, WIDTHS.index(width)].mean() == pytest.approx(mean_tokens(0.9, width), rel=0.12)


def test_what_is_seen_at_a_width_takes_over_from_what_others_say() -> None:
    """Narrow drafts are worse than the wide ones say; a few rounds of a batch show it, for new requests, too."""
    rates = AcceptanceRates(WIDTHS)
    keys = list(range(32))
    for key in keys:
        rates.start(key, GREEDY)
    for _ in range(30):
        rates.observe_round(keys, 32, [20] * 32)
    assert rates.expected(keys)[:, 1].mean() > 7.5
    for _ in range(8):
        rates.observe_round(keys, 8, [4] * 32)
    assert rates.expected(keys)[:, 1].mean() < 6.0
    for key in keys:
        rates.forget(key)
    rates.start("new", GREEDY)
    assert tokens_of(rates, "new", 8) < 6.0


def test_a_new_request_is_expected_to_be_like_its_class() -> None:
    rates = AcceptanceRates(WIDTHS)
    for number in range(10):
        for request_class, accept_len in ((GREEDY, 20), (GRAMMAR, 1)):
            key = (number, request_class)
            rates.start(key, request_class)
            for _ in range(10):
                observe(rates, key, 32, accept_len)
    rates.start("new", GRAMMAR)
    rates.start("another", GREEDY)
    assert tokens_of(rates, "new", 32) < 2.0
    assert tokens_of(rates, "another", 32) > 18.0


def test_one_long_request_does_not_stand_for_its_class() -> None:
    rates = AcceptanceRates(WIDTHS)
    for number in range(10):
        rates.start(number, GREEDY)
        for _ in range(5):
            observe(rates, number, 32, 20)
    rates.start("bad", GREEDY)
    for _ in range(500):
        observe(rates, "bad", 32, 1)
    rates.start("new", GREEDY)
    assert tokens_of(rates, "new", 32) > 14.0


def test_widths_are_not_compared_by_other_texts() -> None:
    """Texts that draft well had width 16, and one that drafts badly had 32: new ones are no better off with 16."""
    rates = AcceptanceRates(WIDTHS)
    for number in range(12):
        rates.start(number, GREEDY)
        for accept_len in lengths(0.9, 16, 10, number):
            observe(rates, number, 16, accept_len)
    rates.start("bad", GREEDY)
    for _ in range(50):
        observe(rates, "bad", 32, 1)
    rates.start("new", GREEDY)
    assert tokens_of(rates, "new", 32) > 1.05 * tokens_of(rates, "new", 16)


def test_a_request_unlike_its_class_is_known_after_some_rounds() -> None:
    rates = AcceptanceRates(WIDTHS)
    rates.start("good", GREEDY)
    for _ in range(100):
        observe(rates, "good", 32, 20)
    rates.start("bad", GREEDY)
    for _ in range(12):
        observe(rates, "bad", 32, 1)
    assert tokens_of(rates, "bad", 32) < 2.0


def test_text_that_changes_is_noticed() -> None:
    rates = AcceptanceRates(WIDTHS)
    rates.start("a", GREEDY)
    for _ in range(200):
        observe(rates, "a", 32, 1)
    for _ in range(16):
        observe(rates, "a", 32, 21)
    assert tokens_of(rates, "a", 32) == pytest.approx(11, abs=1)


def test_rounds_that_draft_nothing_teach_nothing() -> None:
    rates = AcceptanceRates(WIDTHS)
    rates.start("a", GREEDY)
    observe(rates, "a", 32, 10)
    before = rates.expected(["a"])
    for _ in range(50):
        observe(rates, "a", 1, 1)
    observe(rates, "a", 32, 0)
    assert (rates.expected(["a"]) == before).all()


def test_requests_that_are_gone_are_ignored_and_their_rows_start_empty() -> None:
    rates = AcceptanceRates(WIDTHS, max_requests=2)
    rates.start("a", GREEDY)
    for _ in range(50):
        observe(rates, "a", 32, 32)
    rates.forget("a")
    rates.forget("a")
    observe(rates, "a", 32, 1)
    rates.start("b", GRAMMAR)
    assert tokens_of(rates, "b", 32) == tokens_of(AcceptanceRates(WIDTHS), "unknown", 32)


def test_memory_is_bounded() -> None:
    rates = AcceptanceRates(WIDTHS, max_requests=4)
    for key in range(100):
        rates.start(key, key)
        observe(rates, key, 8, 8)
    assert len(rates) == 4
    assert all(key in rates for key in range(96, 100))


def test_starting_twice_keeps_what_is_known() -> None:
    rates = AcceptanceRates(WIDTHS)
    rates.start("a", GREEDY)
    for _ in range(50):
        observe(rates, "a", 32, 1)
    rates.start("a", GREEDY)
    assert tokens_of(rates, "a", 32) < 1.5


def test_other_widths_are_refused() -> None:
    with pytest.raises(KeyError):
        observe(AcceptanceRates(WIDTHS), "a", 4, 1)


@pytest.mark.parametrize("widths", [(32,), (8, 32), (1, 32), (1, 2, 4, 8, 16, 32)])
def test_any_set_of_widths_will_do(widths: tuple[int, ...]) -> None:
    rates = AcceptanceRates(widths)
    rates.start("a", GREEDY)
    for _ in range(50):
        observe(rates, "a", widths[-1], 3)
    assert tokens_of(rates, "a", widths[-1]) == pytest.approx(3, rel=0.05)


def test_what_is_kept_between_rounds_is_what_would_be_computed_anew() -> None:
    """Requests that come, go and learn between two questions about the same ones."""
    kept = AcceptanceRates((1, 8, 32))
    keys = ["a", "b"]

    def check() -> None:
        kept_rows = kept.expected(keys).tolist(), kept.rounds_seen(keys).tolist()
        # A tuple is looked up anew.
        assert kept_rows == (kept.expected(tuple(keys)).tolist(), kept.rounds_seen(tuple(keys)).tolist())

    for key in keys:
        check()
        kept.start(key, "class")
    check()
    kept.observe_round(keys, 8, [8, 1])
    check()
    kept.observe_round(keys, 1, [1, 1])
    check()
    learnt = kept.expected(keys).tolist()
    kept.forget("b")
    check()
    kept.start("b", "class")
    check()
    assert kept.expected(keys).tolist() != learnt
    assert kept.expected([]).shape == (0, 3)


def test_a_text_that_turns_behind_what_a_grammar_forces_is_known_within_a_few_rounds() -> None:
    """Three rounds without an accepted draft say more there than what was committed before."""
    found = {}
    for is_bursty in (True, False):
        rates = AcceptanceRates((1, 8, 32))
        rates.start("one", None, is_bursty)
        for accept_len in (9, 12, 10, 1, 12, 1, 1, 9):
            observe(rates, "one", 32, accept_len)
        found[is_bursty] = [tokens_of(rates, "one", 32)]
        for _ in range(4):
            observe(rates, "one", 32, 1)
            found[is_bursty].append(tokens_of(rates, "one", 32))
    # Two in a row happen in any text.
    assert found[True][:3] == found[False][:3]
    assert found[True][4] < 2 < 4 < found[False][4]
    # It is as certain as it was that the request is known.
    assert rates.rounds_seen(["one"])[0, 2] > 8


@pytest.mark.parametrize(("width", "length"), [(8, 18), (16, 18), (32, 18), (32, 60)])
def test_rounds_that_a_text_cuts_short_count_as_they_would_have_gone_on(width: int, length: int) -> None:
    """Many rounds of a short text end it, and mostly the better ones: to leave these out is wrong by up to a fifth.

    The seed is fixed.
    """
    rates, draws, taken = AcceptanceRates(WIDTHS), np.random.default_rng(0), list[int]()
    expected = list[float]()
    for text in range(1500):
        rates.start(text, GREEDY)
        left = length
        while left > 0:
            committed = min(int(draws.geometric(0.12)), width)
            expected.append(tokens_of(rates, text, width))
            taken.append(min(committed, left))
            rates.observe_round([text], width, taken[-1:], cut=[text] if left < committed else [])
            left -= committed
        rates.forget(text, length)
    assert np.mean(expected[200:]) == pytest.approx(np.mean(taken[200:]), rel=0.06)
