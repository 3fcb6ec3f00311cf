"""What a policy learns of rounds: tokens that texts have taken in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from benchmarks.load.simulate import WIDTHS, measured_costs
from sglang_orthrus.round.costs import RoundCosts
from sglang_orthrus.round.policy import Policy
from sglang_orthrus.round.width_controller import WidthController
from sglang_orthrus.round.widths import RoundWidth


class Request:
    """As much of SGLang's `Req` as a policy reads."""

    def __init__(self, rid: str) -> None:
        self.rid, self.grammar, self.is_retracted = rid, None, False
        self.sampling_params = SimpleNamespace(top_k=1)
        self.origin_input_ids, self.output_ids = [1, 2], [3]
        self.finished_len: int | None = None
        self.finished_reason: object = None

    def finished(self) -> bool:
        return self.finished_len is not None

    def take(self, tokens: int, end: int | None = None) -> None:
        """Take in a round's tokens; the text ends behind so many of them."""
        self.finished_len = None if end is None else len(self.output_ids) + end
        self.output_ids += [4] * tokens


def batch_of(*requests: Request, has_grammar: bool = False) -> Any:
    info = SimpleNamespace(
        is_all_greedy=False,
        vocab_size=64,
        has_custom_logit_processor=False,
        logit_bias=None,
        acc_additive_penalties=None,
        acc_scaling_penalties=None,
    )
    return SimpleNamespace(reqs=list(requests), has_grammar=has_grammar, return_logprob=False, sampling_info=info)


def recorded(
    controller: WidthController, monkeypatch: pytest.MonkeyPatch, widths: Sequence[int] = (8,)
) -> tuple[list[float], list[float | None]]:
    """A policy's clock, to be set, and the times of rounds that its controller is told.

    widths: that the controller chooses, in turn.
    """
    now, measured = [0.0], list[float | None]()
    chosen = cycle(widths)
    monkeypatch.setattr(controller, "plan", lambda *args: RoundWidth(next(chosen), is_probe=False))
    monkeypatch.setattr("sglang_orthrus.round.policy.time.perf_counter", lambda: now[0])
    stock = controller.observe

    def observe(*args: Any, **kwargs: Any) -> Any:
        measured.append(args[4])
        return stock(*args, **kwargs)

    monkeypatch.setattr(controller, "observe", observe)
    return now, measured


def test_tokens_behind_the_end_of_a_text_are_no_gain() -> None:
    controller = WidthController(measured_costs(), WIDTHS)
    policy, first, second = Policy(WIDTHS, controller), Request("a"), Request("b")
    plan = policy.plan(batch_of(first, second), can_defer=True)
    policy.observe([plan.width - 1, 4])
    first.take(plan.width, end=3)
    policy.forget("a")
    second.take(5)
    policy.plan(batch_of(second), can_defer=True)
    report = controller.report()
    assert report.tokens == {plan.width: 3 + 5} and report.requests == {plan.width: 2}


def test_a_round_that_ran_for_an_ended_request_teaches_nothing_of_it() -> None:
    """Under overlap scheduling the next round is planned before the result that ends a request is known."""
    controller = WidthController(measured_costs(), WIDTHS)
    policy, first, second = Policy(WIDTHS, controller), Request("a"), Request("b")
    for _ in range(2):
        plan = policy.plan(batch_of(first, second), can_defer=True)
    policy.observe([2, 2])
    first.take(3, end=1)
    policy.forget("a")
    second.take(3)
    policy.observe([7, 1])
    second.take(2)
    policy.plan(batch_of(second), can_defer=True)
    report = controller.report()
    assert report.tokens == {plan.width: 1 + 3 + 2} and report.requests == {plan.width: 3}


def test_a_text_that_ended_says_how_long_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was aborted does not. Of what was committed behind its end, nobody knows how many drafts were right."""
    controller = WidthController(measured_costs(), WIDTHS)
    policy, first, second, third = Policy(WIDTHS, controller), Request("a"), Request("b"), Request("c")
    forgotten = dict[Any, Any]()
    monkeypatch.setattr(controller, "forget", lambda key, num_tokens: forgotten.update({key: num_tokens}))
    learnt = list[tuple[Sequence[Any], Sequence[int], Any]]()
    monkeypatch.setattr(controller._rates, "observe_round", lambda keys, _, *others: learnt.append((keys, *others)))
    plan = policy.plan(batch_of(first, second, third), can_defer=True)
    policy.observe([7, 4, 2])
    first.take(8, end=3)
    second.take(5)
    third.take(3, end=3)
    third.finished_reason = FINISH_ABORT()
    for rid in "ac":
        policy.forget(rid)
    policy.plan(batch_of(second), can_defer=True)
    assert plan.width > 1 and forgotten == {"a": 4, "c": None}
    assert [(list(keys), list(lens), cut) for keys, lens, cut in learnt] == [(["a", "b", "c"], [3, 5, 3], {"a"})]


def test_a_prefill_spoils_the_time_of_the_rounds_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs before the one behind it, and the host queues it before it takes in the result of the one before it."""
    controller = WidthController(measured_costs(), WIDTHS)
    now, measured = recorded(controller, monkeypatch)
    policy, request = Policy(WIDTHS, controller), Request("a")

    def result(at: float) -> None:
        now[0] = at
        policy.observe([0])
        request.take(1)

    # The overlap scheduler queues the next batch, then takes in the result of the one before.
    for at in (None, 1.0, 2.0, 3.5):
        policy.plan(batch_of(request), can_defer=True)
        if at is not None:
            result(at)
    policy.note_prefill()
    result(9.0)
    for at in (None, 12.0, 13.0):
        policy.plan(batch_of(request), can_defer=True)
        if at is not None:
            result(at)
    policy.plan(batch_of(request), can_defer=True)
    assert measured == [None, 1.0, 1.5, None, None, 1.0]


def test_the_time_of_a_round_behind_a_wider_one_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host streams what the wider one committed, while the next two are queued and run."""
    controller = WidthController(measured_costs(), WIDTHS)
    now, measured = recorded(controller, monkeypatch, widths=[1, 1, 8, 1, 1, 1, 8, 16, 8, 1])
    policy, request = Policy(WIDTHS, controller), Request("a")
    policy.plan(batch_of(request), can_defer=True)
    for _ in range(10):
        now[0] += 1.0
        policy.plan(batch_of(request), can_defer=True)
        policy.observe([0])
        request.take(1)
    policy.plan(batch_of(request), can_defer=True)
    # The first has no result before it.
    assert measured == [None, 1.0, 1.0, None, None, 1.0, 1.0, 1.0, None, None]


@pytest.mark.parametrize("overlaps", [True, False])
def test_where_rounds_run_at_once_each_is_charged_its_own_time(monkeypatch: pytest.MonkeyPatch, overlaps: bool) -> None:
    """On a CPU. The next round has run before a result is taken in, unless there is no overlap."""
    controller = WidthController(measured_costs(), WIDTHS)
    now, measured = recorded(controller, monkeypatch)
    policy, request = Policy(WIDTHS, controller, runs_at_once=True), Request("a")
    rounds = [2.0, 3.0, 5.0, None, 7.0, 1.0]  # None: a prefill
    waiting = 0
    for seconds in rounds:
        if seconds is None:
            policy.note_prefill()
            now[0] += 100.0
            continue
        policy.plan(batch_of(request), can_defer=overlaps)
        waiting += 1
        now[0] += seconds
        while waiting > overlaps:
            policy.observe([0])
            request.take(1)
            waiting -= 1
    policy.plan(batch_of(request), can_defer=overlaps)
    assert measured == ([2.0, 3.0, None, 7.0] if overlaps else [None, 3.0, 5.0, None, 1.0])


def test_a_request_that_ends_in_a_prefill_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang tells workers of those alone that end in rounds. The token of the mixed step is no round's."""
    controller = WidthController(measured_costs(), WIDTHS)
    forgotten = list[str]()
    monkeypatch.setattr(controller, "forget", lambda key, _: forgotten.append(key))
    policy, first, second = Policy(WIDTHS, controller), Request("a"), Request("b")
    plan = policy.plan(batch_of(first, second), can_defer=True)
    policy.note_prefill([first, second])
    policy.observe([2, 2])
    first.take(3)
    second.take(3)
    policy.plan(batch_of(first, second), can_defer=True)
    assert not forgotten, "the mixed step's result is not known yet"
    first.take(1, end=1)
    second.take(1)
    for _ in range(2):
        policy.plan(batch_of(second), can_defer=True)
    assert forgotten == ["a"]
    assert controller.report().tokens == {plan.width: 3 + 3}


class Forced:
    """Grammars that force so many tokens of each request."""

    def __init__(self) -> None:
        self.counts = [0]

    def num_forced(self, reqs: Sequence[Any], vocab_size: int, most: int) -> list[int]:
        return [min(count, most) for count in (self.counts * len(reqs))[: len(reqs)]]


@pytest.mark.parametrize("overlaps", [True, False])
def test_what_grammars_force_is_known_but_for_the_token_in_flight(
    monkeypatch: pytest.MonkeyPatch, overlaps: bool
) -> None:
    controller = WidthController(measured_costs(), WIDTHS)
    grammars, told = Forced(), list[Any]()
    policy, requests = Policy(WIDTHS, controller, grammars=grammars), [Request(name) for name in "abcde"]

    def plan(*args: Any) -> RoundWidth:
        told.append(args[3])
        return widths.pop(0)

    monkeypatch.setattr(controller, "plan", plan)
    monkeypatch.setattr(WidthController, "decodes_plainly", True)
    plain, wide = RoundWidth(1, is_probe=False), RoundWidth(8, is_probe=False, is_forced=True)
    widths = [plain, wide, plain, plain, plain, plain]
    for counts, size, has_grammar in (
        ([3], 1, True),
        ([3, 1, 0, 99], 4, True),  # a wide round
        ([3], 1, True),  # behind one, whose tokens are in flight
        ([1], 1, True),
        ([3], 5, True),
        ([3], 1, False),
    ):
        grammars.counts = counts
        policy.plan(batch_of(*requests[:size], has_grammar=has_grammar), can_defer=overlaps)
    if overlaps:
        assert told == [[2], [2, 0, 0, 30], None, None, None, None]
    else:
        assert told == [[3], [3, 1, 0, 31], [3], [1], None, None]


def test_a_result_that_was_forced_is_told_with_what_was() -> None:
    controller = WidthController(measured_costs(), WIDTHS)
    grammars, request = Forced(), Request("a")
    policy = Policy(WIDTHS, controller, grammars=grammars)

    def rounds(count: int, accepted: int) -> list[int]:
        widths = []
        for _ in range(count):
            policy.note_prefill()  # so that no time is taken
            width = policy.plan(batch_of(request, has_grammar=True), can_defer=False).width
            drafts = min(width - 1, accepted)
            policy.observe([drafts])
            request.take(drafts + 1)
            widths.append(width)
        return widths

    rounds(400, accepted=0)
    grammars.counts = [6]
    assert min(rounds(10, accepted=6)) > 1
    grammars.counts = [0]
    assert rounds(100, accepted=0).count(1) > 95


class Watch:
    """A device that waits for its host when it is told so."""

    def __init__(self, is_waiting: bool) -> None:
        self.is_waiting = is_waiting

    def is_idle(self) -> bool:
        return self.is_waiting

    def note_queued(self) -> None:
        """Nothing."""


def steps_of(watch: Any, rounds: int = 60, return_logprob: bool = False) -> list[int]:
    """Steps of rounds that draft nothing."""
    controller = WidthController(RoundCosts({1: {1: 1.0}, 8: {1: 9.0}}), probe_share=0.0)
    policy, request = Policy((1, 8), controller, watch=watch), Request("a")
    steps = list[int]()
    for _ in range(rounds):
        batch = batch_of(request)
        batch.return_logprob = return_logprob
        plan = policy.plan(batch, can_defer=True)
        steps.append(plan.num_steps)
        policy.observe([0])
        request.take(plan.num_steps)
    tokens = sum(steps) - steps[-1]
    report = controller.report()
    assert report.width == 1 and report.tokens[1] == tokens, "the last round is not learnt from yet"
    return steps


def test_plain_decoding_takes_two_steps_a_round_where_the_device_waits() -> None:
    """Unless more than logits and draws matters to what a request gets. Now and then a single step tells if it does."""
    steps = steps_of(Watch(True))
    assert sum(steps) >= 1.75 * 60 and "2" * 5 not in "".join(map(str, steps))
    for others in (steps_of(Watch(False)), steps_of(None), steps_of(Watch(True), return_logprob=True)):
        assert others == [1] * 60


def test_requests_that_were_left_out_count_for_nothing() -> None:
    controller = WidthController(measured_costs(), WIDTHS)
    policy, first, second = Policy(WIDTHS, controller, runs_at_once=True), Request("a"), Request("b")
    plan = policy.plan(batch_of(first, second), can_defer=True)
    assert plan.leaves_out_ended
    policy.leave_out([1])
    policy.observe([-1, 4])
    second.take(5)
    policy.plan(batch_of(first, second), can_defer=True)
    report = controller.report()
    assert report.tokens == {plan.width: 5} and report.requests == {plan.width: 1}
    policy.leave_out([])
    policy.observe([-1, -1])
    policy.plan(batch_of(first, second), can_defer=True)
    assert controller.report() == report._replace(rounds=controller.report().rounds), "nobody was left"


def test_who_waits_for_the_former_result() -> None:
    """Nobody where the scheduler has taken it in, or where rows of the result belong to what was left out."""
    device = Policy((8,), None)
    at_once = Policy((8,), None, runs_at_once=True)
    assert at_once.plan(batch_of(Request("a")), can_defer=True).leaves_out_ended
    assert not at_once.plan(batch_of(Request("a")), can_defer=False).leaves_out_ended
    assert not device.plan(batch_of(Request("a")), can_defer=True).leaves_out_ended
    for name, value in (("return_logprob", True), ("logit_bias", 1)):
        batch = batch_of(Request("a"))
        vars(batch if name == "return_logprob" else batch.sampling_info)[name] = value
        assert not at_once.plan(batch, can_defer=True).leaves_out_ended


def test_a_wait_is_no_part_of_a_rounds_time(monkeypatch: pytest.MonkeyPatch) -> None:
    controller = WidthController(measured_costs(), WIDTHS)
    now, measured = recorded(controller, monkeypatch)
    policy, request = Policy(WIDTHS, controller), Request("a")
    for number in range(3):
        policy.plan(batch_of(request), can_defer=True)
        policy.note_waited(0.25)
        now[0] = 1.0 + number
        policy.observe([3])
        request.take(4)
    policy.plan(batch_of(request), can_defer=True)
    assert measured[1:] == [0.75, 0.75]
