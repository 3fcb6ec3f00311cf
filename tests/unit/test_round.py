"""When the passes of a round are queued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask

from sglang_orthrus.core import DraftBlock, RoundBatch, Verdict, snapshot
from sglang_orthrus.grammar.batch import NextMasks
from sglang_orthrus.metrics import RoundPath
from sglang_orthrus.passes.runner import Pass, PreparedPass
from sglang_orthrus.round.policy import RoundPlan
from sglang_orthrus.round.round import Round
from sglang_orthrus.sampling.output_history import History
from tests.sampling import decode_batch

VOCAB = 5
REQUESTS = 3


class _Passes:
    """Their hidden states are logits: every token is followed by the next one."""

    def __init__(self) -> None:
        self.queued = list[str]()

    def draft(self, batch: RoundBatch) -> Pass:
        self.queued.append("draft")
        return Pass(torch.zeros(*batch.blocks.ids.shape, VOCAB), False)

    def prepare_verify(self, batch: RoundBatch, draft: Pass | None) -> PreparedPass:
        prepared: Any = None
        return PreparedPass(batch, prepared)

    def verify(self, prepared: PreparedPass, block: torch.Tensor) -> Pass:
        self.queued.append("verify")
        return Pass(torch.eye(VOCAB)[(block + 1) % VOCAB], False)

    def next_step(self, batch: RoundBatch, verdict: Verdict) -> RoundBatch:
        """`DualViewRunner`'s own, on blocks that need no pool."""
        own = snapshot(batch.scheduled)
        own.seq_lens = verdict.new_seq_lens
        ids = verdict.bonus[:, None]
        return RoundBatch(own, DraftBlock(ids, ids, ids))


class _Batch:
    """Of plain attributes, as a `ScheduleBatch` is."""

    seq_lens_cpu = None
    has_grammar = False


def _greedy_batch() -> Any:
    """Of requests that have 10 committed tokens each."""
    batch: Any = _Batch()
    greedy = [{"temperature": 0.0, "top_k": 1}] * REQUESTS
    vars(batch).update(vars(decode_batch(greedy, torch.full((REQUESTS,), 10), vocab_size=VOCAB)))
    return batch


class _Model:
    def logits(self, hidden_states: torch.Tensor, *, in_fp32: bool = True) -> torch.Tensor:
        return hidden_states.flatten(0, 1)


@pytest.mark.parametrize(
    ("width", "before", "after"),
    [(1, ["verify"], ["verify"]), (4, ["draft"], ["draft", "verify"])],
)
def test_what_is_queued_before_the_former_result_is_known(width: int, before: list[str], after: list[str]) -> None:
    """The first pass: grammars decide what verify gets, unless nothing is drafted."""
    anchors = torch.arange(REQUESTS)
    batch = _greedy_batch()
    ids = anchors[:, None].expand(-1, width)
    passes: Any = _Passes()
    grammars: Any = SimpleNamespace(num_candidates=1)
    rounds = Round(passes, History("cpu"), grammars, SimpleNamespace(model=_Model()), "pytorch")
    begun = rounds.begin(RoundBatch(batch, DraftBlock(ids, ids, ids)), RoundPlan(width, False, True))
    assert passes.queued == before
    verdict = rounds.finish(begun).verdict
    assert passes.queued == after
    assert verdict.tokens[:, 0].tolist() == [1, 2, 3] and verdict.accept_lens.tolist() == [1] * REQUESTS
    assert verdict.bonus.tolist() == [1, 2, 3] and verdict.new_seq_lens.tolist() == [11] * REQUESTS
    assert verdict.accept_lens.dtype == torch.int32 and verdict.tokens.shape == (REQUESTS, width)


def test_behind_anothers_pass_no_pass_is_queued_and_its_logits_stay() -> None:
    anchors = torch.arange(REQUESTS)
    batch: Any = _Batch()
    biased = [{"top_k": 1, "logit_bias": {str(row): 2.0}} for row in range(REQUESTS)]
    vars(batch).update(vars(decode_batch(biased, torch.full((REQUESTS,), 10), vocab_size=VOCAB)))
    passes: Any = _Passes()
    rounds = Round(passes, History("cpu"), SimpleNamespace(), SimpleNamespace(), "pytorch")  # type: ignore[arg-type]
    ids = anchors[:, None]
    logits = torch.eye(VOCAB)[anchors + 1]
    end = rounds.choose(RoundBatch(batch, DraftBlock(ids, ids, ids)), logits)
    assert passes.queued == [] and end.path is RoundPath.MIXED
    assert end.verdict.bonus.tolist() == anchors.tolist(), "the bias outweighs the model"
    assert end.verdict.new_seq_lens.tolist() == [11] * REQUESTS
    assert torch.equal(logits, torch.eye(VOCAB)[anchors + 1])


def test_a_round_that_drafts_nothing_begins_its_masks_behind_its_pass() -> None:
    """Where grammars can be brought to the committed text then; else when the former result has been taken in."""
    batch = _greedy_batch()
    batch.has_grammar = True
    ids = torch.arange(REQUESTS)[:, None]
    events = list[str]()
    grammar = SimpleNamespace(apply_vocab_mask=lambda logits, vocab_mask: logits[:, 1].fill_(-torch.inf))

    class Grammars:
        num_candidates = 1

        def rows_of(self, reqs: Any) -> list[int]:
            return [0]

        def begin_next_masks(self, *args: Any) -> str:
            events.append("begin")
            return "masks"

        def finish_next_masks(self, begun: str) -> NextMasks:
            events.append(f"finish {begun}")
            mask = torch.zeros(1, 1, dtype=torch.int32)
            return NextMasks(GrammarMask(grammar, mask), mask, {})

    for barrier, order in (
        (lambda: events.append("barrier"), ["verify", "barrier", "begin", "result", "finish masks"]),
        (None, ["verify", "result", "begin", "finish masks"]),
    ):
        passes, grammars = _Passes(), Grammars()
        events.clear()
        passes.queued = events
        rounds = Round(passes, History("cpu"), grammars, SimpleNamespace(model=_Model()), "pytorch")  # type: ignore[arg-type]
        begun = rounds.begin(RoundBatch(batch, DraftBlock(ids, ids, ids)), RoundPlan(1, False, True), barrier)
        events.append("result")
        assert rounds.finish(begun).verdict.bonus.tolist() == [0, 2, 3], "the grammar refuses what follows 0"
        assert events == order


@pytest.mark.parametrize("instead", [{}, {0: 4}, None], ids=["allowed", "known", "unknown"])
def test_late_masks_are_applied_only_where_nothing_else_tells_what_is_chosen(instead: dict[int, int] | None) -> None:
    batch = _greedy_batch()
    batch.has_grammar = True
    ids = torch.arange(REQUESTS)[:, None]
    grammar = SimpleNamespace(apply_vocab_mask=lambda logits, vocab_mask: logits[:, 2].fill_(-torch.inf))
    mask = GrammarMask(grammar, torch.zeros(1, 1, dtype=torch.int32))
    nothing: Any = SimpleNamespace(apply_vocab_mask=lambda logits, vocab_mask: None)
    late: Any = SimpleNamespace()
    asked = list[str]()

    class Grammars:
        def rows_of(self, reqs: Any) -> list[int]:
            return [1]

        def begin_next_masks(self, *args: Any) -> str:
            return "masks"

        def finish_next_masks(self, begun: str) -> NextMasks:
            return NextMasks(GrammarMask(nothing, mask.vocab_mask), mask.vocab_mask, {0: late})

        def allowed_instead(self, masks: NextMasks, chosen: dict[int, int], likeliest: Any) -> dict[int, int] | None:
            assert chosen == {0: 2}, "what follows 1"
            logits, tokens = likeliest([0], 2)[0]
            assert list(logits) == [1.0, 0.0] and tokens[0] == 2
            return instead

        def late_masks(self, masks: NextMasks, chosen: dict[int, int]) -> GrammarMask:
            asked.append("masks")
            return mask

    grammars: Any = Grammars()
    rounds = Round(_Passes(), History("cpu"), grammars, SimpleNamespace(model=_Model()), "pytorch")  # type: ignore[arg-type]
    verdict = rounds.run(RoundBatch(batch, DraftBlock(ids, ids, ids)), RoundPlan(1, False, False)).verdict
    chosen = {0: 2} if instead == {} else instead or {0: 0}
    assert verdict.bonus.tolist() == [1, chosen[0], 3] and verdict.tokens.tolist() == [[1], [chosen[0]], [3]]
    assert verdict.accept_lens.tolist() == [1] * REQUESTS and verdict.new_seq_lens.tolist() == [11] * REQUESTS
    assert asked == (["masks"] if instead is None else [])


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_each_step_of_plain_decoding_follows_the_former_one(num_steps: int) -> None:
    batch = _greedy_batch()
    passes: Any = _Passes()
    rounds = Round(passes, History("cpu"), SimpleNamespace(), SimpleNamespace(model=_Model()), "pytorch")  # type: ignore[arg-type]
    ids = torch.arange(REQUESTS)[:, None]
    end = rounds.run(RoundBatch(batch, DraftBlock(ids, ids, ids)), RoundPlan(1, False, False, num_steps))
    assert passes.queued == ["verify"] * num_steps and end.num_steps == num_steps
    assert end.verdict.tokens.tolist() == [
        [(row + step) % VOCAB for step in range(1, num_steps + 1)] for row in range(REQUESTS)
    ]
    assert end.verdict.new_seq_lens.tolist() == [10 + num_steps] * REQUESTS
    assert batch.seq_lens.tolist() == [10] * REQUESTS, "the scheduler's"


def test_requests_that_have_all_ended_get_no_further_step() -> None:
    batch = _greedy_batch()
    for req in batch.reqs:
        req.has_ended = True
    passes: Any = _Passes()
    rounds = Round(passes, History("cpu"), SimpleNamespace(), SimpleNamespace(model=_Model()), "pytorch")  # type: ignore[arg-type]
    ids = torch.arange(REQUESTS)[:, None]
    end = rounds.run(RoundBatch(batch, DraftBlock(ids, ids, ids)), RoundPlan(1, False, False, 2))
    assert not end.is_wanted and end.num_steps == 1 and end.verdict.tokens.shape == (REQUESTS, 1)
