"""Whole rounds on a toy vocabulary: what is emitted follows plain SGLang's distribution, or its seeded choices.

The autoregressive view is a table: the logits after a token depend on that token alone. The diffusion view is another
one, by position. Chi-square tests have fixed seeds; a correct implementation fails one with probability 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from scipy.stats import chi2
from sglang.srt.layers.sampler import sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from sglang_orthrus.core import Verdict
from sglang_orthrus.cpu import kernels
from sglang_orthrus.sampling import distributions, verification
from sglang_orthrus.sampling import drafts as drafts_module
from sglang_orthrus.sampling.batch import BatchSampler
from sglang_orthrus.sampling.distributions import joint_support, sequential_support
from sglang_orthrus.sampling.drafts import Drafts, draft_tokens
from sglang_orthrus.sampling.logit_adjustments import Adjustments, RowMasks
from sglang_orthrus.sampling.verification import verify_drafts
from tests.sampling import decode_batch, top_k_renorm, top_p_renorm

VOCAB, WIDTH = 5, 4
FALSE_ALARM = 1e-6
FILTERS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "top_k and top_p": {"top_k": 4, "top_p": 0.85, "temperature": 1.3},
    "top_k and min_p": {"top_k": 3, "min_p": 0.25},
    "top_p and min_p": {"top_p": 0.9, "min_p": 0.25},
    "all": {"top_k": 4, "top_p": 0.9, "min_p": 0.1, "temperature": 1.2},
}


class Model:
    """Hidden states are logits, of values that bf16 has."""

    def logits(self, hidden_states: torch.Tensor, *, in_fp32: bool = True) -> torch.Tensor:
        logits = hidden_states.reshape(-1, VOCAB).bfloat16()
        return logits.float() if in_fp32 else logits


@pytest.fixture(autouse=True)
def _hash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.layers.sampler.murmur_hash32", kernels.murmur_hash32)


def _tables(closeness: float = 1.0, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the AR view by last token [V, V], and of the diffusion view by row [width-1, V], not unlike them."""
    generator = torch.Generator().manual_seed(3)
    ar = 1.5 * torch.randn(VOCAB, VOCAB, generator=generator)
    noise = torch.randn(width - 1, VOCAB, generator=generator)
    diffusion = closeness * ar[:1].expand(width - 1, -1) + noise
    return ar.bfloat16().float(), diffusion.bfloat16().float()


# The most drafts that may be accepted of a round, [bs], by its drafts.
Limits = Callable[[Drafts], torch.Tensor]

_batch = partial(decode_batch, vocab_size=VOCAB)


def _round(
    batch: Any,
    anchors: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    propose: Any = None,
    *,
    width: int = WIDTH,
    backend: str = "pytorch",
    limits: Limits | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[Verdict, Drafts]:
    ar, diffusion = tables
    sampler = BatchSampler(Model(), batch, anchors, Adjustments(batch, None, {}), width, backend)
    drafts = draft_tokens(sampler, diffusion[: width - 1].expand(len(anchors), -1, -1))
    if propose is not None:
        drafts = propose(drafts)
    masks = None
    if allowed is not None:
        masks = RowMasks(Allow(allowed.expand(len(anchors) * width, -1)), range(len(anchors)))
    return verify_drafts(sampler, drafts, ar[drafts.block], masks, limits=limits(drafts) if limits else None), drafts


def _texts(
    options: dict[str, Any] | list[dict[str, Any]],
    count: int,
    length: int,
    propose: Any = None,
    *,
    seeds: torch.Tensor | None = None,
    closeness: float = 1.0,
    widths: Sequence[int] = (WIDTH,),
    **how: Any,
) -> torch.Tensor:
    """`count` texts of `length` tokens after token 0, over as many rounds as it takes: [count, length]

    With several options texts take them in turn, and so do rounds with several widths.
    """
    kinds = options if isinstance(options, list) else [options]
    params = [kinds[row % len(kinds)] for row in range(count)]
    tables = _tables(closeness, max(WIDTH, *widths))
    texts = torch.zeros(count, length + max(widths), dtype=torch.int64)
    said = torch.zeros(count, dtype=torch.int64)
    anchors = torch.zeros(count, dtype=torch.int64)
    following = cycle(widths)
    while (said < length).any():
        verdict, _ = _round(_batch(params, said, seeds), anchors, tables, propose, width=next(following), **how)
        for row in range(count):
            emitted = int(verdict.accept_lens[row])
            if said[row] < length:
                texts[row, said[row] : said[row] + emitted] = verdict.tokens[row, :emitted]
        said = torch.where(said < length, verdict.new_seq_lens, said)
        anchors = verdict.bonus
    return texts[:, :length]


def _plain_distribution(options: dict[str, Any]) -> torch.Tensor:
    """The next token's, by last token, as SGLang's own sampler filters it: [V, V]"""
    values = {"temperature": 1.0, "top_k": TOP_K_ALL, "top_p": 1.0, "min_p": 0.0} | options
    probs = torch.softmax(_tables()[0] / values["temperature"], dim=-1)
    rows = torch.ones(VOCAB)
    _, weights, ids, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        probs,
        (rows * min(values["top_k"], VOCAB)).int(),
        rows * values["top_p"],
        rows * values["min_p"],
        True,
        None,
        rows,
        return_filtered_probs=True,
    )
    filtered = torch.zeros_like(probs).scatter_(1, ids.long(), weights)
    return filtered / filtered.sum(dim=1, keepdim=True)


def _misfit(texts: torch.Tensor, options: dict[str, Any]) -> float:
    """The p-value of chi-square over whole texts of three tokens."""
    return _misfit_of_chain(texts, _plain_distribution(options))


def _misfit_of_chain(texts: torch.Tensor, chain: torch.Tensor) -> float:
    """The same for the distribution of the next token by last token, [V, V]."""
    expected = chain[0][:, None, None] * chain[:, :, None] * chain[None, :, :]
    assert texts.shape[1] == 3
    index = (texts[:, 0] * VOCAB + texts[:, 1]) * VOCAB + texts[:, 2]
    counts = index.bincount(minlength=VOCAB**3).float()
    expected = expected.flatten() * len(texts)
    if counts[expected == 0].sum() > 0:
        return 0.0
    # Rare texts are taken together.
    is_rare = expected < 10
    found = torch.cat((counts[~is_rare], counts[is_rare].sum()[None]))
    wanted = torch.cat((expected[~is_rare], expected[is_rare].sum()[None])).clamp_min(1e-9)
    statistic = float(((found - wanted) ** 2 / wanted)[wanted > 1e-6].sum())
    return float(chi2.sf(statistic, int((wanted > 1e-6).sum()) - 1))


@pytest.mark.parametrize("name", FILTERS)
def test_texts_follow_plain_sglangs_distribution(name: str) -> None:
    torch.manual_seed(0)
    assert _misfit(_texts(FILTERS[name], 6000, 3), FILTERS[name]) > FALSE_ALARM


@pytest.mark.parametrize("name", ["temperature", "top_k and top_p"])
def test_the_test_notices_a_biased_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting drafts a little too readily must fail it."""
    torch.manual_seed(0)
    exact = distributions.is_accepted
    monkeypatch.setattr(verification, "is_accepted", lambda p, q, coins: exact(p, q, 0.8 * coins))
    assert _misfit(_texts(FILTERS[name], 6000, 3), FILTERS[name]) < FALSE_ALARM


def test_the_test_notices_a_wrong_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing from p in place of a rejected draft must fail it."""
    torch.manual_seed(0)
    monkeypatch.setattr(verification, "residual", lambda p, q: p)
    assert _misfit(_texts(FILTERS["temperature"], 6000, 3), FILTERS["temperature"]) < FALSE_ALARM


def test_flashinfers_order_of_filters_is_chosen_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests with min-p filter one after the other, their neighbours without it jointly; either order is noticed."""
    torch.manual_seed(0)
    for name, function in (("top_k_renorm_prob", top_k_renorm), ("top_p_renorm_prob", top_p_renorm)):
        monkeypatch.setattr(f"sglang.srt.layers.sampler.{name}", function, raising=False)
    filters = {"top_k": 3, "top_p": 0.75, "temperature": 1.5}
    texts = _texts([filters, filters | {"min_p": 1e-6}], 6000, 3, backend="flashinfer")
    probs = torch.softmax(_tables()[0] / filters["temperature"], dim=-1)
    top_ks, top_ps, min_ps = torch.full((VOCAB,), 3), torch.full((VOCAB,), 0.75), torch.full((VOCAB,), 1e-6)
    joint = joint_support(probs, top_ks, top_ps, top_k_renorm, top_p_renorm).probabilities(VOCAB)
    sequential = sequential_support(probs, top_ks, top_ps, min_ps, top_k_renorm, top_p_renorm).probabilities(VOCAB)
    assert _misfit_of_chain(texts[::2], joint) > FALSE_ALARM
    assert _misfit_of_chain(texts[1::2], sequential) > FALSE_ALARM
    assert _misfit_of_chain(texts[::2], sequential) < FALSE_ALARM
    assert _misfit_of_chain(texts[1::2], joint) < FALSE_ALARM


def test_drafts_that_were_not_drawn_change_nothing() -> None:
    """Every other row's second draft is chosen by a rule: q is one-hot there."""
    torch.manual_seed(0)

    def propose(drafts: Drafts) -> Drafts:
        where = (slice(None, None, 2), 1)
        return drafts.replaced(where, torch.ones_like(drafts.tokens[where]))

    assert _misfit(_texts(FILTERS["top_p"], 6000, 3, propose), FILTERS["top_p"]) > FALSE_ALARM


class Allow(NamedTuple):
    """A grammar's mask, as SGLang's: what is False may not be chosen."""

    vocab_mask: torch.Tensor

    def apply(self, logits: torch.Tensor) -> None:
        logits.masked_fill_(~self.vocab_mask, float("-inf"))


def test_masks_of_some_requests_hold_for_them_alone_and_drafts_may_come_from_their_candidates() -> None:
    """Every third request may say even tokens only; its drafts are its best candidates that are even."""
    torch.manual_seed(0)
    count = 90
    kinds: list[dict[str, Any]] = [{"top_k": 1}, {"temperature": 1.3}]
    params = [kinds[row % 2] for row in range(count)]
    constrained = list(range(0, count, 3))
    ar, diffusion = _tables()
    batch = _batch(params, torch.zeros(count).long())
    anchors = torch.zeros(count).long()
    sampler = BatchSampler(Model(), batch, anchors, Adjustments(batch, None, {}), WIDTH, "pytorch")
    drafts = draft_tokens(sampler, diffusion.expand(count, -1, -1), constrained, VOCAB)
    assert torch.equal(drafts.candidates[0], diffusion.argsort(dim=-1, descending=True))
    is_even = drafts.candidates % 2 == 0
    best_even = drafts.candidates.gather(2, is_even.int().argmax(dim=2, keepdim=True)).squeeze(2)
    drafts = drafts.replaced(torch.tensor(constrained), best_even)
    block = drafts.block
    even = (torch.arange(VOCAB) % 2 == 0).expand(len(constrained) * WIDTH, -1)
    verdict = verify_drafts(sampler, drafts, ar[block], RowMasks(Allow(even), constrained))
    odd = 0
    for row in range(count):
        last = 0
        for token in verdict.tokens[row, : int(verdict.accept_lens[row])].tolist():
            allowed = ar[last].clone()
            if row in constrained:
                allowed[1::2] = float("-inf")
            assert allowed[token] > float("-inf")
            assert row % 2 or token == int(allowed.argmax())
            odd += token % 2
            last = token
    assert odd, "others may say what they like"


def test_distributions_that_were_not_kept_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(drafts_module, "KEPT_COLUMNS", 0)
    monkeypatch.setattr(drafts_module, "KEPT_ROWS", 0)
    assert _misfit(_texts(FILTERS["top_p"], 6000, 3), FILTERS["top_p"]) > FALSE_ALARM


def test_a_block_may_be_accepted_whole_and_be_rejected_at_once() -> None:
    torch.manual_seed(0)
    count = 500
    verdict, _ = _round(_batch([{}] * count, torch.zeros(count).long()), torch.zeros(count).long(), _tables())
    assert {1, WIDTH} <= set(verdict.accept_lens.tolist())
    verdict, _ = _round(_batch([{}], torch.zeros(1).long()), torch.zeros(1).long(), _tables())
    assert verdict.tokens.shape == (1, WIDTH)


def _alone(options: dict[str, Any], seed: int, position: int, logits: torch.Tensor) -> int:
    """Plain SGLang's choice for one request in a batch of its own."""
    values = {"temperature": 1.0, "top_k": TOP_K_ALL, "top_p": 1.0, "min_p": 0.0} | options
    if values["top_k"] == 1:
        return int(logits.argmax())
    probs = torch.softmax(logits[None] / values["temperature"], dim=-1)
    seeds, positions = torch.tensor([seed]), torch.tensor([position])
    if values["top_k"] == TOP_K_ALL and values["top_p"] == 1.0:
        return int(sampling_from_probs_torch(probs, seeds, positions))
    top_ks = torch.tensor([values["top_k"]], dtype=torch.int32)
    tokens = top_k_top_p_min_p_sampling_from_probs_torch(
        probs, top_ks, torch.tensor([values["top_p"]]), torch.zeros(1), False, seeds, positions
    )
    return int(tokens)


def test_seeded_and_greedy_requests_get_what_they_would_get_alone_whatever_their_neighbours() -> None:
    options: list[dict[str, Any]] = [
        {"top_k": 1},
        {"temperature": 0.7},
        {"top_p": 0.8},
        {"top_k": 3},
        {"top_k": 4, "top_p": 0.9},
    ]
    mixed = [options[row % len(options)] for row in range(200)]
    prefix_lens = torch.randint(1, 50, (200,), generator=torch.Generator().manual_seed(1))
    seeds = torch.arange(200) % 7
    ar, _ = tables = _tables()
    anchors = torch.arange(200) % VOCAB
    verdict, _ = _round(_batch(mixed, prefix_lens, seeds), anchors, tables)
    assert len(set(verdict.accept_lens.tolist())) > 2
    for row in range(200):
        last = int(anchors[row])
        for index in range(int(verdict.accept_lens[row])):
            position = int(prefix_lens[row]) + index
            token = _alone(mixed[row], int(seeds[row]), position, ar[last])
            assert token == int(verdict.tokens[row, index])
            last = token


def test_seeded_texts_depend_neither_on_the_widths_of_rounds_nor_on_drafts() -> None:
    options: list[dict[str, Any]] = [
        {"top_k": 1},
        {"temperature": 1.5},
        {"top_p": 0.8, "temperature": 2.0},
        {"top_k": 3},
    ]
    count, length = 40, 9
    seeds = torch.arange(count) % 5
    ar, _ = _tables()
    wanted = []
    for row in range(count):
        text = [0]
        for position in range(length):
            text.append(_alone(options[row % len(options)], int(seeds[row]), position, ar[text[-1]]))
        wanted.append(text[1:])
    for widths in ((WIDTH,), (2,), (1,), (8, 1, 32, 16), (1, 2)):
        for closeness in (1.0, 0.0):
            texts = _texts(options, count, length, seeds=seeds, widths=widths, closeness=closeness)
            assert texts.tolist() == wanted, (widths, closeness)


def test_greedy_and_drawn_requests_share_a_batch() -> None:
    torch.manual_seed(0)
    count = 60
    mixed = [{"top_k": 1} if row % 2 else {"temperature": 1.5} for row in range(count)]
    ar, _ = tables = _tables()
    verdict, _ = _round(_batch(mixed, torch.zeros(count).long()), torch.zeros(count).long(), tables)
    for row in range(1, count, 2):
        last = 0
        for token in verdict.tokens[row, : int(verdict.accept_lens[row])].tolist():
            assert token == int(ar[last].argmax())
            last = token
    assert len({tuple(row) for row in verdict.tokens[::2].tolist()}) > 5
