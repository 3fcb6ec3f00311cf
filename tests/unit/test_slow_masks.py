"""Which grammars are slow, and how a round's time is divided."""

from __future__ import annotations

import math

import pytest

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


class Looks:
    """Rounds that look: the host queues a pass, which the GPU then runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cost, self._now = LookCost(0.004), 100.0
        monkeypatch.setattr("sglang_orthrus.grammar.slow_masks.time.perf_counter", lambda: self._now)

    def take(self, host: float, gpu: float, count: int = 1) -> float:
        """So many, of so many seconds each. Returns what a look costs then."""
        for _ in range(count):
            self._now += host
            self.cost.queued()
            self._now += gpu
            self.cost.looked(gpu)
        return self.cost.seconds


def test_a_look_costs_the_shorter_of_what_host_and_gpu_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, gpu, expected in ((0.005, 0.007, 0.005), (0.005, 0.002, 0.002), (0.02, 0.0, 0.0)):
        assert math.isclose(Looks(monkeypatch).take(host, gpu, 60), expected, abs_tol=1e-4)


def test_a_prefill_between_two_looks_counts_little(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    looks.take(0.005, 0.5, 60)
    assert looks.take(0.105, 0.5) <= 0.005 * 1.2


def test_rounds_between_two_looks_are_no_cost_and_bring_looks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch)
    cost, before = looks.cost, looks.take(0.008, 0.02, 60)
    cost.queued()  # behind a look, but does not look
    cost.queued()
    assert 0.004 < cost.seconds < before
    cost.looked(0.01)
    assert cost.seconds < before
    before = looks.take(0.008, 0.02, 2)
    cost.looked(0.02)  # behind a pass that was not queued here, as in a mixed step
    assert cost.seconds == before
    cost.queued()
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
