"""Which grammars are slow, and how a round's time is divided."""

from __future__ import annotations

import math

from sglang_orthrus.grammar.slow_masks import (
    MAX_GRAMMARS,
    NO_DEADLINE,
    NUM_SLOW_BLOCKS,
    ROUNDS_KEPT,
    Deadline,
    ExpectedWaits,
    LookCost,
    SlowGrammars,
    TimeShares,
)


def test_one_slow_block_makes_no_slow_grammar_and_several_do_for_some_rounds() -> None:
    slow = SlowGrammars()
    for count in range(NUM_SLOW_BLOCKS):
        assert (7 in slow) is False, count
        slow.add(7)
        slow.begin_round()
    assert 7 in slow
    assert 8 not in slow
    assert None not in slow
    for _ in range(ROUNDS_KEPT):
        slow.begin_round()
    assert 7 not in slow
    assert len(slow) == 0


def test_slow_blocks_far_apart_do_not_add_up() -> None:
    slow = SlowGrammars()
    for _ in range(NUM_SLOW_BLOCKS + 1):
        slow.add(7)
        for _ in range(ROUNDS_KEPT + 1):
            slow.begin_round()
        assert 7 not in slow


def test_clients_can_not_make_it_grow() -> None:
    slow = SlowGrammars()
    for key in range(3 * MAX_GRAMMARS):
        for _ in range(NUM_SLOW_BLOCKS):
            slow.add(key)
    assert len(slow) == MAX_GRAMMARS
    assert 3 * MAX_GRAMMARS - 1 in slow
    assert 0 not in slow


def test_masks_are_left_out_where_they_are_expected_to_take_longer_than_a_look() -> None:
    """Masks of 1 s in 1 of 20 positions take 50 ms in the mean: longer than a look of 20 ms, but not of 120 ms."""
    waits = ExpectedWaits()
    for number in range(2000):
        waits.learn(7, float(number % 20 == 0))
        waits.learn(8, 0.0)
    assert waits.not_worth({0: 7, 1: 8}, 0.02) == [0]
    assert waits.not_worth({0: 7, 1: 8}, 0.12) == []
    assert waits.not_worth({0: 7, 1: 8, 2: 7, 3: 7}, 0.12) == [0, 2, 3], "together they take longer"
    assert waits.not_worth({0: 8, 1: 9}, 0.0) == [], "a grammar without slow masks, and an unknown one"


def looks(cost: LookCost, host: float, gpu: float, count: int, prefill: float = 0.0, now: float = 100.0) -> None:
    """Rounds that look, each behind a prefill or not: the host queues a pass, which the GPU then runs."""
    for _ in range(count):
        now += host + prefill
        cost.queued(now)
        now += gpu
        cost.looked(gpu, now)


def test_a_look_costs_the_shorter_of_what_host_and_gpu_wait_for() -> None:
    for host, gpu, expected in ((0.005, 0.007, 0.005), (0.005, 0.002, 0.002), (0.02, 0.0, 0.0)):
        cost = LookCost(0.004)
        looks(cost, host, gpu, 60)
        assert math.isclose(cost.seconds, expected, abs_tol=1e-4)


def test_a_prefill_between_two_looks_counts_little() -> None:
    cost = LookCost(0.004)
    looks(cost, 0.005, 0.5, 60)
    looks(cost, 0.005, 0.5, 1, prefill=0.1, now=130.3)
    assert cost.seconds <= 0.005 * 1.2


def test_rounds_between_two_looks_are_no_cost_and_bring_looks_back() -> None:
    cost = LookCost(0.004)
    looks(cost, 0.008, 0.02, 60)
    before = cost.seconds
    cost.queued(1e3)  # behind a look, but does not look
    cost.queued(1e4)
    assert 0.004 < cost.seconds < before
    cost.looked(0.01, 2e4)
    assert cost.seconds < before
    looks(cost, 0.008, 0.02, 2, now=2e4)
    before = cost.seconds
    cost.looked(0.02, 3e4)  # behind a pass that was not queued here, as in a mixed step
    assert cost.seconds == before
    for _ in range(5000):
        cost.queued()
    assert cost.seconds < 0.0041


def test_a_grammar_that_is_left_out_is_tried_again() -> None:
    waits = ExpectedWaits()
    for _ in range(100):
        waits.learn(7, 0.1)
    rounds = 0
    while waits.not_worth({0: 7}, 0.05):
        rounds += 1
        assert rounds < 10 * ROUNDS_KEPT
    assert rounds > ROUNDS_KEPT / 10


def test_means_of_few_grammars_are_kept() -> None:
    waits = ExpectedWaits()
    for key in range(3 * MAX_GRAMMARS):
        waits.learn(key, 1.0)
    kept = waits.not_worth({key: key for key in range(3 * MAX_GRAMMARS)}, 1e-9)
    assert kept == list(range(2 * MAX_GRAMMARS, 3 * MAX_GRAMMARS))


def test_shares_of_a_round_are_equal_and_end_with_it() -> None:
    shares = TimeShares(3600.0, num_jobs=8, num_threads=2)
    first = shares.take()
    assert math.isclose(first, 900, rel_tol=0.01), "two of eight at a time"
    assert all(first < shares.take() for _ in range(7)), "what is left goes to those that are left"
    assert math.isclose(shares.take(), 3600, rel_tol=0.01)
    assert TimeShares(0.0, 3, 1).take() == TimeShares(-1.0, 3, 1).take() == 0
    assert TimeShares(math.inf, 3, 1).take() == math.inf


def test_a_deadline_counts_processor_time() -> None:
    assert Deadline(0.0).is_over()
    assert not Deadline(3600.0).is_over()
    assert not NO_DEADLINE.is_over()
