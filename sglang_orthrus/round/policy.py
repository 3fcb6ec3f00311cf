"""What a round will be, decided once, before it begins."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

from sglang.srt.managers.schedule_batch import FINISH_ABORT, ScheduleBatch

from sglang_orthrus import ranks
from sglang_orthrus.compat.accounting import text_length
from sglang_orthrus.metrics import WidthFigures, WidthMetrics
from sglang_orthrus.round.device_watch import DeviceWatch
from sglang_orthrus.round.width_controller import WidthController
from sglang_orthrus.sampling.logit_adjustments import are_adjusted

# Contexts are counted again after so many rounds of the same requests.
_CONTEXT_ROUNDS = 16
# In larger batches a wide round costs more than what grammars force of one request or another.
_MOST_FORCED = 4
# Rounds that are under way while a host streams what a round committed.
_DEPTH = 2
# Steps of a round of plain decoding where a device would wait for its host. More would run further past texts' ends.
PLAIN_STEPS = 2
# After so many such rounds one of a single step tells whether the device still would.
_MOST_UNTOLD = 4


class CountsForced(Protocol):
    """Knows what grammars force: see `BlockGrammars.num_forced`."""

    def num_forced(self, reqs: Sequence[Any], vocab_size: int, most: int) -> list[int]:
        """Tokens that must come next, of each request, at most so many."""


class RoundPlan(NamedTuple):
    """How a round is to run.

    Attributes:
        width: Q, tokens drafted and verified per request, the anchor included; 1 drafts nothing.
        may_fuse: whether one CUDA graph may draft and verify, if there is one for this batch size.
        is_deferred: whether the scheduler takes in the former round's result between draft and verify.
        num_steps: of a round that drafts nothing, how many tokens it decodes one after another.
        leaves_out_ended: whether it waits for the former round's result, to leave out requests whose texts have ended.
    """

    width: int
    may_fuse: bool
    is_deferred: bool
    num_steps: int = 1
    leaves_out_ended: bool = False


@dataclass
class _Planned:
    """A round whose result is not known yet.

    Attributes:
        is_probe: whether it was to learn about its width.
        has_grammar: of any of its requests. Such rounds take longer.
        context: tokens of all its requests' contexts, about.
        num_prefills: that were queued before it.
        began: when it was planned, in seconds.
        forced: of each request, if it has its width for these.
        seconds: until the next one was planned; None if a prefill came between, or nothing did yet.
        num_steps: see `RoundPlan`.
        waits: whether the controller has it wait for the former result.
        waited: seconds that a device lost by this.
        rows: of its requests in the scheduler's batch, if some were left out.
    """

    reqs: Sequence[Any]
    rids: Sequence[str]
    width: int
    is_probe: bool
    has_grammar: bool
    context: int
    num_prefills: int
    began: float
    forced: Sequence[int] | None = None
    seconds: float | None = None
    num_steps: int = 1
    waits: bool = False
    waited: float = 0.0
    rows: Sequence[int] | None = None

    @property
    def is_telling(self) -> bool:
        """Whether it has one step, whose end is noted: with a grammar it is queued in two parts."""
        return self.width == self.num_steps == 1 and not self.has_grammar


class _Result(NamedTuple):
    """A result that texts are about to take in.

    Attributes:
        planned: the round.
        measured: seconds since the result before it; None if a prefill ran or was queued meanwhile.
        accept_lens: tokens that it committed of each request; 0 where it does not count.
        text_lens: tokens of their texts before; none for rounds of one token.
    """

    planned: _Planned
    measured: float | None
    accept_lens: Sequence[int]
    text_lens: Sequence[int]


class Policy:
    """Plans rounds. Their width follows traffic if there are several to choose from.

    Args:
        widths: that rounds may have, ascending.
        controller: chooses among them; None for the largest always, or on ranks that take over what rank 0 chooses.
        metrics: of widths.
        is_shared: whether rank 0 chooses widths for all ranks, whose clocks differ.
        runs_at_once: whether a round has run when it is queued, as on a CPU. Under overlap scheduling the next one has
            then run, too, before a result is taken in.
        grammars: know what is forced; None to go without.
        watch: tells whether the device waits for the host; None for one step a round.
    """

    def __init__(
        self,
        widths: Sequence[int],
        controller: WidthController | None = None,
        metrics: WidthMetrics | None = None,
        is_shared: bool = False,
        runs_at_once: bool = False,
        grammars: CountsForced | None = None,
        watch: DeviceWatch | None = None,
    ) -> None:
        self._is_shared = is_shared
        self._watch = watch
        self._takes_steps = False
        self._num_untold = 0
        self._runs_at_once = runs_at_once
        self._grammars = grammars
        self._is_overlapping = False
        self._widths = tuple(widths)
        self._controller = controller
        self._metrics = metrics
        self._planned: deque[_Planned] = deque()
        self._last: _Planned | None = None
        self._result: _Result | None = None
        self._over: list[str] = []
        self._mixed: WeakSet[Any] = WeakSet()
        self._num_prefills = 0
        # Of the last result: when it was known, and prefills that had been queued before its round.
        self._observed_at, self._prefills_before = 0.0, -1
        self._widths_before: deque[int] = deque(maxlen=_DEPTH)
        # Of the last round, which the next one mostly has again.
        self._reqs: list[Any] = []
        self._rids: list[str] = []
        self._context = 0
        self._context_age = 0

    def plan(self, batch: ScheduleBatch, can_defer: bool) -> RoundPlan:
        """Of a decode batch; can_defer: whether the scheduler overlaps rounds."""
        self._is_overlapping = can_defer
        before = self._last
        may_wait = can_defer and not has_logit_options(batch)
        width = self._width(batch, may_wait)
        num_steps = self._num_steps(batch, before) if width == 1 else 1
        # Where a round has run when it is queued, nothing is lost.
        is_worthwhile = self._runs_at_once or (self._last is not None and self._last.waits)
        waits = int(may_wait and num_steps == 1 and is_worthwhile)
        if self._is_shared:
            width, num_steps, waits = ranks.numbers_from_first([width, num_steps, waits])
        return RoundPlan(
            width,
            may_fuse=batch.sampling_info.is_all_greedy and not has_options(batch),
            is_deferred=bool(batch.has_grammar) and can_defer,
            num_steps=num_steps,
            leaves_out_ended=bool(waits),
        )

    def leave_out(self, rows: Sequence[int]) -> None:
        """The planned round runs for these rows of its batch only."""
        if self._last is not None and len(rows) < len(self._last.reqs):
            reqs = [self._last.reqs[row] for row in rows]
            self._last.reqs, self._last.rids, self._last.rows = reqs, [req.rid for req in reqs], rows

    def note_waited(self, seconds: float) -> None:
        """The planned round was queued so long after the former one's result was known."""
        if self._controller is not None and self._last is not None and not self._runs_at_once:
            self._last.waited = seconds
            self._controller.note_waited(seconds)

    def note_queued(self) -> None:
        """The planned round is queued."""
        if self._watch is not None and self._last is not None and self._last.is_telling:
            self._watch.note_queued()

    def observe(self, num_accepted: Sequence[int]) -> None:
        """The result of the oldest round that has none: accepted drafts of each of its requests.

        It is learnt from when texts have taken it in. What lies behind a text's end is no gain.
        """
        if self._controller is None:
            return
        self._learn()
        planned = self._planned.popleft()
        now = time.perf_counter()
        # A prefill takes time twice: when it runs, and on the host, which queues it before it takes in a result.
        measured = now - self._observed_at if self._prefills_before == self._num_prefills else None
        if self._runs_at_once and self._is_overlapping:
            measured = planned.seconds
        elif measured is not None:
            measured -= planned.waited
        # So many tokens keep a host busy that a GPU waits for it, or has long finished a narrow round.
        if planned.width < max(self._widths_before, default=0):
            measured = None
        self._widths_before.append(planned.width)
        self._observed_at, self._prefills_before = now, planned.num_prefills
        if planned.rows is not None:
            num_accepted = [num_accepted[row] for row in planned.rows]
        if not planned.reqs:
            return
        # A request that ended or was retracted before this round ran leaves a row that counts for nothing.
        lens = [
            0 if req.finished() or req.is_retracted else accepted + planned.num_steps
            for req, accepted in zip(planned.reqs, num_accepted, strict=True)
        ]
        # Of a single token nothing lies behind a text's end.
        has_several = planned.width > 1 or planned.num_steps > 1
        text_lens = [text_length(req) for req in planned.reqs] if has_several else []
        self._result = _Result(planned, measured, lens, text_lens)

    def note_prefill(self, running: Iterable[Any] = ()) -> None:
        """A prefill is queued before the next round. running: requests that take a token each from it."""
        self._num_prefills += 1
        if self._controller is not None:
            self._mixed.update(running)

    def forget(self, rid: str) -> None:
        """A request is over; its last result is still learnt from."""
        if self._controller is not None:
            self._reqs = []
            self._over.append(rid)

    def _learn(self) -> None:
        """Tell the controller of the last result, and of requests that have ended since."""
        assert self._controller is not None
        ended: dict[str, int] = {}
        if self._result is not None:
            planned, measured, accept_lens, before = self._result
            self._result = None
            if self._over:
                ended = {req.rid: text_length(req) for req in planned.reqs if _has_ended(req)}
            width, has_grammar = planned.width, planned.has_grammar
            cut: set[str] = set()
            if before:
                taken = [text_length(req) - old for req, old in zip(planned.reqs, before, strict=True)]
                cut = {rid for rid, own, new in zip(planned.rids, accept_lens, taken, strict=True) if new < own}
                accept_lens = list(map(min, accept_lens, taken))
            result = self._controller.observe(
                *(planned.rids, width, accept_lens, has_grammar, measured, planned.context, planned.forced),
                cut=cut,
                num_steps=planned.num_steps,
                waited=planned.waited,
            )
            if self._metrics is not None:
                figures = WidthFigures(width, planned.is_probe, *result, rounds=planned.num_steps)
                self._metrics.count(figures, self._controller.report)
        # SGLang does not tell of requests that end in a prefill.
        in_prefill = [req for req in self._mixed if req.finished()]
        self._mixed.difference_update(in_prefill)
        for rid in (*self._over, *(req.rid for req in in_prefill)):
            self._controller.forget(rid, ended.get(rid))
        self._over.clear()

    def _width(self, batch: ScheduleBatch, may_wait: bool) -> int:
        if self._controller is None:
            return self._widths[-1]
        reqs, has_grammar = batch.reqs, bool(batch.has_grammar)
        self._learn()
        if reqs != self._reqs:
            for req in reqs:
                if req.rid in self._controller:
                    continue
                is_constrained = req.grammar is not None
                self._controller.start(req.rid, (is_constrained, req.sampling_params.top_k > 1), is_constrained)
            self._reqs, self._rids = list(reqs), [req.rid for req in reqs]
            self._context_age = _CONTEXT_ROUNDS
        if self._context_age >= _CONTEXT_ROUNDS:
            self._context = sum(len(req.origin_input_ids) + len(req.output_ids) for req in reqs)
            self._context_age = 0
        self._context_age += 1
        # What is forced matters to plain decoding alone.
        forced = self._forced(batch) if self._controller.decodes_plainly else None
        planned = self._controller.plan(self._rids, has_grammar, self._context, forced, may_wait)
        width, is_probe, is_forced, waits = planned
        now, last = time.perf_counter(), self._last
        if last is not None and last.num_prefills == self._num_prefills:
            last.seconds = now - last.began
        self._last = _Planned(
            *(self._reqs, self._rids, width, is_probe, has_grammar, self._context, self._num_prefills, now),
            forced=forced if is_forced else None,
            waits=waits,
        )
        self._planned.append(self._last)
        return width

    def _num_steps(self, batch: ScheduleBatch, before: _Planned | None) -> int:
        """Of a round that drafts nothing and that was just planned. before: the round before it.

        A host needs milliseconds for the results of a large batch, and a device may need less for a token of each. It
        then waits when the next round is planned. A round of one step among others tells whether it would.
        """
        if self._controller is None or self._last is None or self._watch is None:
            return 1
        if before is not None and before.is_telling and before.num_prefills == self._num_prefills:
            self._takes_steps = self._watch.is_idle()
        takes_steps = self._takes_steps and self._num_untold < _MOST_UNTOLD and not has_options(batch)
        if takes_steps and self._controller.add_steps(PLAIN_STEPS - 1):
            self._last.num_steps = PLAIN_STEPS
        self._num_untold = 0 if self._last.num_steps == 1 else self._num_untold + 1
        return self._last.num_steps

    def _forced(self, batch: ScheduleBatch) -> list[int] | None:
        """Of each request, how many of its next tokens are forced; None if none are known."""
        if self._grammars is None or not batch.has_grammar or len(batch.reqs) > _MOST_FORCED:
            return None
        # Grammars have not seen what is in flight: the one token of a prefill or of a round of plain decoding.
        if self._is_overlapping and self._last is not None and self._last.width > 1:
            return None
        found = self._grammars.num_forced(batch.reqs, batch.sampling_info.vocab_size, self._widths[-1] - 1)
        in_flight = 1 if self._is_overlapping else 0
        ahead = [max(0, count - in_flight) for count in found]
        return ahead if any(ahead) else None


def _has_ended(req: Any) -> bool:
    """Whether a request's text came to its end. One that was aborted says nothing of how long texts are."""
    return bool(req.finished()) and not isinstance(req.finished_reason, FINISH_ABORT)


def has_options(batch: ScheduleBatch) -> bool:
    """Whether more than logits and draws matters to what a request gets."""
    return bool(batch.has_grammar) or has_logit_options(batch)


def has_logit_options(batch: ScheduleBatch) -> bool:
    """Whether a request has options that change or report its logits, grammars apart."""
    return bool(batch.return_logprob or are_adjusted(batch.sampling_info))
