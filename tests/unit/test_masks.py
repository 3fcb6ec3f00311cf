"""The masks of a round: which are filled where they take long, and where a block is cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

from sglang_orthrus.config import DraftMode
from sglang_orthrus.grammar.batch import BlockGrammars, CandidatesCopy, RepairedDrafts
from sglang_orthrus.grammar.cursors import cursor_of
from sglang_orthrus.grammar.slow_masks import NUM_SLOW_BLOCKS
from sglang_orthrus.metrics import GrammarMetrics
from tests.grammars import judged
from tests.unit import test_grammar_cursors as cursors
from tests.unit.test_grammar_cursors import (
    ENCODE,
    END,
    SCHEMA,
    TEXT,
    TOKENIZER,
    VOCABULARY,
    WIDTH,
    allowed_by_sglang,
    block_of,
    request,
    scratch,
)

backend = cursors.backend  # the fixture


class Judged:
    """Two blocks, what verification would choose in them, and all of their masks."""

    def __init__(self, backend: BaseGrammarBackend, width: int = WIDTH) -> None:
        self.width = width
        self.reqs = [request(backend.dispatch_json(SCHEMA)), request(backend.dispatch_regex("[a-c]{40}"))]
        rng = np.random.default_rng(2)
        self.candidates = torch.from_numpy(rng.integers(0, VOCABULARY, (2, width - 1, 16)))
        unlimited = block_grammars()
        repaired = self.repair(unlimited)
        self.drafts = repaired.tokens.numpy().copy()
        self.masks = unlimited.masks(repaired).mask.vocab_mask.clone()
        self.scores = rng.random((2, width, VOCABULARY))
        np.put_along_axis(self.scores[:, :-1], self.drafts[:, :, None], 2.0, axis=2)
        wrong = rng.random((2, width)) < 0.2
        self.scores[wrong, rng.integers(0, VOCABULARY, wrong.sum())] = 3.0

    def repair(self, grammars: BlockGrammars) -> RepairedDrafts:
        return grammars.repair(self.reqs, [0, 1], CandidatesCopy(self.candidates), VOCABULARY)

    def best(self, numbers: Sequence[int]) -> np.ndarray:
        return self.scores.argmax(axis=2)[list(numbers)]

    def emitted(self, masks: torch.Tensor) -> list[list[int]]:
        rows = (slice(slot * self.width, (slot + 1) * self.width) for slot in (0, 1))
        return [judged(self.drafts[slot], self.scores[slot], masks[own], END) for slot, own in enumerate(rows)]


def block_grammars(seconds: float = float("inf")) -> BlockGrammars:
    metrics = GrammarMetrics(log_interval=100, model_name=None)
    return BlockGrammars(DraftMode.REPAIR, WIDTH, "cpu", TOKENIZER, metrics, seconds)


def test_a_slow_grammar_is_asked_for_masks_that_matter(backend: BaseGrammarBackend) -> None:
    """What verification emits stays; llguidance's masks cannot be told from its answers, so all of them are filled."""
    world, grammars = Judged(backend), block_grammars(60.0)
    repaired = world.repair(grammars)
    for walk in repaired.blocks:
        assert walk is not None
        for _ in range(NUM_SLOW_BLOCKS):
            grammars._filler._slow.add(walk.cursor.key or 0)
    few = grammars.masks(repaired, {0, 1}, world.best)
    assert few.limits == [WIDTH - 1] * 2
    num_filled, num_all = (int((masks != -1).any(dim=1).sum()) for masks in (few.mask.vocab_mask, world.masks))
    assert 0 < num_filled < num_all / 2 if isinstance(backend, XGrammarGrammarBackend) else num_filled == num_all
    assert world.emitted(few.mask.vocab_mask) == world.emitted(world.masks)


@pytest.mark.parametrize("skippable", [{0, 1}, {1}, set()])
def test_without_time_a_block_ends_at_its_first_mask(backend: BaseGrammarBackend, skippable: set[int]) -> None:
    """Unless its best tokens can be known: those tell which masks are needed, and a grammar is slow from then on."""
    world, grammars = Judged(backend), block_grammars(0.0)
    slow = skippable if isinstance(backend, XGrammarGrammarBackend) else set()
    for _ in range(NUM_SLOW_BLOCKS + 1):
        cut = grammars.masks(world.repair(grammars), skippable, world.best)
        emitted = world.emitted(cut.mask.vocab_mask)
        for number, whole in enumerate(world.emitted(world.masks)):
            assert number in slow or cut.limits[number] == 0
            length = cut.limits[number] + 1
            assert emitted[number][:length] == whole[:length]
    assert len(grammars._filler._slow) == len(slow)


def test_an_interrupted_block_knows_its_rows() -> None:
    """XGrammar ends between two rows; one is filled in any case."""
    backend = XGrammarGrammarBackend(TOKENIZER, vocab_size=VOCABULARY, model_eos_token_ids=[END])
    grammar = backend.dispatch_regex("a{40}")
    block = block_of([ENCODE("a")[0]] * (WIDTH - 1))
    wanted = allowed_by_sglang(grammar, block[1:].tolist())
    for limit in (0.0, 1e-9, 1e-5, 1e-4, 60.0):
        masks = torch.full((WIDTH, VOCABULARY // 32), -1, dtype=torch.int32)
        num_rows = cursor_of(grammar, TEXT, scratch()).fill_block(block, masks, limit)
        assert 1 <= num_rows <= WIDTH
        assert limit not in (0.0, 60.0) or num_rows == (1 if limit == 0.0 else WIDTH)
        assert torch.equal(masks[:num_rows], wanted[:num_rows])
