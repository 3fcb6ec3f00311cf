"""The rules by which two generations count as equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from benchmarks.common.equality import (
    Answer,
    Divergence,
    Rounds,
    Tally,
    compare_rounds,
    find_divergence,
    gap_differences,
)

TIE, CLEAR = 5e-5, 0.3


def never(prefix: Sequence[int]) -> float:
    raise AssertionError(f"no gap should be needed after {prefix}")


def test_equal_sequences_do_not_diverge() -> None:
    assert find_divergence([1, 2, 3], [1, 2, 3], never) is None


def test_the_gap_is_asked_for_after_the_common_beginning() -> None:
    asked = []

    def gap_after(prefix: Sequence[int]) -> float:
        asked.append(list(prefix))
        return TIE

    divergence = find_divergence([1, 2, 3, 4], [1, 2, 9, 4], gap_after)
    assert divergence == Divergence(2, 3, 9, TIE) and divergence.near_tie
    assert asked == [[1, 2]]


def test_a_clear_gap_is_no_excuse() -> None:
    divergence = find_divergence([1], [2], lambda prefix: CLEAR)
    assert divergence is not None and not divergence.near_tie


@pytest.mark.parametrize(("expected", "actual"), [([1, 2], [1]), ([1], [1, 2])])
def test_a_different_length_is_no_near_tie(expected: list[int], actual: list[int]) -> None:
    divergence = find_divergence(expected, actual, never)
    assert divergence is not None and divergence.index == 1 and divergence.gap == math.inf


@pytest.mark.parametrize(
    ("answer", "gaps", "verdict"),
    [
        (Answer((1, 2), 3), [CLEAR], Rounds.EQUAL),
        (Answer((1, 2), 4), [CLEAR, TIE], Rounds.NEAR_TIE),
        (Answer((1, 2), 4), [CLEAR, CLEAR], Rounds.DIFFERENT),
        (Answer((1, 2), 4), [], Rounds.DIFFERENT),
        (Answer((1, 5), 3), [CLEAR], Rounds.INCOMPARABLE),
    ],
)
def test_rounds(answer: Answer, gaps: list[float], verdict: Rounds) -> None:
    assert compare_rounds([1, 2], 3, gaps, answer) is verdict


def tally(prompts: int, near_ties: int = 0, clear: int = 0, rounds: Rounds = Rounds.EQUAL) -> Tally:
    result = Tally()
    gaps = [TIE] * near_ties + [CLEAR] * clear
    for number in range(prompts):
        divergence = Divergence(0, 1, 2, gaps[number]) if number < len(gaps) else None
        result.add(str(number), divergence, rounds)
    return result


def test_one_near_tie_in_two_hundred_passes() -> None:
    assert tally(200).passed and tally(200, near_ties=1).passed and tally(24, near_ties=1).passed
    assert not tally(200, near_ties=2).passed
    assert tally(201, near_ties=2).passed


def test_one_clear_divergence_or_unexplained_round_fails() -> None:
    assert not tally(200, clear=1).passed
    assert not tally(200, rounds=Rounds.DIFFERENT).passed
    assert tally(200, rounds=Rounds.NEAR_TIE).passed


def test_bf16_may_meet_any_number_of_wider_ties() -> None:
    result = Tally(prompts_per_excuse=None)
    for number in range(9):
        result.add(str(number), Divergence(0, 1, 2, gap=0.1, tie_below=0.2))
    assert result.passed
    result.add("clear", Divergence(0, 1, 2, gap=0.3, tie_below=0.2))
    assert not result.passed


def test_the_gap_of_an_answer_is_that_of_the_token_after_the_common_beginning() -> None:
    answer = Answer((7, 8), 0, ranked=(((-0.1, 7), (-0.2, 1)), ((-0.5, 8), (-3.0, 1), (-4.0, 2))))
    assert answer.gap_after([7]) == 2.5


def test_rounding_is_how_much_the_gap_of_the_same_two_tokens_changes() -> None:
    alone = [[(-1.0, 5), (-2.0, 6)], [(-1.0, 5), (-2.0, 6)], [(-1.0, 5), (-2.0, 6)]]
    in_block = [[(-1.0, 5), (-2.25, 6)], [(-1.0, 6), (-1.5, 5)], [(-1.0, 5), (-2.0, 9)]]
    assert gap_differences(alone, in_block) == [0.25, 1.5]
