"""The controller against fixed widths and plain decoding, simulated with measured costs and acceptance.

Seeds are fixed, so nothing here fails by chance. Speeds count what rounds commit on average at the widths that were
chosen: a draw that was lucky does not help.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import pytest

from benchmarks.load.simulate import (
    FAMILIES,
    KINDS,
    WIDTHS,
    WITH_FOREIGN,
    Result,
    Simulation,
    measured_costs,
    tokens_per_cycle,
)
from sglang_orthrus.config import DEFAULT_SPEED_FLOOR
from sglang_orthrus.round.width_controller import WidthController

# Of the best fixed width without a floor, and of plain decoding with one.
LEAST = 0.97
# Of the best fixed width with a floor: some requests are unlucky, and more so in a mix.
LEAST_OF_ONE_KIND = 0.96
LEAST_OF_A_MIX = 0.93
# So many rounds cover the learning of a new server, and some hundred requests of a batch.
ROUNDS = {1: 2500, 8: 1000, 32: 800, 64: 800, 128: 600}
SOME = ("json", "qa", "chat", "foreign")


def simulate(
    kinds: Sequence[str], num_requests: int, floor: float = DEFAULT_SPEED_FLOOR, delay: int = 1, seed: int = 0
) -> Result:
    controller = WidthController(measured_costs(), WIDTHS, floor=floor)
    return Simulation(kinds, controller, seed=seed, delay=delay).run(num_requests, ROUNDS[num_requests])


def of_best_fixed(kinds: Sequence[str], num_requests: int, delay: int = 1) -> float:
    """Without a floor. One run of a mix differs from another by a percent, by what is seen first."""
    return fmean(simulate(kinds, num_requests, 0.0, delay, seed).of_best_fixed for seed in range(3))


def kinds_and_sizes() -> list[object]:
    """All at every size; those that show the most are quick enough for every run of the tests."""
    return [
        pytest.param(kind, size, marks=() if kind in SOME else pytest.mark.slow, id=f"{kind}-{size}")
        for kind in KINDS
        for size in ROUNDS
    ]


@pytest.mark.parametrize(("kind", "num_requests"), kinds_and_sizes())
def test_traffic_of_one_kind(kind: str, num_requests: int) -> None:
    result = simulate([kind], num_requests)
    assert result.of_best_fixed >= LEAST_OF_ONE_KIND
    assert result.speedup >= LEAST
    assert result.probe_seconds <= 0.03 * result.seconds


@pytest.mark.parametrize("num_requests", ROUNDS)
def test_mixed_traffic(num_requests: int) -> None:
    """With the floor, a batch of which some kinds gain nothing loses a little more."""
    assert of_best_fixed(FAMILIES, num_requests, delay=2) >= LEAST
    result = simulate(FAMILIES, num_requests, delay=2)
    assert result.of_best_fixed >= LEAST_OF_A_MIX
    assert result.speedup >= LEAST
    assert result.probe_seconds <= 0.03 * result.seconds
    assert min(result.speeds.values()) >= 0.8


@pytest.mark.parametrize("num_requests", ROUNDS)
def test_a_tenth_of_foreign_schemas(num_requests: int) -> None:
    """The floor holds for them, but for what is lost until a request is known."""
    with_floor = simulate(WITH_FOREIGN, num_requests)
    assert with_floor.speedup >= LEAST
    assert min(with_floor.speeds.values()) >= 0.75
    assert of_best_fixed(WITH_FOREIGN, num_requests) >= LEAST


@pytest.mark.parametrize("kind", ["json", "chat", "prose", "arithmetic"])
def test_the_width_follows_a_step_of_load(kind: str) -> None:
    """From 2 to 64 requests and back, within 20 rounds; a width counts as right within 5 % of the best."""
    # The floor has batches of which some requests are unlucky decode plainly for a while.
    simulation = Simulation([kind], WidthController(measured_costs(), WIDTHS, floor=0.0))
    costs = measured_costs()
    for num_requests in (2, 64, 2, 64, 2):
        start = len(simulation.result.widths)
        widths = simulation.run(num_requests, 200).widths[start:]
        if start == 0:
            # A new server learns in its first rounds.
            continue
        speed = {width: tokens_per_cycle(kind, width) / costs.seconds(width, num_requests) for width in WIDTHS}
        right = {width for width in WIDTHS if speed[width] > 0.95 * max(speed.values())}
        settled = [width for width in widths[20:] if width]
        assert sum(width in right for width in settled) >= 0.95 * len(settled)


@pytest.mark.parametrize("num_requests", [1, 8])
def test_texts_that_draft_badly_do_not_narrow_the_rounds_of_others(num_requests: int) -> None:
    """Rounds of 16 were JSON and tool calls, and those of 32 foreign schemas: that says nothing of these widths."""
    ratios = []
    for seed in range(4):
        simulation = Simulation(("json", "tools"), WidthController(measured_costs(), WIDTHS), seed=seed)
        simulation.run(32, 60)
        simulation.take_over("foreign").run(num_requests, 600)
        simulation.take_over("json", "tools")
        simulation.result = Result()
        ratios.append(simulation.run(num_requests, 100).of_best_fixed)
    assert fmean(ratios) >= 0.985


@pytest.mark.parametrize("held_up", [0.01, 0.05])
def test_rounds_that_something_holds_up_mislead_nobody(held_up: float) -> None:
    """A delay of 110 ms is fifteen steps of plain decoding, which chat at 128 requests keeps nonetheless."""
    simulation = Simulation(["chat"], WidthController(measured_costs(), WIDTHS), held_up=held_up)
    assert simulation.run(128, 2000).speedup >= LEAST
