"""Simulates widths of rounds under load, with the real controller and no server.

Rounds cost what an H200 took at the 8B shape, and drafts are accepted at a constant rate that gives a kind of text the
tokens per cycle that were measured at that width. A closed loop: a request that ends is replaced at once. Results reach
the controller late, as under overlap scheduling.

    python -m benchmarks.load.simulate --rounds 3000
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from sglang_orthrus.config import DEFAULT_SPEED_FLOOR
from sglang_orthrus.round.costs import RoundCosts
from sglang_orthrus.round.width_controller import WidthController

WIDTHS = (1, 8, 16, 32)
# Seconds of a plain step by batch size, and a round of each width in plain steps. At one request, widths 8 and 16 were
# not measured; the passes wait for memory there, and cost about the same.
PLAIN_SECONDS = {1: 4.97e-3, 8: 5.49e-3, 32: 5.87e-3, 128: 7.52e-3}
PLAIN_STEPS: Mapping[int, Mapping[int, float]] = {
    1: {1: 1.0, 8: 1.0, 32: 1.0, 128: 1.0},
    8: {1: 2.0, 8: 2.07, 32: 2.66, 128: 6.35},
    16: {1: 2.05, 8: 2.22, 32: 4.10, 128: 11.8},
    32: {1: 2.10, 8: 2.61, 32: 7.7, 128: 23.0},
}
# Tokens per cycle at widths 8, 16, 32 (orthrus-nano, greedy, drafts as wide as verify).
KINDS: Mapping[str, tuple[float, float, float]] = {
    "json": (7.4, 12.3, 17.2),
    "tools": (6.9, 12.3, 19.6),
    "arithmetic": (7.1, 13.8, 22.4),
    "conversion": (7.2, 11.7, 16.0),
    "code": (5.5, 11.6, 22.6),
    "qa": (6.1, 8.2, 8.6),
    "think": (7.2, 12.5, 18.1),
    "prose": (4.6, 5.6, 6.1),
    "chat": (3.7, 10.5, 19.0),
    "foreign": (1.33, 1.32, 1.31),
}
FAMILIES = tuple(kind for kind in KINDS if kind != "foreign")
# Nine of ten requests are of the families.
WITH_FOREIGN = (*FAMILIES * 10, *("foreign",) * 10)
CONSTRAINED = {"json", "tools", "foreign"}
# A kernel that is compiled when it is first needed, or another process on the host, takes about so long.
HOLD_UP_SECONDS = 0.11
# The least and the most tokens of an answer.
LENGTHS = (100, 400)


def measured_costs() -> RoundCosts:
    """The rounds' costs, in seconds."""
    return RoundCosts(
        {
            width: {size: steps * PLAIN_SECONDS[size] for size, steps in by_size.items()}
            for width, by_size in PLAIN_STEPS.items()
        }
    )


@cache
def acceptance_rate(tokens: float, width: int) -> float:
    """The rate at which every draft is accepted if a round of this width commits so many tokens."""
    low, high = 0.0, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        if sum(rate**draft for draft in range(width)) < tokens:
            low = rate
        else:
            high = rate
    return low


def tokens_per_cycle(kind: str, width: int) -> float:
    """Of a kind of text, in the long run."""
    return 1.0 if width == 1 else KINDS[kind][WIDTHS.index(width) - 1]


@dataclass
class Request:
    """A running request."""

    key: int
    kind: str
    left: int
    # Tokens, and seconds in the batch, in units of plain steps of the same batch.
    tokens: int = 0
    plain_steps: float = 0.0


@dataclass
class Result:
    """What came of a simulation.

    Attributes:
        seconds: of all rounds.
        plain_seconds: that plain decoding would have taken for as many tokens in the same batches.
        fixed_plain_seconds: width -> the same, had all rounds had this width and the same batches for the same time.
        num_probes: rounds that were probes.
        probe_seconds: what they cost, by the true rates.
        widths: of every round; 0 for a probe.
        speeds: kind -> speed of its requests relative to plain decoding.
    """

    seconds: float = 0.0
    plain_seconds: float = 0.0
    fixed_plain_seconds: dict[int, float] = field(default_factory=lambda: dict.fromkeys(WIDTHS, 0.0))
    num_probes: int = 0
    probe_seconds: float = 0.0
    widths: list[int] = field(default_factory=list)
    speeds: dict[str, float] = field(default_factory=dict)

    @property
    def speedup(self) -> float:
        """Over plain decoding."""
        return self.plain_seconds / self.seconds

    @property
    def best_fixed(self) -> tuple[int, float]:
        """The fixed width that would have been best for these batches, and its speed-up over plain decoding."""
        width, seconds = max(self.fixed_plain_seconds.items(), key=lambda item: item[1])
        return width, seconds / self.seconds

    @property
    def of_best_fixed(self) -> float:
        """Speed relative to the best fixed width."""
        return self.speedup / self.best_fixed[1]


class Simulation:
    """A closed loop of requests.

    Args:
        kinds: of the requests, drawn from.
        controller: chooses widths; None for a fixed one.
        width: the fixed one.
        seed: of everything that is drawn.
        delay: rounds until a result is known.
        held_up: share of the rounds that something holds up for `HOLD_UP_SECONDS`. The controller is told of rounds'
            times then. The delay itself is nobody's fault, and does not count.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        controller: WidthController | None,
        width: int = 1,
        seed: int = 0,
        delay: int = 1,
        held_up: float = 0.0,
    ) -> None:
        self._kinds = kinds
        self._controller = controller
        self._width = width
        self._random = np.random.default_rng([seed, 0])
        # The same requests come in the same order, whatever the widths.
        self._arrivals = np.random.default_rng([seed, 1])
        self._delay = delay
        self._held_up = held_up
        self._costs = measured_costs()
        self._next_key = 0
        self._requests: list[Request] = []
        self._late: deque[Callable[[], object]] = deque()
        self._totals: dict[str, list[float]] = {}
        self.result = Result()

    def run(self, num_requests: int, num_rounds: int) -> Result:
        """So many rounds with so many requests; can be called again with other numbers."""
        for _ in range(num_rounds):
            self._fill(num_requests)
            self._round()
        self.result.speeds = {kind: tokens / steps for kind, (tokens, steps) in sorted(self._totals.items())}
        return self.result

    def take_over(self, *kinds: str) -> Simulation:
        """Requests end, and others are of these kinds."""
        self._kinds = kinds
        self._fill(0)
        return self

    def _fill(self, num_requests: int) -> None:
        while len(self._requests) > num_requests:
            self._end(self._requests.pop())
        while len(self._requests) < num_requests:
            kind = self._kinds[int(self._arrivals.integers(len(self._kinds)))]
            request = Request(self._next_key, kind, int(self._arrivals.integers(*LENGTHS)))
            self._next_key += 1
            self._requests.append(request)
            if self._controller is not None:
                self._controller.start(request.key, (kind in CONSTRAINED, False), kind in CONSTRAINED)

    def _round(self) -> None:
        requests, size = self._requests, len(self._requests)
        keys = [request.key for request in requests]
        width, is_probe = (self._width, False) if self._controller is None else self._controller.plan(keys)[:2]
        lens = self._lengths(width)
        seconds, plain = self._costs.seconds(width, size), self._costs.seconds(1, size)
        result = self.result
        result.seconds += seconds
        # The mean of what the round may commit: what was drawn adds noise only.
        tokens = seconds / self._token_seconds(width)
        result.plain_seconds += tokens / size * plain
        for other in WIDTHS:
            result.fixed_plain_seconds[other] += seconds / self._token_seconds(other) / size * plain
        if is_probe:
            result.num_probes += 1
            usual = next((width for width in reversed(result.widths) if width), 1)
            result.probe_seconds += max(0.0, seconds - tokens * self._token_seconds(usual))
        result.widths.append(0 if is_probe else width)
        for request, length in zip(requests, lens, strict=True):
            request.tokens += length
            request.left -= length
            request.plain_steps += seconds / plain
        controller = self._controller
        if controller is not None:
            measured = self._measured(seconds)
            self._late.append(lambda: controller.observe(keys, width, lens, measured=measured))
            if len(self._late) > self._delay:
                self._late.popleft()()
        for request in requests:
            if request.left <= 0:
                self._end(request)
        self._requests = [request for request in requests if request.left > 0]

    def _measured(self, seconds: float) -> float | None:
        if not self._held_up:
            return None
        return seconds + HOLD_UP_SECONDS * float(self._random.random() < self._held_up)

    def _lengths(self, width: int) -> list[int]:
        if width == 1:
            return [1] * len(self._requests)
        rates = [acceptance_rate(tokens_per_cycle(request.kind, width), width) for request in self._requests]
        accepted = np.log(self._random.random(len(rates))) / np.log(rates)
        return np.minimum(accepted.astype(np.int64) + 1, width).tolist()

    def _token_seconds(self, width: int) -> float:
        tokens = sum(tokens_per_cycle(request.kind, width) for request in self._requests)
        return self._costs.seconds(width, len(self._requests)) / tokens

    def _end(self, request: Request) -> None:
        totals = self._totals.setdefault(request.kind, [0.0, 0.0])
        totals[0] += request.tokens
        totals[1] += request.plain_steps
        if self._controller is not None:
            self._controller.forget(request.key)


def main() -> None:
    """Print a table: every kind of traffic at every number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--traffic", nargs="+")
    parser.add_argument("--floor", type=float, default=DEFAULT_SPEED_FLOOR)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    args = parser.parse_args()
    traffic = {**{kind: (kind,) for kind in KINDS}, "mixed": FAMILIES, "mixed+foreign": WITH_FOREIGN}
    print(f"{'traffic':14}{'requests':>9}{'best':>5}{'of best':>9}{'of plain':>9}{'probes':>8}{'slowest kind':>22}")
    for name in args.traffic or traffic:
        kinds = traffic[name]
        for num_requests in args.requests:
            controller = WidthController(measured_costs(), WIDTHS, floor=args.floor)
            result = Simulation(kinds, controller).run(num_requests, args.rounds)
            width, _ = result.best_fixed
            slowest = min(result.speeds, key=lambda kind: result.speeds[kind])
            print(
                f"{name:14}{num_requests:9}{width:5}{result.of_best_fixed:9.3f}{result.speedup:9.3f}"
                f"{result.probe_seconds / result.seconds:8.1%}{slowest:>16}{result.speeds[slowest]:6.2f}"
            )


if __name__ == "__main__":
    main()
