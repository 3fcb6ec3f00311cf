"""How many tokens a round will commit per request, learnt from the rounds before.

A round of width W commits between 1 and W tokens of a request: the drafts that were accepted, and one more. One that
commits W says only "at least W". So the rounds at a width say how many a narrower one would have committed, and leave
open what a wider one would.

Letters: R requests, K widths, A rows of the counts: one per request, and one per class of requests.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import numpy as np

from sglang_orthrus.round.acceptance_counts import SEEN, TINY, TOKENS, AcceptanceCounts, IntArray, tokens_at_rate
from sglang_orthrus.round.class_acceptance import ClassAcceptance
from sglang_orthrus.round.costs import FloatArray
from sglang_orthrus.round.text_ends import TextEnds

# A request's rounds lose half of their weight in so many more of its rounds.
HALF_LIFE = 16.0
# Drafts that a grammar forces are always accepted, and behind them text may draft far worse. So many rounds in a row of
# a request with a grammar, without an accepted draft ...
MANY_FAILURES = 3
# ... say that it does. Then this share of the drafts that were accepted before still counts, and once more with each
# such round.
KEPT_AFTER_FAILURES = 0.35
# To what is known of its class, a request's first rounds contribute most: half as much after so many. New requests are
# expected to be like others were, and those that draft badly have many more rounds than there are of them.
FIRST_ROUNDS = 8.0
# A new request is expected to be like its class, as if so many rounds of it had been seen ...
PRIOR_ROUNDS = 1.5
# ... and this expectation loses half of its weight in so many rounds.
PRIOR_HALF_LIFE = 4.0
# A width's ratio to what other widths say of it is 1 at first, as if so many rounds had said so ...
RATIO_ROUNDS = 32.0
# ... and forgets half in so many rounds of one request.
RATIO_HALF_LIFE = 512.0
# Classes beyond share the last one's row. There are four: with and without a grammar, sampled and greedy.
MAX_CLASSES = 8

# Rounds that are worth less than this are not compared.
_NEGLIGIBLE = 0.01
# From none to nearly all drafts accepted, ever closer.
_RATES = (1.0 - np.geomspace(1.0, 1e-3, 48)).tolist()


class AcceptanceRates:
    """What is expected of requests at every width.

    Args:
        widths: every width that rounds may have.
        max_requests: the most requests that are remembered; the oldest is forgotten for a new one.
    """

    def __init__(self, widths: Sequence[int], max_requests: int = 1024) -> None:
        self.widths = tuple(sorted(widths))
        self._columns = {width: column for column, width in enumerate(self.widths)}
        # Row 0 stays empty: a request that is not known.
        self._requests = AcceptanceCounts(self.widths, max_requests + 1)
        self._classes = ClassAcceptance(self.widths, MAX_CLASSES)
        self._ends = TextEnds(MAX_CLASSES + 1)
        self._rows: dict[Hashable, int] = {}
        self._free = list(range(max_requests, 0, -1))
        self._class_rows: dict[Hashable, int] = {}
        self._class_of = np.zeros(max_requests + 1, np.int64)
        # Of a request's last rounds in a row, those that accepted no draft.
        self._failures = np.zeros(max_requests + 1, np.int64)
        self._is_bursty = np.zeros(max_requests + 1, np.bool_)
        num_widths = len(self.widths)
        # [classes, K, K] drafts accepted at the last width, and what the middle one had said of it.
        self._accepted = np.zeros((MAX_CLASSES, num_widths, num_widths))
        self._predicted = np.zeros_like(self._accepted)
        self._ratios = np.ones_like(self._accepted)
        # [K, rates]
        self._tokens_at_rates = [[tokens_at_rate(rate, width) for rate in _RATES] for width in self.widths]
        # Of the requests that were asked for last: mostly the next round has the same.
        self._asked: list[Hashable] | None = None
        self._asked_rows = np.zeros(0, np.int64)
        self._asked_expected: FloatArray | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._rows

    def start(self, key: Hashable, request_class: Hashable, is_bursty: bool = False) -> None:
        """Remember a request from now on; nothing changes if it is remembered already.

        is_bursty: whether parts of its text may draft far better than the rest.
        """
        if key in self._rows:
            return
        if not self._free:
            self.forget(next(iter(self._rows)))
        row = self._free.pop()
        self._asked = None
        self._rows[key] = row
        self._requests.clear(row)
        self._failures[row] = 0
        self._is_bursty[row] = is_bursty
        new = min(len(self._class_rows), MAX_CLASSES - 1)
        if request_class not in self._class_rows and len(self._class_rows) < MAX_CLASSES:
            self._class_rows[request_class] = new
        self._class_of[row] = self._class_rows.get(request_class, new)

    def forget(self, key: Hashable, num_tokens: int | None = None) -> None:
        """Of a request that is over; one that is not remembered is ignored.

        num_tokens: of its text; None if it was cut off.
        """
        row = self._rows.pop(key, None)
        if row is None:
            return
        self._free.append(row)
        self._asked = None
        if num_tokens:
            self._ends.observe(int(self._class_of[row]), num_tokens)

    def observe_round(
        self, keys: Sequence[Hashable], width: int, accept_lens: Sequence[int], cut: Collection[Hashable] = ()
    ) -> None:
        """Count a round. Requests that are not remembered, and those that committed nothing, are left out.

        Args:
            keys: [R] its requests, each once.
            width: its width, one of `widths`. Nothing is learnt from a round that drafts nothing.
            accept_lens: [R] tokens that texts took in, the last one included.
            cut: requests whose texts ended before all that it committed.

        Raises:
            KeyError: it has another width.
        """
        column = self._columns[width]
        if width == 1:
            return
        found, lens = self._rows_of(keys), np.asarray(accept_lens, np.int64)
        counted = (found > 0) & (lens > 0)
        rows, lens = found[counted], np.minimum(lens[counted], width)
        if not len(rows):
            return
        rates = self._rates_if_cut(keys, found, column, cut)[counted]
        self._asked_expected = None
        classes = self._class_of[rows]
        members = (classes[:, None] == np.arange(MAX_CLASSES)).astype(np.float64)
        counts = self._requests.counts_of(column, lens, rates)
        self._observe_ratios(rows, column, counts[:, TOKENS + column], members)

        present = np.flatnonzero(members.any(0))
        first = members[:, present] * np.exp2(-self._requests.rounds[rows] / FIRST_ROUNDS)[:, None] + TINY
        self._classes.observe(present, column, first.T @ counts, self._ratios[present])
        self._failures[rows] = failures = np.where(lens == 1, self._failures[rows] + 1, 0)
        has_turned = self._is_bursty[rows] & (failures >= MANY_FAILURES)
        kept = np.where(has_turned, KEPT_AFTER_FAILURES, 1.0)
        self._requests.add(rows, column, counts, HALF_LIFE, kept)

    def expected(self, keys: Sequence[Hashable]) -> FloatArray:
        """Tokens that texts take in of a round, for every request at every width: [R, K], not to be written to."""
        rows = self._rows_of(keys)
        if self._asked_expected is None:
            self._asked_expected = self._ends.committed(self._expected(rows), self._classes_of(rows))
            self._asked_expected.flags.writeable = False
        return self._asked_expected

    def end_rates(self, keys: Sequence[Hashable]) -> FloatArray:
        """Of every request, the chance that a token of its text is the last one: [R]."""
        return self._ends.rates(self._classes_of(self._rows_of(keys)))

    def rounds_seen(self, keys: Sequence[Hashable]) -> FloatArray:
        """Rounds of every request at every width, the older ones counting less: [R, K]."""
        return self._requests.counts[self._rows_of(keys), :, SEEN]

    def _classes_of(self, rows: IntArray) -> IntArray:
        """[R]; a request that is not known belongs to no class."""
        return np.where(rows > 0, self._class_of[rows], MAX_CLASSES)

    def _rows_of(self, keys: Sequence[Hashable]) -> IntArray:
        """Of requests, 0 where one is not remembered: [R]."""
        if keys != self._asked:
            self._asked = list(keys)
            self._asked_rows = np.fromiter((self._rows.get(key, 0) for key in keys), np.int64, len(keys))
            self._asked_expected = None
        return self._asked_rows

    def _expected(self, rows: IntArray) -> FloatArray:
        classes = self._class_of[rows]
        # A request that is not known belongs to no class.
        prior = np.where(rows[:, None] > 0, self._classes.tokens[classes], self._classes.neutral)
        weights = PRIOR_ROUNDS * np.exp2(-self._requests.rounds[rows] / PRIOR_HALF_LIFE)
        return self._requests.expected(rows, self._ratios[classes], prior, weights)

    def _rates_if_cut(
        self, keys: Sequence[Hashable], rows: IntArray, column: int, cut: Collection[Hashable]
    ) -> FloatArray:
        """At which drafts of this width are accepted of the requests whose rounds were cut short; 0 of others: [R]."""
        if not cut:
            return np.zeros(len(rows))
        rates = np.interp(self._expected(rows)[:, column], self._tokens_at_rates[column], _RATES)
        return np.where([key in cut for key in keys], rates, 0.0)

    def _observe_ratios(self, rows: IntArray, column: int, lens: FloatArray, members: FloatArray) -> None:
        """Compare what a width commits with what the other widths had said of it.

        A block narrower than the trained one drafts worse, by how much depends on the text and the checkpoint.
        """
        seen = self._requests.counts[rows, :, SEEN]
        weights = seen / (seen + 1.0)
        weights[:, column] = 0.0
        if weights.max() < _NEGLIGIBLE:
            return
        by_class = members.T @ np.stack(
            [weights * (lens - 1)[:, None], weights * (self._requests.tokens[rows, :, column] - 1.0), weights], axis=1
        ).reshape(len(rows), -1)
        accepted, predicted, rounds = by_class.reshape(MAX_CLASSES, 3, -1).swapaxes(0, 1)
        decay = np.exp2(-rounds / RATIO_HALF_LIFE)
        for total, new in ((self._accepted, accepted), (self._predicted, predicted)):
            total[:, :, column] = total[:, :, column] * decay + new
        at_first = RATIO_ROUNDS * (self._classes.neutral[column] - 1.0)
        self._ratios[:, :, column] = (self._accepted[:, :, column] + at_first) / (
            self._predicted[:, :, column] + at_first
        )
