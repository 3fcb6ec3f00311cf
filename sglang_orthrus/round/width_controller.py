"""Chooses every round's width: what follows traffic, from acceptance and costs.

Any width is exact. A width follows from earlier rounds, and from what grammars force behind them, never from tokens
drawn in the round that is planned: rejection sampling would be biased otherwise.

Letters: R requests, K widths.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Sequence

import numpy as np

from sglang_orthrus.config import DEFAULT_SPEED_FLOOR
from sglang_orthrus.round.acceptance_rates import AcceptanceRates
from sglang_orthrus.round.cost_corrections import CostCorrections
from sglang_orthrus.round.costs import FloatArray, RoundCosts
from sglang_orthrus.round.probes import Probes
from sglang_orthrus.round.settled_batch import SettledBatch, usual_mean
from sglang_orthrus.round.speed_floor import SpeedFloor
from sglang_orthrus.round.wait_cost import WaitCost
from sglang_orthrus.round.width_report import WidthReport
from sglang_orthrus.round.widths import PATIENCE, RoundResult, RoundWidth, choose_width

# Of all rounds' time, what probes may cost. Single results vary; this keeps them within 3 %. With half as much, better
# widths than plain decoding are found too late at 64 requests.
DEFAULT_PROBE_SHARE = 0.02
# When so many times as many requests run, or as few, nothing speaks for the width that rounds had.
LARGE_CHANGE = 1.5
# Equally likely values of mean 0 and variance 1.
_DEVIATIONS = np.sqrt(1.5) * np.array([-1.0, 0.0, 1.0])


class WidthController:
    """Chooses widths and learns from their rounds. Results may come rounds later, and without some of the requests.

    Args:
        costs: of rounds of every width, timed at start-up; measured rounds correct them. With width 1 among them, the
            floor holds, be the width in use or not.
        widths: that rounds may have; None for all that were measured.
        floor: share of plain decoding's speed that requests are kept at; 0 for none.
        probe_share: of all rounds' time, the most that probes may cost; 0 for no probes.
        max_requests: the most requests that are remembered; the oldest is forgotten for a new one.
        rounds_late: that a request still takes part in when its text has ended, unless rounds wait. 1 under overlap
            scheduling.

    Raises:
        ValueError: a width was not measured.
    """

    def __init__(
        self,
        costs: RoundCosts,
        widths: Sequence[int] | None = None,
        floor: float = DEFAULT_SPEED_FLOOR,
        probe_share: float = DEFAULT_PROBE_SHARE,
        max_requests: int = 1024,
        rounds_late: int = 0,
    ) -> None:
        self._rounds_late = rounds_late
        self.widths = tuple(sorted(widths or costs.widths))
        if not set(self.widths) <= set(costs.widths):
            raise ValueError(f"widths {self.widths} are not all measured: {costs.widths}")
        self._costs = costs
        self._columns = [costs.widths.index(width) for width in self.widths]
        self._knows_plain = costs.widths[0] == 1
        self._corrections = CostCorrections(len(costs.widths), self._knows_plain)
        self._rates = AcceptanceRates(self.widths, max_requests)
        self._floor = SpeedFloor(floor if self._knows_plain else 0.0, max_requests)
        self._probes = Probes(self.widths, probe_share) if probe_share and len(self.widths) > 1 else None
        self._current: int | None = None
        # In the batch for which it was chosen.
        self._num_requests = 1
        self._patience = 0
        self._settled: SettledBatch | None = None
        self._wait = WaitCost()
        # Rounds since a width was last chosen.
        self._rounds_passed = 0
        self._rounds: Counter[int] = Counter()
        self._requests: Counter[int] = Counter()
        self._tokens: Counter[int] = Counter()
        self._seconds = self._plain_seconds = 0.0
        self._num_limited = self._num_waits = 0
        self._wait_seconds = 0.0

    def __contains__(self, key: Hashable) -> bool:
        """Whether a request is remembered."""
        return key in self._rates

    def start(self, key: Hashable, request_class: Hashable, is_bursty: bool = False) -> None:
        """Of a request that joins the batch; nothing changes if it is known.

        Args:
            key: of the request.
            request_class: what new requests of its like have in common, such as (has a grammar, is sampled).
            is_bursty: whether parts of its text may draft far better than the rest.
        """
        if self._settled is not None and key not in self:
            self._settled.num_joined += 1
        self._rates.start(key, request_class, is_bursty)
        self._floor.start(key)

    def forget(self, key: Hashable, num_tokens: int | None = None) -> None:
        """Of a request that is over. num_tokens: of its text; None if it was cut off."""
        self._rates.forget(key, num_tokens)
        self._floor.forget(key)

    @property
    def decodes_plainly(self) -> bool:
        """Whether rounds draft nothing now, probes and what grammars force apart."""
        return self._current is not None and self.widths[self._current] == 1

    def plan(
        self,
        keys: Sequence[Hashable],
        kind: Hashable = None,
        context: int | None = None,
        forced: Sequence[int] | None = None,
        may_wait: bool = False,
    ) -> RoundWidth:
        """The width of the next round.

        Args:
            keys: [R] its requests, at least one.
            kind: what rounds have in common that take alike, apart from their size, context and width.
            context: tokens of all their contexts; those that start-up timed if it is not given.
            forced: [R] the next tokens of each that are certain; None if none are known.
            may_wait: whether it can leave out requests that have ended.
        """
        self._rounds_passed += 1
        if forced is not None and self.decodes_plainly:
            width = self._width_if_forced(keys, kind, context, forced)
            if width > 1:
                self._rounds[width] += 1
                return RoundWidth(width, is_probe=False, is_forced=True)
        settled = self._settled_for(len(keys), kind)
        if settled is not None and settled.rounds_left:
            settled.rounds_left -= 1
            self._rounds[1] += 1
            return RoundWidth(1, False)
        self._observe_settled()
        row = self._seconds_of(len(keys), kind, context)
        tokens = self._rates.expected(keys)
        for_ended = self._seconds_for_ended(keys, tokens, row[self._columns])
        wait = self._wait.seconds if may_wait else np.inf
        seconds = self._worthwhile_seconds(row, len(keys)) + np.minimum(for_ended, wait)
        totals = tokens.sum(0)
        current, is_limited = self._choose(keys, tokens, totals, seconds)
        probe = None
        if self._probes is not None and not is_limited:
            rounds_seen = self._rates.rounds_seen(keys).sum(0)
            probe = self._probes.next(current, len(keys), totals, seconds, rounds_seen, rounds=self._rounds_passed)
        self._rounds_passed = 0
        chosen = current if probe is None else probe
        width, waits = self.widths[chosen], bool(for_ended[chosen] > wait)
        if may_wait and not waits:
            self._wait.fade()
        is_settled = width == 1 and not is_limited and not self._patience
        self._settled = SettledBatch(len(keys), kind, context, row) if is_settled else None
        self._rounds[width] += 1
        return RoundWidth(width, probe is not None, waits=waits)

    def note_waited(self, seconds: float) -> None:
        """What the planned round has lost by waiting."""
        self._wait.observe(seconds)
        self._num_waits += 1
        self._wait_seconds += seconds

    def add_steps(self, count: int) -> bool:
        """Have the round that was planned last, of width 1, decode so many more tokens of each request plainly.

        Returns whether it may: its batch is settled for so long.
        """
        if self._settled is None or not self._settled.add_steps(count):
            return False
        self._rounds[1] += count
        self._rounds_passed += count
        return True

    def observe(
        self,
        keys: Sequence[Hashable],
        width: int,
        accept_lens: Sequence[int],
        kind: Hashable = None,
        measured: float | None = None,
        context: int | None = None,
        forced: Sequence[int] | None = None,
        cut: Collection[Hashable] = (),
        num_steps: int = 1,
        waited: float = 0.0,
    ) -> RoundResult:
        """Of a round that `plan` chose the width of, when its result is known.

        Args:
            keys: [R] its requests, those included that are over meanwhile.
            width: its width.
            accept_lens: [R] tokens that it committed of each; 0 where it did not count.
            kind: as planned.
            measured: seconds since the result before; None if something else ran meanwhile.
            context: as planned.
            forced: as planned, of a round that is forced; these tokens say nothing of drafts.
            cut: requests whose texts ended before all that it committed.
            num_steps: that it took: more than one only at width 1.
            waited: seconds that it lost by waiting for the former result, beside those that were measured.
        """
        index = self.widths.index(width)
        settled = self._settled_for(len(keys), kind) if width == 1 else None
        if width > 1 and forced is None and self._settled is not None:
            self._settled.rounds_left = 0
        if measured is not None and settled is not None:
            settled.times.append(measured / num_steps)
        elif measured is not None:
            self._observe_time(kind, len(keys), context, self._columns[index], measured / num_steps)
        row = self._seconds_of(len(keys), kind, context) if settled is None else settled.row
        seconds = float(row[self._columns[index]]) * num_steps + waited
        total = int(sum(accept_lens))
        num_requests = sum(accept_len > 0 for accept_len in accept_lens) * num_steps
        self._requests[width] += num_requests
        self._tokens[width] += total
        self._seconds += seconds
        if width > 1:
            drafted = accept_lens if forced is None else list(map(_behind, accept_lens, forced))
            self._rates.observe_round(keys, width, drafted, cut)
        if self._probes is not None and forced is None:
            self._probes.observe(index, total)
        plain_seconds = 0.0
        if self._knows_plain:
            plain = float(row[0])
            plain_seconds = plain * total / len(keys)
            self._floor.observe(keys, accept_lens, seconds / plain)
        self._plain_seconds += plain_seconds
        return RoundResult(num_requests, total, seconds, plain_seconds)

    def report(self) -> WidthReport:
        """What rounds were, since the start."""
        return WidthReport(
            width=None if self._current is None else self.widths[self._current],
            rounds=dict(self._rounds),
            requests=dict(self._requests),
            tokens=dict(self._tokens),
            num_probes=self._probes.count if self._probes is not None else 0,
            probe_seconds=self._probes.lost_seconds if self._probes is not None else 0.0,
            seconds=self._seconds,
            plain_seconds=self._plain_seconds,
            num_limited=self._num_limited,
            num_waits=self._num_waits,
            wait_seconds=self._wait_seconds,
        )

    def _observe_settled(self) -> None:
        """Learn times at once. All count: just where many requests end, and a host is slow, a width is chosen."""
        settled = self._settled
        if settled is not None and settled.times:
            seconds, rounds = usual_mean(settled.times), len(settled.times)
            self._observe_time(settled.kind, settled.num_requests, settled.context, self._columns[0], seconds, rounds)
            settled.times.clear()

    def _observe_time(
        self, kind: Hashable, num_requests: int, context: int | None, column: int, seconds: float, rounds: int = 1
    ) -> None:
        factor = seconds / float(self._costs.row(num_requests, context)[column])
        self._corrections.observe(kind, num_requests, column, factor, rounds)

    def _settled_for(self, num_requests: int, kind: Hashable) -> SettledBatch | None:
        settled = self._settled
        return settled if settled is not None and settled.holds_for(num_requests, kind) else None

    def _width_if_forced(
        self, keys: Sequence[Hashable], kind: Hashable, context: int | None, forced: Sequence[int]
    ) -> int:
        """The best width of a single round that has these tokens for certain."""
        seconds = self._worthwhile_seconds(self._seconds_of(len(keys), kind, context), len(keys))
        tokens = np.minimum(self._rates.expected(keys) + np.array(forced)[:, None], self.widths)
        return self.widths[choose_width(self._floor.weights(keys) @ tokens, seconds, self._current, PATIENCE)]

    def _worthwhile_seconds(self, row: FloatArray, num_requests: int) -> FloatArray:
        """[K]; infinite for widths that are out. row: of all widths that were measured."""
        return np.where(self._costs.worthwhile(num_requests), row, np.inf)[self._columns]

    def _seconds_for_ended(self, keys: Sequence[Hashable], tokens: FloatArray, seconds: FloatArray) -> FloatArray:
        """What rows of requests whose texts have ended take of a round that does not wait, at every width: [K].

        It is what the round would save without them: nothing where it has the same graph anyway. The more tokens a
        round commits, the more of them there are.

        tokens: [R, K] expected of each. seconds: [K] of a round.
        """
        count = len(keys)
        ends = self._rounds_late * (self._rates.end_rates(keys) @ tokens)
        # Ends are rare events. Three numbers of them have the mean of all and their variance.
        numbers = np.rint(ends + np.sqrt(ends) * _DEVIATIONS[:, None]).astype(np.int64).clip(0, count - 1)
        return np.asarray(seconds * self._costs.saved(count, numbers.tolist(), self._columns).mean(0))

    def _seconds_of(self, num_requests: int, kind: Hashable, context: int | None) -> FloatArray:
        """Of a round at every width that was measured, as rounds take in traffic."""
        return self._costs.row(num_requests, context) * self._corrections.factors(kind, num_requests)

    def _choose(
        self, keys: Sequence[Hashable], tokens: FloatArray, totals: FloatArray, seconds: FloatArray
    ) -> tuple[int, bool]:
        """The next width by its index, current from then on, and whether the floor rules out a better one.

        Args:
            keys: [R] its requests.
            tokens: [R, K] expected of each.
            totals: [K] of all.
            seconds: [K] of a round.
        """
        num_requests = len(keys)
        is_like_before = 1 / LARGE_CHANGE < num_requests / self._num_requests < LARGE_CHANGE
        weighted = self._floor.weights(keys) @ tokens
        chosen = choose_width(weighted, seconds, self._current if is_like_before else None, self._patience)
        if chosen != self._current or not is_like_before:
            self._num_requests = num_requests
        best = int(np.argmax(weighted / seconds))
        is_limited = best == chosen != int(np.argmax(totals / seconds))
        self._num_limited += is_limited
        self._patience = 0 if best == chosen else self._patience + 1
        if chosen != self._current:
            self._current = chosen
            if self._probes is not None:
                self._probes.width_changed()
        return chosen, is_limited


def _behind(accept_len: int, num_forced: int) -> int:
    """Tokens of a request behind those that were forced; 0 stays, since such a round does not count."""
    return max(min(1, accept_len), accept_len - num_forced)
