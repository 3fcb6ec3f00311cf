"""Round costs: measured, interpolated, padded as CUDA graphs pad."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sglang_orthrus.round.costs import RoundCosts, not_decreasing

MEASURED = {1: {1: 1.0, 8: 1.5, 32: 2.7}, 8: {1: 2.0, 8: 2.7, 32: 6.0}}


def test_measured_sizes_cost_what_was_measured() -> None:
    costs = RoundCosts(MEASURED)
    for width, by_size in MEASURED.items():
        for size, seconds in by_size.items():
            assert costs.seconds(width, size) == pytest.approx(seconds)


def test_sizes_between_are_interpolated_and_sizes_above_follow_the_last_slope() -> None:
    costs = RoundCosts(MEASURED)
    assert costs.seconds(1, 20) == pytest.approx(2.1)
    assert costs.seconds(1, 40) == pytest.approx(2.7 + 8 * 0.05)
    assert costs.seconds(8, 64) == pytest.approx(6.0 + 32 * 3.3 / 24)


def test_a_size_below_the_smallest_costs_as_much_as_it() -> None:
    assert RoundCosts({1: {4: 1.0, 8: 2.0}}).seconds(1, 2) == 1.0


def test_one_measurement_is_taken_for_proportional() -> None:
    assert RoundCosts({1: {4: 1.0}}).seconds(1, 8) == pytest.approx(2.0)


def test_a_batch_is_padded_to_the_next_graph_of_its_width() -> None:
    costs = RoundCosts(MEASURED, graph_sizes={1: [1, 8, 32], 8: [1, 8]})
    assert costs.seconds(1, 9) == costs.seconds(1, 32) == pytest.approx(2.7)
    assert costs.seconds(8, 2) == pytest.approx(2.7)
    # No graph is large enough.
    assert costs.seconds(8, 20) == pytest.approx(2.7 + 12 * 3.3 / 24)


def test_widths_without_a_graph_are_worthwhile_if_no_width_has_one() -> None:
    costs = RoundCosts(MEASURED, graph_sizes={1: [1, 8, 32], 8: [1, 8]})
    assert [list(costs.worthwhile(size)) for size in (8, 9, 32, 33)] == [
        [True, True],
        [True, False],
        [True, False],
        [True, True],
    ]
    # Nothing was captured.
    assert RoundCosts(MEASURED).worthwhile(99).all()
    assert RoundCosts(MEASURED, graph_sizes={1: [], 8: []}).worthwhile(99).all()


@pytest.mark.parametrize("seed", range(20))
def test_more_requests_or_more_tokens_never_cost_less(seed: int) -> None:
    noise = random.Random(seed)
    measured = {
        width: {size: noise.uniform(0.5, 1.5) * (10 + width * size) for size in (1, 2, 4, 8, 16)}
        for width in (1, 8, 16, 32)
    }
    costs = RoundCosts(measured, graph_sizes={8: [1, 4, 16]})
    for size in range(1, 24):
        row = costs.row(size)
        assert list(row) == sorted(row)
        assert (costs.row(size + 1) >= row - 1e-12).all()
        assert [costs.seconds(width, size) for width in costs.widths] == list(row)


def test_measurements_in_the_wrong_order_are_averaged() -> None:
    assert not_decreasing([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert not_decreasing([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]


def test_context_costs_what_it_was_measured_to_cost() -> None:
    costs = RoundCosts(MEASURED, context=100, context_seconds={1: 0.001, 8: 0.002})
    assert list(costs.row(8, 800)) == list(costs.row(8))
    assert costs.row(8, 1800) == pytest.approx([1.5 + 1.0, 2.7 + 2.0])
    assert costs.row(8, 300) == pytest.approx([1.5 - 0.5, 2.7 - 1.0])


def test_errors_of_measured_contexts_are_limited() -> None:
    """A slope below zero is none, a wider round has at least a narrower one's, and no round gets free."""
    costs = RoundCosts(MEASURED, context=100, context_seconds={1: 0.001, 8: -0.002})
    assert costs.row(8, 1800) == pytest.approx([2.5, 3.7])
    assert RoundCosts(MEASURED, context=5000, context_seconds={1: 1.0}).row(1, 0) == pytest.approx([0.5, 1.0])


def test_a_table_has_a_row_for_every_measured_size() -> None:
    rows = RoundCosts({1: {1: 1.0, 4: 2.0}, 8: {2: 3.0}}).as_rows()
    assert [row.batch_size for row in rows] == [1, 2, 4]
    assert rows[1].seconds == pytest.approx((4 / 3, 3.0))


def test_nonsense_is_refused() -> None:
    cases: list[dict[int, dict[int, float]]] = [{}, {1: {}}, {1: {1: 0.0}}]
    for nonsense in cases:
        with pytest.raises(ValueError):
            RoundCosts(nonsense)
    with pytest.raises(KeyError):
        RoundCosts(MEASURED).seconds(16, 1)


def test_fewer_requests_save_what_their_graph_saves() -> None:
    """Nothing while a GPU waits for memory, and nothing where a batch is padded to the same graph."""
    seconds = {1: {1: 2.0, 8: 2.0, 16: 2.0}, 8: {1: 3.0, 8: 4.0, 16: 8.0}}
    fewer = [[number, number] for number in range(16)]
    eager = RoundCosts(seconds).saved(16, fewer, [0, 1])
    assert eager.shape == (16, 2) and not eager[:, 0].any()
    assert eager[:, 1] == pytest.approx([*np.linspace(0, 0.5, 9), *np.linspace(0.5, 0.625, 8)[1:]])
    padded = RoundCosts(seconds, {8: (4, 8, 16)}).saved(16, [[number] for number in range(16)], [1])
    assert padded[:, 0] == pytest.approx([0.0] * 8 + [0.5] * 4 + [1 - (3 + 3 / 7) / 8] * 4)
