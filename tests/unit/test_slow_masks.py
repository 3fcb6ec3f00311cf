"""Which grammars are slow, and how a round's time is divided."""

from __future__ import annotations

import math

from sglang_orthrus.grammar.slow_masks import (
    MAX_GRAMMARS,
    NO_DEADLINE,
    NUM_SLOW_BLOCKS,
    ROUNDS_KEPT,
    Deadline,
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
