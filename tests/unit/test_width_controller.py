"""The controller of widths as a whole: late results, requests that come and go, its report."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import pytest

from benchmarks.load.simulate import WIDTHS, measured_costs
from sglang_orthrus.config import DEFAULT_SPEED_FLOOR
from sglang_orthrus.round.costs import FloatArray, RoundCosts
from sglang_orthrus.round.settled_batch import SETTLED_ROUNDS
from sglang_orthrus.round.width_controller import DEFAULT_PROBE_SHARE, WidthController

GREEDY = (False, False)


def run(controller: WidthController, keys: list[str], lens: dict[int, int], count: int) -> list[int]:
    """Widths of so many rounds that commit so many tokens of every request, by width."""
    widths = []
    for _ in range(count):
        width = controller.plan(keys).width
        controller.observe(keys, width, [lens[width]] * len(keys))
        widths.append(width)
    return widths


def started(
    count: int, probe_share: float = DEFAULT_PROBE_SHARE, rounds_late: int = 0
) -> tuple[WidthController, list[str]]:
    controller = WidthController(measured_costs(), WIDTHS, probe_share=probe_share, rounds_late=rounds_late)
    keys = [f"request {number}" for number in range(count)]
    for key in keys:
        controller.start(key, GREEDY)
    return controller, keys


def sizes_asked(controller: WidthController, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes for which the controller asks what it may expect, from now on."""
    asked: list[int] = []
    stock = controller._rates.expected

    def expected(keys: Sequence[Hashable]) -> FloatArray:
        asked.append(len(keys))
        return stock(keys)

    monkeypatch.setattr(controller._rates, "expected", expected)
    return asked


def test_a_new_server_begins_at_the_widest_width_for_few_requests_and_narrower_for_many() -> None:
    for count, expected in ((1, {32}), (4, {32, 16}), (32, {8, 16}), (128, {1, 8})):
        controller, keys = started(count)
        assert controller.plan(keys).width in expected


def test_text_that_drafts_badly_is_decoded_plainly_and_noticed_when_it_turns() -> None:
    controller, keys = started(1)
    bad = run(controller, keys, dict.fromkeys(WIDTHS, 1), 400)
    assert bad[60:].count(1) > 0.96 * len(bad[60:])
    good = run(controller, keys, {width: width for width in WIDTHS}, 400)
    assert good[280:].count(32) > 0.9 * len(good[280:])


def test_planning_draws_nothing_and_reads_nothing_of_the_round() -> None:
    """The same results give the same widths."""
    first, second = ([run(*started(4), {1: 1, 8: 5, 16: 7, 32: 9}, 300)] for _ in range(2))
    assert first == second


def test_results_may_come_late_and_for_requests_that_are_over() -> None:
    controller, keys = started(3)
    late = []
    for number in range(60):
        width = controller.plan(keys).width
        late.append((list(keys), width))
        if len(late) > 2:
            of, at = late.pop(0)
            controller.observe(of, at, [min(at, 3)] * len(of))
        if number % 10 == 9:
            controller.forget(keys.pop(0))
            keys.append(f"new {number}")
            controller.start(keys[-1], GREEDY)
    for of, at in late:
        controller.observe(of, at, [0] * len(of))
    assert controller.plan(keys).width in WIDTHS


def test_requests_that_were_never_started_are_planned_for() -> None:
    controller = WidthController(measured_costs(), WIDTHS)
    width = controller.plan(["unknown"]).width
    controller.observe(["unknown"], width, [1])
    assert width == 32


def test_without_width_one_in_use_the_floor_takes_the_narrowest() -> None:
    controller = WidthController(measured_costs(), (8, 32), probe_share=0.0)
    for key in ("good", "bad"):
        controller.start(key, key)
    widths = []
    for _ in range(400):
        widths.append(controller.plan(["good", "bad"]).width)
        controller.observe(["good", "bad"], widths[-1], [widths[-1], 1])
    assert widths[0] == 32 and widths[-1] == 8


def test_a_width_that_was_not_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="measured"):
        WidthController(measured_costs(), (1, 4))


def test_one_width_stays() -> None:
    controller = WidthController(RoundCosts({16: {1: 1.0}}))
    controller.start("a", GREEDY)
    assert run(controller, ["a"], {16: 2}, 100) == [16] * 100
    assert controller.report().plain_seconds == 0.0


def test_the_report_counts_what_happened() -> None:
    controller, keys = started(2)
    widths = run(controller, keys, {1: 1, 8: 4, 16: 8, 32: 12}, 200)
    report = controller.report()
    assert report.rounds == {width: widths.count(width) for width in set(widths)}
    assert report.requests == {width: 2 * count for width, count in report.rounds.items()}
    assert report.tokens[32] == 24 * report.rounds[32]
    assert report.width == 32
    assert 0 < report.num_probes <= sum(width != 32 for width in widths)
    costs = measured_costs()
    assert report.seconds == pytest.approx(sum(costs.seconds(width, 2) for width in widths))
    assert report.plain_seconds / report.seconds == pytest.approx(12 / 2.17, rel=0.05)
    assert "width 32; tokens per cycle by width:" in str(report) and "32: 12.0 in" in str(report)


def test_a_slow_request_beside_fast_ones_keeps_its_share() -> None:
    controller = WidthController(measured_costs(), WIDTHS)
    keys = [f"fast {number}" for number in range(31)] + ["slow"]
    for key in keys:
        controller.start(key, GREEDY)
    costs, tokens, steps = measured_costs(), 0, 0.0
    widths = []
    for _ in range(2000):
        width = controller.plan(keys).width
        controller.observe(keys, width, [*[min(width, 12)] * 31, 1])
        tokens, steps = tokens + 1, steps + costs.seconds(width, 32) / costs.seconds(1, 32)
        widths.append(width)
    assert tokens / steps == pytest.approx(DEFAULT_SPEED_FLOOR, abs=0.03)
    # Width 8 brings the others most: so many of its rounds, which take 2.66 plain steps, leave the slow one its share.
    assert np.mean(np.array(widths) > 1) == pytest.approx((1 / DEFAULT_SPEED_FLOOR - 1) / 1.66, abs=0.03)
    assert controller.report().num_limited > 1000


def test_long_contexts_change_the_width() -> None:
    """Behind long contexts plain decoding costs half of a round of two passes, which commits five tokens."""
    seconds = {1: {1: 0.006, 64: 0.006}, 8: {1: 0.036, 64: 0.036}}
    costs = RoundCosts(seconds, context=100, context_seconds={1: 1e-7, 8: 2e-7})
    controller = WidthController(costs, probe_share=0.0, floor=0.0)
    keys = list(range(32))
    for key in keys:
        controller.start(key, GREEDY)
    for context, expected in ((3200, 1), (3_200_000, 8), (3200, 1)):
        for _ in range(20):
            width = controller.plan(keys, context=context).width
            controller.observe(keys, width, [min(width, 5)] * 32, context=context)
        assert width == expected


def test_the_best_width_is_taken_at_once_when_many_more_requests_run() -> None:
    """Width 8 is 5 % better with 64 requests: too little to leave another width for, were the batch as before."""
    costs = RoundCosts({8: {1: 0.010, 64: 0.025}, 16: {1: 0.010, 64: 0.0296}})
    controller = WidthController(costs, probe_share=0.0)
    controller.start("first", GREEDY)
    lens = {8: 8, 16: 9}
    assert run(controller, ["first"], lens, 200)[-1] == 16
    keys = [f"request {number}" for number in range(64)]
    for key in keys:
        controller.start(key, GREEDY)
    # Requests are like the first one at the start.
    assert run(controller, keys, lens, 1) == [8]


def test_a_width_whose_graphs_are_too_small_is_neither_chosen_nor_tried() -> None:
    """While another width has a graph for the batch. Beyond all graphs every width is as good."""
    seconds = {1: {1: 1.0, 128: 2.0}, 8: {1: 2.0, 64: 3.0}, 16: {1: 2.0, 64: 3.2}}
    for size, expected in ((64, {8, 16}), (100, {1}), (200, {8, 16})):
        controller = WidthController(RoundCosts(seconds, graph_sizes={1: [1, 128], 8: [1, 64], 16: [1, 64]}))
        keys = list(range(size))
        for key in keys:
            controller.start(key, None)
        widths = set()
        for _ in range(300):
            width = controller.plan(keys).width
            widths.add(width)
            controller.observe(keys, width, [min(width, 6)] * size)
        assert widths >= expected if size != 100 else widths == expected


def test_a_batch_that_decodes_plainly_seldom_asks_and_any_other_asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes come all the same."""
    controller, keys = started(2)
    bad = dict.fromkeys(WIDTHS, 1)
    run(controller, keys, bad, 400)
    asked = sizes_asked(controller, monkeypatch)
    widths = run(controller, keys, bad, 800)
    num_probes = len(widths) - widths.count(1)
    assert 0 < num_probes < 30
    assert len(asked) <= 800 / SETTLED_ROUNDS + 4 * num_probes
    asked.clear()
    run(controller, keys[:1], bad, 1)
    assert asked == [1]
    assert sum(controller.report().rounds.values()) == 1201


@pytest.mark.parametrize(("num_ended", "num_joined", "asks"), [(2, 2, 0), (3, 0, 1), (0, 3, 1)])
def test_plain_decoding_keeps_its_width_while_few_requests_join_or_end(
    num_ended: int, num_joined: int, asks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 16, 2 are few."""
    controller, keys = started(16, probe_share=0.0)
    bad = dict.fromkeys(WIDTHS, 1)
    run(controller, keys, bad, 50)
    asked = sizes_asked(controller, monkeypatch)
    while not asked:
        run(controller, keys, bad, 1)
    asked.clear()
    for key in keys[:num_ended]:
        controller.forget(key)
    new = [f"new {number}" for number in range(num_joined)]
    for key in new:
        controller.start(key, GREEDY)
        controller.start(key, GREEDY)
    assert run(controller, [*keys[num_ended:], *new], bad, 1) == [1]
    assert len(asked) == asks


def test_what_a_grammar_forces_gets_one_wide_round_and_is_no_merit_of_drafts() -> None:
    bad = dict.fromkeys(WIDTHS, 1)
    (with_forced, keys), (without, _) = started(1), started(1)
    for controller in (with_forced, without):
        run(controller, keys, bad, 400)
    forced = 0
    for _ in range(20):
        width, is_probe, is_forced, _ = with_forced.plan(keys, forced=[6])
        if is_forced:
            forced += 1
            assert width > 6 and not is_probe
        lens = [min(width, 7)] if is_forced else [1]
        with_forced.observe(keys, width, lens, forced=[6] if is_forced else None)
    assert forced >= 19, "any other round is a probe"
    assert (with_forced._rates.expected(keys) <= without._rates.expected(keys) + 1e-9).all()
    widths = run(with_forced, keys, bad, 200)
    assert widths.count(1) >= 195


def test_what_is_forced_of_one_of_many_requests_is_not_worth_a_wide_round() -> None:
    controller, keys = started(64)
    run(controller, keys, dict.fromkeys(WIDTHS, 1), 400)
    assert not controller.plan(keys, forced=[6, *[0] * 63]).is_forced
    assert controller.plan(keys, forced=[7] * 64).is_forced


def test_a_batch_that_drafts_keeps_its_width_whatever_is_forced() -> None:
    controller, keys = started(1)
    run(controller, keys, {width: width for width in WIDTHS}, 100)
    assert not controller.plan(keys, forced=[6]).is_forced


def test_every_time_of_plain_decoding_counts() -> None:
    """Also while no width is chosen: one round in nine takes twice as long, just when one is."""
    controller = WidthController(RoundCosts({1: {32: 1.0}, 8: {32: 9.0}}), probe_share=0.0)
    keys = list(range(32))
    for step in range(161):
        assert controller.plan(keys).width == 1
        result = controller.observe(keys, 1, [1] * 32, measured=2.0 if step % SETTLED_ROUNDS == 0 else 1.0)
    assert result.seconds == pytest.approx((2 + SETTLED_ROUNDS - 1) / SETTLED_ROUNDS, rel=0.02)


def test_plain_decoding_that_was_slow_at_first_is_soon_tried_again() -> None:
    """Times of a server's first rounds with chat at 128 requests, when kernels were compiled, and of those behind."""
    slow = [9.4e-3, 6.6e-3, 6.6e-3, 57e-3, 57e-3, 9.3e-3, 9.3e-3, 9.3e-3]
    controller = WidthController(RoundCosts({1: {127: 7.0e-3}, 8: {127: 43e-3}}), floor=0.0, probe_share=0.0)
    keys = list(range(127))
    for key in keys:
        controller.start(key, "class")
    controller.plan(keys)
    controller.observe(keys, 8, [8] * 127, measured=40e-3)
    widths = []
    for _ in range(300):
        widths.append(controller.plan(keys).width)
        if widths[-1] == 1:
            controller.observe(keys, 1, [1] * 127, measured=slow.pop(0) if slow else 7.1e-3)
        else:
            # In the mean 4.3 tokens in 40 ms: less than plain decoding gives.
            controller.observe(keys, 8, ([2, 4, 7] * 43)[:127], measured=40e-3)
    assert widths[-200:] == [1] * 200


def test_a_settled_batch_may_take_several_steps_a_round() -> None:
    """As long as it is settled. A batch that drafts may not."""
    controller, keys = started(16, probe_share=0.0)
    run(controller, keys, dict.fromkeys(WIDTHS, 1), 50)
    taken = list[int]()
    for _ in range(50):
        assert controller.plan(keys).width == 1
        taken.append(2 if controller.add_steps(1) else 1)
        result = controller.observe(keys, 1, [taken[-1]] * 16, num_steps=taken[-1])
        assert (result.requests, result.tokens) == (16 * taken[-1], 16 * taken[-1])
        assert result.seconds == pytest.approx(result.plain_seconds)
    span = "2" * (SETTLED_ROUNDS // 2) + "1"
    assert 5 * span in "".join(map(str, taken))
    rounds = controller.report().rounds
    assert rounds[1] == 50 - sum(count for width, count in rounds.items() if width > 1) + sum(taken)
    drafting, keys = started(1)
    run(drafting, keys, {width: width for width in WIDTHS}, 100)
    drafting.plan(keys)
    assert not drafting.add_steps(1)


def test_a_round_of_several_steps_says_how_long_one_takes() -> None:
    controller = WidthController(RoundCosts({1: {32: 1.0}, 8: {32: 9.0}}), probe_share=0.0)
    keys = list(range(32))
    for _ in range(161):
        assert controller.plan(keys).width == 1
        result = controller.observe(keys, 1, [2] * 32, measured=3.0, num_steps=2)
    assert result.seconds == pytest.approx(3.0, rel=0.02)


def test_a_round_waits_where_rows_of_ended_requests_cost_more() -> None:
    controller, keys = started(32, rounds_late=1)
    for number in range(100):
        controller.start(("old", number), GREEDY)
        controller.forget(("old", number), 20)
    assert not controller.plan(keys).waits, "it may not"
    assert controller.plan(keys, may_wait=True).waits, "nobody knows what a wait costs"
    controller.note_waited(1e-4)
    assert controller.plan(keys, may_wait=True).waits
    controller.note_waited(1.0)
    waits = [controller.plan(keys, may_wait=True).waits for _ in range(400)]
    assert not any(waits[:100]) and any(waits), "it may have become cheaper"
    alone, [key] = started(1, rounds_late=1)
    alone.start("old", GREEDY)
    alone.forget("old", 20)
    assert not alone.plan([key], may_wait=True).waits
