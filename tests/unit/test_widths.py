"""The choice of a width, the floor under a request's speed, and probes."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_orthrus.round.costs import FloatArray
from sglang_orthrus.round.probes import INTERVAL, LONGEST_INTERVAL, PLAIN_INTERVAL, Probes
from sglang_orthrus.round.speed_floor import MOST_AHEAD, SHORTFALL, SpeedFloor
from sglang_orthrus.round.widths import PATIENCE, choose_width

WIDTHS = (1, 8, 16, 32)
SECONDS = np.array([1.0, 2.0, 3.0, 5.0])


def test_the_most_tokens_per_second_win() -> None:
    assert choose_width(np.array([1.0, 4.0, 9.0, 14.0]), SECONDS, current=None) == 2
    assert choose_width(np.array([1.0, 1.5, 1.5, 1.5]), SECONDS, current=None) == 0


def test_a_small_gain_must_last_and_a_large_one_is_taken_at_once() -> None:
    small, large, noise = (np.array([1.0, 4.0, 6.0 * gain, 1.0]) for gain in (1.05, 1.2, 1.005))
    assert choose_width(small, SECONDS, current=1) == 1
    assert choose_width(small, SECONDS, current=1, patience=PATIENCE) == 2
    assert choose_width(large, SECONDS, current=1) == 2
    assert choose_width(noise, SECONDS, current=1, patience=100) == 1


def test_the_further_a_request_is_behind_the_more_it_counts() -> None:
    floor = SpeedFloor(0.8)
    for key in ("fast", "slow"):
        floor.start(key)
    assert floor.weights(["fast", "slow", "unknown"]).tolist() == [1.0, 1.0, 1.0]
    # A round of five plain steps takes four tokens of its share, one of one step gives back 0.2.
    for _ in range(2):
        floor.observe(["fast", "slow"], [4, 1], 5.0)
    behind = 2 * (4 - 1)
    expected = 1.0 + (behind / SHORTFALL) ** 2
    weights = floor.weights(["slow", "fast"])
    assert weights[0] / weights[1] == pytest.approx(expected) and weights.mean() == pytest.approx(1.0)
    for _ in range(round(behind / 0.2) + 1):
        floor.observe(["slow"], [1], 1.0)
    assert floor.weights(["slow", "fast"]).tolist() == [1.0, 1.0]


def test_over_its_length_a_request_gets_its_share() -> None:
    """Whatever the others gain: here each brings three times as much in a wide round as in plain decoding."""
    floor = SpeedFloor(0.8)
    keys = [*range(31), "slow"]
    for key in keys:
        floor.start(key)
    tokens, steps = 0, 0.0
    for _ in range(20_000):
        is_wide = floor.weights(keys) @ [*[12.0] * 31, 1.0] / 4.0 > len(keys)
        floor.observe(keys, [12 if is_wide else 1] * 31 + [1], 4.0 if is_wide else 1.0)
        tokens, steps = tokens + 1, steps + (4.0 if is_wide else 1.0)
        # It counts as much as all others when it is so far behind.
        assert tokens >= 0.8 * steps - SHORTFALL * (31 * 2.0 / 0.75) ** 0.5 - 4.0
    assert tokens / steps == pytest.approx(0.8, abs=0.02)


def test_speed_of_long_ago_does_not_count() -> None:
    floor = SpeedFloor(0.8)
    floor.start("a")
    for _ in range(1000):
        floor.observe(["a"], [30], 2.0)
    for _ in range(round(MOST_AHEAD / 0.6)):
        floor.observe(["a"], [1], 2.0)
    assert floor.weights(["a", "b"]).tolist() == [1.0, 1.0]
    floor.observe(["a"], [1], 20.0)
    assert floor.weights(["a", "b"])[0] > 1.0


def test_the_floor_forgets_and_can_be_off() -> None:
    floor, off = SpeedFloor(0.8, max_requests=2), SpeedFloor(0.0)
    for key in range(10):
        floor.start(key)
        off.start(key)
    floor.observe(list(range(10)), [1] * 10, 10.0)
    off.observe(list(range(10)), [1] * 10, 10.0)
    assert (floor.weights(list(range(10))) > 1.0).nonzero()[0].tolist() == [8, 9]
    floor.forget(8)
    assert (floor.weights(list(range(10))) > 1.0).nonzero()[0].tolist() == [9]
    assert off.weights(list(range(10))).tolist() == [1.0] * 10


def probe_rounds(
    tokens: list[float], rounds_seen: list[float], current: int, count: int, seconds: FloatArray = SECONDS
) -> list[tuple[int, int]]:
    """(round, width) of probes that bring what was expected."""
    probes = Probes(WIDTHS, share=0.02)
    found = []
    for number in range(count):
        width = probes.next(current, 1, np.array(tokens), seconds, np.array(rounds_seen))
        if width is not None:
            found.append((number, width))
            probes.observe(width, tokens[width])
    return found


def test_probes_keep_within_their_share() -> None:
    for current in range(4):
        for tokens in ([1.0, 1.2, 1.3, 1.3], [1.0, 4.0, 5.0, 5.5], [1.0, 7.0, 13.0, 20.0]):
            found = probe_rounds(tokens, [3.0] * 4, current, 4000)
            token_seconds = SECONDS[current] / tokens[current]
            lost = sum(max(0.0, SECONDS[width] - tokens[width] * token_seconds) for _, width in found)
            assert found
            # A new server may spend what it can save up at most.
            assert lost <= 0.02 * (4000 + LONGEST_INTERVAL) * SECONDS[current]


def test_a_width_that_may_be_better_is_tried_sooner_and_failures_make_it_rarer() -> None:
    unsure = probe_rounds([1.0, 4.0, 5.0, 5.5], [1.0, 50.0, 1.0, 1.0], 1, 400)
    sure = probe_rounds([1.0, 4.0, 5.0, 5.5], [500.0] * 4, 1, 400)
    assert len(unsure) > len(sure) > 0
    assert unsure[0][0] == INTERVAL - 1
    gaps = np.diff([number for number, width in unsure if width == 2])
    assert gaps[0] <= gaps[-1]


def test_plain_decoding_tries_drafts_now_and_then() -> None:
    found = probe_rounds([1.0, 1.2, 1.3, 1.3], [100.0] * 4, 0, 3000)
    gaps = np.diff([number for number, _ in found])
    assert min(gaps) <= PLAIN_INTERVAL
    assert max(gaps) <= LONGEST_INTERVAL


def test_a_probe_that_costs_more_than_is_saved_up_at_most_is_made_in_the_end() -> None:
    """Masks of 128 blocks may make a wide round take twice as long as at start-up."""
    seconds = np.array([1.0, 20.0, 40.0, np.inf])
    found = probe_rounds([1.0, 1.2, 1.3, 1.3], [100.0] * 4, 0, 5000, seconds)
    assert {width for _, width in found} == {1}
    assert len(found) == pytest.approx(5000 * 0.02 / (20.0 - 1.2), abs=1)


def test_width_one_is_never_a_probe() -> None:
    for current in (1, 2, 3):
        assert all(width for _, width in probe_rounds([1.0, 1.0, 1.0, 1.0], [0.0] * 4, current, 500))


def test_a_probe_that_disappoints_costs_more() -> None:
    probes = Probes(WIDTHS, share=0.02)
    tokens = np.array([1.0, 4.0, 6.0, 8.0])
    width = None
    while width is None:
        width = probes.next(1, 1, tokens, SECONDS, np.zeros(4))
    expected = probes.lost_seconds
    probes.observe(1, 4.0)
    assert probes.lost_seconds == expected
    probes.observe(width, 1.0)
    assert probes.lost_seconds == pytest.approx(SECONDS[width] - 1.0 * 0.5)
