"""Requests whose rounds change their width keep what they said, and get what they would get alone, a step at a time.

In the world of `test_verification`. One history serves all rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.sampling.sampling_batch_info import ProcessorEntry
from torch.nn.functional import one_hot

from sglang_orthrus.sampling.acceptance import accept_nothing
from sglang_orthrus.sampling.batch import BatchSampler
from sglang_orthrus.sampling.drafts import Drafts, draft_tokens
from sglang_orthrus.sampling.logit_adjustments import REQUEST_KEY
from sglang_orthrus.sampling.logprobs import RoundLogprobs
from sglang_orthrus.sampling.output_history import History
from sglang_orthrus.sampling.verification import (
    best_tokens,
    likeliest_tokens,
    requests_with_known_best,
    verify_drafts,
)
from tests.sampling import decode_batch
from tests.unit.test_verification import (
    FALSE_ALARM,
    FILTERS,
    VOCAB,
    Model,
    _alone,
    _hash_on_cpu,
    _misfit,
    _tables,
    _texts,
)

__all__ = ["_hash_on_cpu"]  # a fixture

LENGTH, INPUT_LEN, END = 40, 10, 3
GREEDY: dict[str, Any] = {"top_k": 1}
SEEDED: dict[str, Any] = {"top_p": 0.9, "temperature": 1.5}
PENALTIES: dict[str, Any] = {"frequency_penalty": 0.3, "presence_penalty": 0.4, "repetition_penalty": 1.3}
ASKED: list[dict[str, Any]] = [
    {},
    PENALTIES,
    {"min_new_tokens": 20, "stop_token_ids": [END]},
    {"logit_bias": {"1": 1.5, "4": -1.5}, "frequency_penalty": 0.2},
    {"custom_params": {}},
]
OPTIONS = [kind | asked for kind in (GREEDY, SEEDED) for asked in ASKED]


def forget_the_last_two(logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
    """A custom processor: no token comes again within three."""
    for row, own in zip(logits, params, strict=True):
        row[list(own[REQUEST_KEY].output_ids)[-2:]] = float("-inf")
    return logits


def served_batch(options: Sequence[dict[str, Any]]) -> Any:
    """All seeded, and all want log probabilities."""
    size = len(options)
    batch = decode_batch(
        options,
        torch.full((size,), INPUT_LEN),
        torch.arange(size) % 7,
        vocab_size=VOCAB,
        top_logprobs=[row % 3 for row in range(size)],
    )
    for req in batch.reqs:
        req.origin_input_ids = [0] * INPUT_LEN
        req.eos_token_ids = set()
        req.tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=None)
    readers = [row for row, own in enumerate(options) if own.get("custom_params") is not None]
    for row in readers:
        batch.reqs[row].custom_logit_processor = "forget"
    batch.sampling_info.has_custom_logit_processor = bool(readers)
    entry = ProcessorEntry(forget_the_last_two, readers, torch.tensor(readers))
    batch.sampling_info.custom_logit_processor = {1: entry}
    batch.sampling_info.custom_params = [
        {REQUEST_KEY: req} if row in readers else None for row, req in enumerate(batch.reqs)
    ]
    return batch


def text_alone(options: dict[str, Any], seed: int) -> tuple[list[int], list[float]]:
    """A request's tokens after token 0 and their log probabilities, by the definition of its options."""
    ar, _ = _tables()
    values = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0} | options
    text, logprobs = [0], []
    for index in range(LENGTH):
        logits = ar[text[-1]].clone()
        if len(text) < options.get("min_new_tokens", 0):
            logits[END] = float("-inf")
        counts = torch.tensor(text).bincount(minlength=VOCAB)
        logits -= values["frequency_penalty"] * counts + values["presence_penalty"] * (counts > 0)
        scale = torch.where(counts > 0, values["repetition_penalty"], 1.0)
        logits = torch.where(logits < 0, logits * scale, logits / scale)
        for token, bias in options.get("logit_bias", {}).items():
            logits[int(token)] += bias
        if "custom_params" in options:
            logits[text[-2:]] = float("-inf")
        text.append(_alone(options, seed, INPUT_LEN + index, logits))
        scaled = logits / (1.0 if options.get("top_k") == 1 else options["temperature"])
        logprobs.append(float(torch.log_softmax(scaled, dim=-1)[text[-1]]))
    return text[1:], logprobs


class Texts:
    """What requests get in rounds of these widths, taken in turn, from a drafter that is right nine times out of ten.

    Attributes:
        tokens: of each request, at least `LENGTH`.
        logprobs: theirs.
        longest: accepted drafts of a round.
    """

    def __init__(
        self, options: Sequence[dict[str, Any]], wanted: Sequence[Sequence[int]], widths: Sequence[int]
    ) -> None:
        size = len(options)
        self._batch, self._history = served_batch(options), History("cpu")
        self._generator = torch.Generator().manual_seed(5)
        self._known = torch.tensor([[*text, *[0] * max(widths)] for text in wanted])
        self.tokens: list[list[int]] = [[] for _ in options]
        self.logprobs: list[list[float]] = [[] for _ in options]
        self.longest = 0
        self._anchors = torch.zeros(size, dtype=torch.int64)
        self._history.start(self._batch, self._anchors)
        for req in self._batch.reqs:
            req.output_ids = [0]
        following = cycle(widths)
        while min(map(len, self.tokens)) < LENGTH:
            self._round(next(following))

    def _draft_logits(self, num_drafts: int) -> torch.Tensor:
        said = torch.tensor([min(len(text), LENGTH) for text in self.tokens])
        known = self._known.gather(1, said[:, None] + torch.arange(num_drafts))
        wrong = torch.randint(VOCAB, known.shape, generator=self._generator)
        is_known = torch.rand(known.shape, generator=self._generator) < 0.9
        return 20 * one_hot(torch.where(is_known, known, wrong), VOCAB).float()

    def _round(self, width: int) -> None:
        ar, _ = _tables()
        batch = self._batch
        adjustments = self._history.adjustments(batch)
        sampler = BatchSampler(Model(), batch, self._anchors, adjustments, width, "pytorch")
        drafts = draft_tokens(sampler, self._draft_logits(width - 1))
        logprobs, output = RoundLogprobs(batch, width), SimpleNamespace()
        verdict = verify_drafts(sampler, drafts, ar[drafts.block], None, logprobs)
        logprobs.write_to(output)
        assert verdict.tokens.shape == output.next_token_logprobs.shape == (len(batch.reqs), width)
        assert len(output.next_token_top_logprobs_val) == len(batch.reqs) * width
        self._history.extend(batch, adjustments, drafts.block, verdict)
        for row, length in enumerate(verdict.accept_lens.tolist()):
            tokens, values = verdict.tokens[row, :length].tolist(), output.next_token_logprobs[row, :length].tolist()
            self.tokens[row] += tokens
            self.logprobs[row] += values
            batch.reqs[row].output_ids += tokens
            self.longest = max(self.longest, length - 1)
            if batch.top_logprobs_nums[row]:
                for index in range(length):
                    best = output.next_token_top_logprobs_val[row * width + index]
                    assert len(best) == batch.top_logprobs_nums[row] and best[0] >= values[index]
        batch.seq_lens, self._anchors = verdict.new_seq_lens, verdict.bonus


@pytest.mark.parametrize("widths", [(8,), (1,), (32,), (8, 1, 32, 16), (1, 2, 1, 31)], ids=str)
def test_texts_and_log_probabilities_are_those_of_a_step_at_a_time(widths: Sequence[int]) -> None:
    """Greedy and seeded, with penalties, held back stops, a bias, and a custom processor that reads the output."""
    wanted = [text_alone(own, row % 7) for row, own in enumerate(OPTIONS)]
    found = Texts(OPTIONS, [text for text, _ in wanted], widths)
    assert [text[:LENGTH] for text in found.tokens] == [text for text, _ in wanted]
    for ours, (_, theirs) in zip(found.logprobs, wanted, strict=True):
        assert ours[:LENGTH] == pytest.approx(theirs, abs=1e-5)
    assert found.longest > 3 or widths == (1,)


@pytest.mark.parametrize("options", [GREEDY, SEEDED, {"temperature": 1.0}], ids=str)
def test_a_round_without_drafts_is_whole(options: dict[str, Any]) -> None:
    """Blocks are anchors; there is nothing to replace, and of the hidden states of drafts nothing is kept."""
    anchors = torch.tensor([0, 2, 4])
    batch = decode_batch([options] * 3, torch.full((3,), INPUT_LEN), vocab_size=VOCAB)
    if options is SEEDED:
        batch.sampling_info.sampling_seed = torch.arange(3)
    ar, _ = _tables()
    sampler = BatchSampler(Model(), batch, anchors, History("cpu").adjustments(batch), 1, "pytorch")
    for drafts in (draft_tokens(sampler, torch.zeros(3, 0, VOCAB), [0, 2], 4), Drafts.blank(anchors, 0, 2, 4)):
        assert drafts.block.tolist() == [[0], [2], [4]]
        assert drafts.tokens.shape == drafts.q.shape == drafts.is_certain.shape == (3, 0)
        assert drafts.candidates.shape == (2, 0, 4)
        assert not drafts.are_drawn and drafts.hidden_states is None
        replaced = drafts.replaced(torch.tensor([0, 2]), torch.zeros(2, 0, dtype=torch.int64))
        assert torch.equal(replaced.block, drafts.block)
        verdict = verify_drafts(sampler, drafts, ar[drafts.block])
        assert verdict.accept_lens.tolist() == [1, 1, 1]
        assert torch.equal(verdict.tokens[:, 0], verdict.bonus)
        assert verdict.new_seq_lens.tolist() == [INPUT_LEN + 1] * 3
        known = requests_with_known_best(sampler)
        assert known == (frozenset(range(3)) if options is GREEDY else frozenset())
        if known:
            assert torch.equal(verdict.tokens, ar[anchors].argmax(dim=1)[:, None])
            assert torch.equal(best_tokens(sampler, drafts, ar[drafts.block], [0, 1, 2]), verdict.tokens)
            for count in (1, 3, VOCAB + 2):
                ranked = likeliest_tokens(sampler, drafts, ar[drafts.block], [0, 2], count)
                assert sorted(ranked) == [0, 2]
                for row, (logits, tokens) in ranked.items():
                    values = ar[anchors[row]]
                    assert list(tokens) == values.argsort(descending=True).tolist()[:count]
                    assert list(logits) == values[list(tokens)].tolist()
        unwanted = accept_nothing(drafts.block, batch.seq_lens)
        assert unwanted.accept_lens.tolist() == [1, 1, 1] and torch.equal(unwanted.tokens, drafts.block)


@pytest.mark.parametrize("widths", [(1,), (2, 1, 3), (1, 8, 32, 16)], ids=str)
@pytest.mark.parametrize("name", ["temperature", "min_p", "top_k and top_p"])
def test_texts_follow_plain_sglangs_distribution_whatever_the_widths(name: str, widths: Sequence[int]) -> None:
    torch.manual_seed(0)
    assert _misfit(_texts(FILTERS[name], 6000, 3, widths=widths), FILTERS[name]) > FALSE_ALARM
