"""Options that leave no token give way to the grammar, at every position of a block and for the first token.

The autoregressive view is a table, as in `test_verification.py`: the logits after a token depend on that token alone.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from sglang.srt.sampling.custom_logit_processor import DisallowedTokensLogitsProcessor
from sglang.srt.sampling.sampling_batch_info import ProcessorEntry, SamplingBatchInfo

from sglang_orthrus.compat.grammars import keep_allowed_logits
from sglang_orthrus.sampling import first_token as sampler
from sglang_orthrus.sampling.batch import BatchSampler
from sglang_orthrus.sampling.drafts import draft_tokens
from sglang_orthrus.sampling.first_token import FirstTokenSampler
from sglang_orthrus.sampling.logit_adjustments import Adjustments, RowMasks, may_forbid
from sglang_orthrus.sampling.nothing_left import leave_something_inplace, tame_inplace, within_the_grammar
from sglang_orthrus.sampling.verification import verify_drafts
from tests.sampling import decode_batch

VOCAB, WIDTH = 6, 4
END = 5
INF = float("inf")
NAN = float("nan")
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"top_k": 1},
    "sampled": {"temperature": 0.7},
    "filtered": {"top_p": 0.9, "top_k": 4},
}


class Model:
    def logits(self, hidden_states: torch.Tensor, *, in_fp32: bool = True) -> torch.Tensor:
        return hidden_states.reshape(-1, VOCAB).clone()


class Allow(NamedTuple):
    """A grammar's mask, as SGLang's: what is False may not be chosen."""

    vocab_mask: torch.Tensor

    def apply(self, logits: torch.Tensor) -> None:
        logits.masked_fill_(~self.vocab_mask, -INF)


def _table() -> torch.Tensor:
    return 2 * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(4))


def _batch(params: list[dict[str, Any]], **info: Any) -> Any:
    batch = decode_batch(params, torch.full((len(params),), 10), vocab_size=VOCAB)
    for req in batch.reqs:
        req.output_ids = [0]
        req.origin_input_ids = [0] * 10
        req.eos_token_ids = {END}
        req.sampling_params.stop_token_ids = None
        req.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=END)
        for name, neutral in (("frequency_penalty", 0), ("presence_penalty", 0), ("repetition_penalty", 1.0)):
            setattr(req.sampling_params, name, neutral)
    for name, value in info.items():
        setattr(batch.sampling_info, name, value)
    return batch


def _round(batch: Any, masks: RowMasks | None, broken: float | None = None) -> tuple[Any, torch.Tensor]:
    """A round; broken: what the model gives for every token of the first request."""
    size = len(batch.reqs)
    anchors = torch.zeros(size, dtype=torch.int64)
    sampler = BatchSampler(Model(), batch, anchors, Adjustments(batch, None, {}), WIDTH, "pytorch")
    marginals = _table()[: WIDTH - 1].repeat(size, 1, 1)
    if broken is not None:
        marginals[0] = broken
    drafts = draft_tokens(sampler, marginals)
    logits = _table()[drafts.block]
    if broken is not None:
        logits[0] = broken
    return verify_drafts(sampler, drafts, logits, masks), drafts.block


def _only(token: int, requests: list[int]) -> RowMasks:
    allowed = torch.zeros(len(requests) * WIDTH, VOCAB, dtype=torch.bool)
    allowed[:, token] = True
    return RowMasks(Allow(allowed), requests)


@pytest.mark.parametrize("how", SAMPLING)
def test_the_end_that_min_new_tokens_forbids_comes_if_nothing_else_may(how: str) -> None:
    torch.manual_seed(0)
    params = [SAMPLING[how] | {"min_new_tokens": 50}, SAMPLING[how] | {"min_new_tokens": 50}, SAMPLING[how]]
    batch = _batch(params, acc_additive_penalties=torch.zeros(3, VOCAB))
    verdict, _ = _round(batch, _only(END, [0]))
    assert verdict.tokens[0, 0] == END
    free = verdict.tokens[1, : int(verdict.accept_lens[1])]
    assert END not in free.tolist(), "without a grammar the option holds"


@pytest.mark.parametrize("how", SAMPLING)
def test_a_bias_that_forbids_all_that_a_grammar_allows_gives_way(how: str) -> None:
    torch.manual_seed(0)
    bias = torch.zeros(2, VOCAB)
    bias[0, [2, 3]] = -INF
    forbids = {"logit_bias": {"2": -INF, "3": -INF}}
    batch = _batch([SAMPLING[how] | forbids, SAMPLING[how]], logit_bias=bias)
    allowed = torch.zeros(WIDTH, VOCAB, dtype=torch.bool)
    allowed[:, [2, 3]] = True
    verdict, _ = _round(batch, RowMasks(Allow(allowed), [0]))
    assert verdict.tokens[0, 0] in (2, 3)
    if how == "greedy":
        assert verdict.tokens[0, 0] == 2 + int(_table()[0, 2] < _table()[0, 3]), "the model chooses among the two"


def test_a_bias_that_leaves_one_token_is_obeyed() -> None:
    bias = torch.zeros(1, VOCAB)
    bias[0, 2] = -INF
    batch = _batch([{"top_k": 1, "logit_bias": {"2": -INF}}], logit_bias=bias)
    allowed = torch.zeros(WIDTH, VOCAB, dtype=torch.bool)
    allowed[:, [2, 3]] = True
    verdict, _ = _round(batch, RowMasks(Allow(allowed), [0]))
    assert verdict.tokens[0, 0] == 3


def test_a_finite_bias_is_arithmetic_as_in_plain_sglang() -> None:
    """All that is allowed sinks by the same 1e30, in fp32 to the same value: the first of them wins."""
    bias = torch.full((1, VOCAB), -1e30)
    batch = _batch([{"top_k": 1, "logit_bias": {"0": -1e30}}], logit_bias=bias)
    allowed = torch.zeros(WIDTH, VOCAB, dtype=torch.bool)
    allowed[:, [2, 3]] = True
    verdict, _ = _round(batch, RowMasks(Allow(allowed), [0]))
    assert verdict.tokens[0, 0] == 2


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("value", [-INF, float("nan")])
def test_without_a_grammar_the_model_decides_where_a_processor_forbids_everything(how: str, value: float) -> None:
    torch.manual_seed(0)

    def forbid(logits: torch.Tensor, params: Any) -> torch.Tensor:
        return logits.fill_(value)

    batch = _batch(
        [SAMPLING[how], SAMPLING[how]],
        has_custom_logit_processor=True,
        custom_logit_processor={1: ProcessorEntry(forbid, [1], torch.tensor([1]))},
        custom_params=[None, None],
    )
    batch.reqs[1].custom_logit_processor = "forbid"
    verdict, _ = _round(batch, None)
    assert torch.isfinite(verdict.tokens.float()).all() and int(verdict.tokens.max()) < VOCAB
    if how == "greedy":
        best = _table().argmax(dim=1)
        last = 0
        for token in verdict.tokens[1, : int(verdict.accept_lens[1])].tolist():
            assert token == best[last]
            last = token


def test_only_requests_whose_options_may_forbid_are_kept() -> None:
    reqs = _batch([{}, {"logit_bias": {"1": 1.0}}, {"min_new_tokens": 2}, {"min_new_tokens": 1}, {}]).reqs
    reqs[4].custom_logit_processor = "any"
    assert [may_forbid(req) for req in reqs] == [False, True, True, False, True], "one token is out"


def test_processors_cannot_make_what_sampling_cannot_read() -> None:
    logits = torch.tensor([[float("nan"), INF, 3e38, -INF, 1.0]])
    tame_inplace(logits)
    assert logits.tolist() == [[-INF, pytest.approx(1e30), pytest.approx(1e30), -INF, 1.0]]
    assert torch.softmax(logits / 1e-6, dim=-1).isfinite().all()


def test_a_processor_sees_one_request_at_a_time() -> None:
    """SGLang's `DisallowedTokensLogitsProcessor` asserts that all rows it visible have the same parameters."""
    params = [{"token_ids": [0, 1, 2, 3]}, {"token_ids": [5, 4, 3, 2]}]
    batch = _batch(
        [{"top_k": 1, "custom_params": own} for own in params],
        has_custom_logit_processor=True,
        custom_logit_processor={1: ProcessorEntry(DisallowedTokensLogitsProcessor(), [0, 1], torch.arange(2))},
        custom_params=params,
    )
    for req in batch.reqs:
        req.custom_logit_processor = "disallowed"
    verdict, _ = _round(batch, None)
    assert set(verdict.tokens[0, : int(verdict.accept_lens[0])].tolist()) <= {4, 5}
    assert set(verdict.tokens[1, : int(verdict.accept_lens[1])].tolist()) <= {0, 1}

    info = SamplingBatchInfo(*[None] * 9, vocab_size=VOCAB)
    info.custom_logit_processor = batch.sampling_info.custom_logit_processor
    alone = sampler._one_by_one(info).custom_logit_processor
    assert [(entry.rows, entry.indices.tolist()) for entry in alone.values()] == [([0], [0]), ([1], [1])]


def test_rows_are_taken_whole_and_no_option_allows_what_a_grammar_forbids() -> None:
    adjusted = torch.tensor([[-INF, -INF], [-INF, 1.0], [9.0, 1.0], [9.0, -INF]])
    allowed = torch.tensor([[-INF, 2.0], [3.0, 4.0], [-INF, 5.0], [-INF, 6.0]])
    assert within_the_grammar(adjusted, allowed).tolist() == [[-INF, 2.0], [-INF, 1.0], [-INF, 1.0], [-INF, 6.0]]


class Info:
    """What SGLang's `SamplingBatchInfo` and sampler read while options are applied."""

    penalizer_orchestrator = acc_additive_penalties = acc_scaling_penalties = None
    logit_bias = grammar_mask = custom_logit_processor = None
    has_custom_logit_processor = False


def test_the_first_token_obeys_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingBatchInfo, "apply_logits_bias", SamplingBatchInfo.apply_logits_bias)
    keep_allowed_logits()
    for name in ("_apply_pre_grammar_logits_transforms", "_apply_post_grammar_logits_transforms"):
        monkeypatch.setattr(Info, name, getattr(SamplingBatchInfo, name), raising=False)
    nobody: Any = SimpleNamespace()
    preprocess = partial(FirstTokenSampler._preprocess_logits, nobody)
    plain = torch.arange(2.0 * VOCAB).view(2, VOCAB)
    info: Any = Info()
    info.is_all_greedy = False
    info.logit_bias = torch.zeros(2, VOCAB)
    info.logit_bias[0] = -INF
    info.grammar_mask = Allow(torch.arange(VOCAB).expand(2, -1) < 3)
    logits = plain.clone()
    SamplingBatchInfo.apply_logits_bias(info, logits)
    logits = preprocess(logits, info)
    wanted = plain.clone()
    wanted[:, 3:] = -INF
    assert torch.equal(logits, wanted)
    assert info.allowed_logits is None, "it must not outlive the step"

    # Processors come last, in the sampler.
    def forbid(logits: torch.Tensor, info: Any) -> None:
        logits[0] = float("nan")

    monkeypatch.setattr(sampler, "apply_custom_logit_processor", forbid)
    monkeypatch.setattr(sampler, "_one_by_one", lambda info: info)
    info.logit_bias, info.has_custom_logit_processor = None, True
    logits = plain.clone()
    SamplingBatchInfo.apply_logits_bias(info, logits)
    assert torch.equal(preprocess(logits, info), wanted)


def test_a_batch_without_such_options_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingBatchInfo, "apply_logits_bias", SamplingBatchInfo.apply_logits_bias)
    keep_allowed_logits()
    for name in ("_apply_pre_grammar_logits_transforms", "_apply_post_grammar_logits_transforms"):
        monkeypatch.setattr(Info, name, getattr(SamplingBatchInfo, name), raising=False)
    info: Any = Info()
    SamplingBatchInfo.apply_logits_bias(info, torch.zeros(2, VOCAB))
    assert info.allowed_logits is None


@pytest.mark.parametrize("row", [[-INF] * 4, [1.0, NAN, 2.0, -INF], [NAN] * 4, [0.0, INF, 0.0, -INF]])
def test_a_row_without_a_distribution_leaves_its_neighbours_something_to_sample_from(row: list[float]) -> None:
    """Of such a row softmax makes NaN, and SGLang samples all rows of a batch together."""
    logits = torch.tensor([row, [1.0, -INF, 2.0, 0.5]])
    kept = logits[1].clone()
    leave_something_inplace(logits)
    assert torch.softmax(logits, dim=-1).isfinite().all()
    assert torch.equal(logits[1], kept)


@pytest.mark.parametrize("how", ["sampled", "filtered"])
def test_a_round_in_which_a_grammar_allows_nothing_harms_no_neighbour(how: str) -> None:
    nothing = RowMasks(Allow(torch.zeros(WIDTH, VOCAB, dtype=torch.bool)), [0])
    verdict, block = _round(_batch([SAMPLING[how]] * 2), nothing)
    assert (verdict.accept_lens >= 1).all()
    assert (verdict.tokens >= 0).all() and (verdict.tokens < VOCAB).all()
    length = int(verdict.accept_lens[1])
    assert torch.equal(verdict.tokens[1, : length - 1], block[1, 1:length])


@pytest.mark.parametrize("how", SAMPLING)
@pytest.mark.parametrize("broken", [NAN, INF])
@pytest.mark.parametrize("is_constrained", [False, True])
def test_a_round_in_which_a_model_gives_no_number_harms_no_neighbour(
    how: str, broken: float, is_constrained: bool
) -> None:
    masks = _only(END, [0]) if is_constrained else None
    verdict, block = _round(_batch([SAMPLING[how]] * 2), masks, broken)
    assert (verdict.accept_lens >= 1).all()
    assert (verdict.tokens >= 0).all() and (verdict.tokens < VOCAB).all()
    length = int(verdict.accept_lens[1])
    assert torch.equal(verdict.tokens[1, : length - 1], block[1, 1:length])


def test_a_first_token_of_which_the_model_gives_no_number_harms_no_neighbour() -> None:
    info: Any = Info()
    info.is_all_greedy = False
    logits = torch.tensor([[0.0, NAN, 1.0], [1.0, 5.0, 2.0]])
    kept = logits[1].clone()
    nobody: Any = SimpleNamespace()
    logits = FirstTokenSampler._preprocess_logits(nobody, logits, info)
    assert torch.softmax(logits, dim=-1).isfinite().all()
    assert torch.equal(logits[1], kept)
