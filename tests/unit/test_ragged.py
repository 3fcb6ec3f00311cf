"""The simulation of rounds whose requests verify unlike numbers of drafts."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.load.ragged import ROUND_MS, WIDTHS, Answer, Position, pass_ms, speed


def _answer(matches: int, product: float, length: int = 400) -> Answer:
    """All of whose positions are alike."""
    return {width: [Position(min(matches, width - 1), np.full(width - 1, product))] * length for width in WIDTHS}


def test_a_pass_takes_half_of_a_round_and_in_between_is_interpolated() -> None:
    assert pass_ms(32, 32) == ROUND_MS[32][1]
    assert pass_ms(32, 32 * 16) == ROUND_MS[32][16] / 2
    assert ROUND_MS[32][8] / 2 < pass_ms(32, 32 * 12) < ROUND_MS[32][16] / 2


def test_drafts_that_are_right_are_worth_their_rows_and_wrong_ones_are_not() -> None:
    right, wrong = _answer(31, 0.9), _answer(0, 0.1)
    assert speed([right], 32, 16, 0.5) == speed([right], 32, 16, None)
    whole, _ = speed([wrong], 32, 16, None)
    cut, rows = speed([wrong], 32, 16, 0.5)
    assert rows == 1
    assert cut == pytest.approx(whole * 2 * pass_ms(32, 512) / (pass_ms(32, 512) + pass_ms(32, 32)), rel=1e-3)


def test_a_draft_behind_the_cut_is_not_accepted() -> None:
    found, rows = speed([_answer(31, 0.4)], 16, 8, 0.5)
    assert rows == 1
    assert found == pytest.approx(16 / (pass_ms(16, 128) + pass_ms(16, 16)), rel=1e-3)
