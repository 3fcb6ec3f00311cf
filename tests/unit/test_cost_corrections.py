"""What rounds take in traffic, relative to start-up."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from sglang_orthrus.round.cost_corrections import HALF_LIFE, CostCorrections
from sglang_orthrus.round.costs import RoundCosts
from sglang_orthrus.round.width_controller import WidthController

_KEYS = list(range(32))


def test_nothing_is_corrected_before_anything_was_seen() -> None:
    assert CostCorrections(3).factors("kind", 8).tolist() == [1.0, 1.0, 1.0]


def test_a_factor_is_learnt_whatever_the_noise() -> None:
    corrections, noise = CostCorrections(2), np.random.default_rng(1)
    for _ in range(400):
        corrections.observe("kind", 32, 1, 3.0 * noise.uniform(0.8, 1.2))
    # Standard error of a mean over 32 rounds or so: 3 * 0.115 / 5.6 = 0.06; four of them, 1 in 15,000 seeds.
    assert corrections.factors("kind", 32)[1] == pytest.approx(3.0, abs=0.25)


def test_one_slow_round_moves_a_factor_a_little() -> None:
    corrections = CostCorrections(1)
    for _ in range(100):
        corrections.observe("kind", 4, 0, 1.0)
    corrections.observe("kind", 4, 0, 1000.0)
    assert corrections.factors("kind", 4)[0] < 1.1


def test_a_factor_follows_when_times_change() -> None:
    corrections = CostCorrections(1)
    for factor in [1.0] * 200 + [4.0] * 100:
        corrections.observe("kind", 4, 0, factor)
    assert corrections.factors("kind", 4)[0] == pytest.approx(4.0, rel=0.05)


def test_a_width_that_was_slow_once_is_tried_again() -> None:
    """The first round of plain decoding took twenty times as long as at start-up; all later ones would not."""
    costs = RoundCosts({1: {1: 0.005, 64: 0.005}, 8: {1: 0.010, 64: 0.010}})
    controller = WidthController(costs, probe_share=0.0)
    controller.start("key", "class")
    widths = []
    for _ in range(400):
        width = controller.plan(["key"]).width
        is_first = width == 1 and 1 not in widths
        widths.append(width)
        controller.observe(["key"], width, [1], None, 0.1 if is_first else {1: 0.005, 8: 0.010}[width])
    assert widths.count(1) > 380


def test_what_was_learnt_of_a_width_fades_while_others_are_used() -> None:
    corrections = CostCorrections(2)
    _learn(corrections, 4, 0, 3.0)
    for _ in range(round(HALF_LIFE)):
        corrections.observe("kind", 4, 1, 1.0)
    assert corrections.factors("kind", 4)[0] == pytest.approx(2.0, abs=0.1)
    for _ in range(round(HALF_LIFE)):
        corrections.observe("kind", 64, 1, 1.0)
    assert corrections.factors("kind", 4)[0] == pytest.approx(2.0, abs=0.1), "rounds of other sizes say nothing"


@pytest.mark.parametrize("num_requests", [100, 200])
def test_what_a_few_rounds_of_plain_decoding_said_fades_soon(num_requests: int) -> None:
    """Also where it was seen in batches of another size. What many rounds said, or rounds of another width, stays."""
    for rounds, share in ((4, 0.5), (60, 0.9)):
        corrections = CostCorrections(3, knows_plain=True)
        for width in (0, 1):
            corrections.observe("kind", 100, width, 2.0, rounds=rounds)
        before = corrections.factors("kind", num_requests)
        for _ in range(32):
            corrections.observe("kind", num_requests, 2, 1.0)
        left = (corrections.factors("kind", num_requests) - 1.0) / (before - 1.0)
        assert left[0] == pytest.approx(share, abs=0.05)
        assert left[1] >= 0.9


def test_a_batch_size_that_was_not_seen_is_as_far_off_as_the_nearest() -> None:
    corrections = CostCorrections(3)
    _learn(corrections, 32, 0, 2.0)
    _learn(corrections, 64, 2, 5.0)
    assert corrections.factors("kind", 1) == pytest.approx([2.0, 1.0, 5.0], rel=0.1), "nobody has seen the middle width"
    assert corrections.factors("kind", 40) == pytest.approx([2.0, 1.0, 5.0], rel=0.1), "32 to 63 are one"
    _learn(corrections, 2, 0, 3.0)
    assert corrections.factors("kind", 1) == pytest.approx([3.0, 1.0, 5.0], rel=0.1)
    assert corrections.factors("kind", 100) == pytest.approx([2.0, 1.0, 5.0], rel=0.1)
    assert corrections.factors("other", 32).tolist() == [1.0, 1.0, 1.0]


def test_a_start_up_that_was_disturbed_does_not_hide_a_width() -> None:
    """All took twice as long as they do, and one width alone is in use: the others may be as much faster."""
    corrections = CostCorrections(3)
    _learn(corrections, 32, 2, 0.5)
    assert corrections.factors("kind", 32) == pytest.approx([0.5, 0.5, 0.5], rel=0.05)
    corrections.observe("kind", 32, 1, 0.5)
    assert corrections.factors("kind", 32) == pytest.approx([0.5, 0.5, 0.5], rel=0.05), "one round is enough to agree"


def test_a_narrower_width_is_found_though_start_up_was_disturbed() -> None:
    """Timed beside another server, all widths looked twice as slow. Width 8 is the best, 32 in use at first."""
    true = {1: 0.005, 8: 0.010, 32: 0.012}
    costs = RoundCosts({width: {1: 2 * seconds, 64: 2 * seconds} for width, seconds in true.items()})
    widths = _widths(_controller(costs), None, {1: 1, 8: 7, 32: 7}, true)
    assert widths[0] == 32 and widths[-20:] == [8] * 20


def test_a_width_that_takes_longer_than_at_start_up_is_left() -> None:
    """At start-up width 8 took twice a plain step. With grammars on the host it takes six times as long."""
    costs = RoundCosts({1: {1: 0.005, 64: 0.005}, 8: {1: 0.010, 64: 0.010}})
    controller = _controller(costs)
    widths = _widths(controller, "grammar", {1: 1, 8: 3}, {1: 0.005, 8: 0.030})
    assert widths[0] == 8 and widths[-1] == 1
    assert controller.plan(_KEYS, kind="no grammar").width == 8


def _controller(costs: RoundCosts) -> WidthController:
    controller = WidthController(costs, floor=0.0, probe_share=0.0)
    for key in _KEYS:
        controller.start(key, "class")
    return controller


def _widths(
    controller: WidthController, kind: str | None, accept_lens: Mapping[int, int], seconds: Mapping[int, float]
) -> list[int]:
    """Of 60 rounds, which commit so many tokens of each request and take so long at every width."""
    widths = []
    for _ in range(60):
        width = controller.plan(_KEYS, kind=kind).width
        widths.append(width)
        controller.observe(_KEYS, width, [accept_lens[width]] * len(_KEYS), kind, seconds[width])
    return widths


def _learn(corrections: CostCorrections, num_requests: int, width: int, factor: float) -> None:
    for _ in range(60):
        corrections.observe("kind", num_requests, width, factor)


def test_rounds_that_are_learnt_at_once_count_as_many() -> None:
    """The mean of eight rounds changes a factor as eight such rounds do, but for what an average forgets meanwhile."""
    at_once, singly = CostCorrections(2), CostCorrections(2)
    for corrections in (at_once, singly):
        for _ in range(40):
            corrections.observe(None, 64, 0, 1.0)
    at_once.observe(None, 64, 0, 1.5, rounds=8)
    for _ in range(8):
        singly.observe(None, 64, 0, 1.5)
    assert at_once.factors(None, 64) == pytest.approx(singly.factors(None, 64), rel=1e-3)
    assert at_once.factors(None, 64)[0] > 1.15
