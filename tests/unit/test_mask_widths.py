"""Grammars of rounds whose width changes: the same drafts, masks and limits as if each round were the first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

from sglang_orthrus.config import DraftMode
from sglang_orthrus.grammar import next_masks
from sglang_orthrus.grammar.batch import BlockGrammars, CandidatesCopy, NextMasks, RepairedDrafts
from sglang_orthrus.grammar.cursors import cursor_of, is_walkable
from sglang_orthrus.grammar.mask_buffers import BlockBuffers
from sglang_orthrus.grammar.reasoning import leaves_block_alone
from sglang_orthrus.grammar.slow_masks import NUM_SLOW_BLOCKS
from sglang_orthrus.metrics import GrammarMetrics
from tests.unit import test_grammar_cursors as cursors
from tests.unit.test_grammar_cursors import (
    ENCODE,
    END,
    SCHEMA,
    TEXT,
    THINK_END,
    TOKENIZER,
    VOCABULARY,
    WIDTH,
    allowed_by_sglang,
    match_of,
    num_masks_of,
    reasoner,
    request,
    scratch,
)
from tests.unit.test_masks import Judged

backend = cursors.backend  # the fixture

WIDTHS = (8, 1, 32, 16, 1, 31, 2, 32, 1, 8)


def block_grammars(max_width: int = WIDTH, seconds: float = float("inf")) -> BlockGrammars:
    return BlockGrammars(
        DraftMode.REPAIR, max_width, "cpu", TOKENIZER, GrammarMetrics(log_interval=3, model_name=None), seconds
    )


def next_masks_of(grammars: BlockGrammars, *args: Any) -> NextMasks:
    """Begun and finished at once."""
    return grammars.finish_next_masks(grammars.begin_next_masks(*args))


class World:
    """Requests in several states of several grammars, whose slots change from round to round, and their drafts."""

    def __init__(self, backend: BaseGrammarBackend) -> None:
        ended = backend.dispatch_regex("a")
        for token in (*ENCODE("a"), END):
            ended.accept_token(token)
        grammars = (
            backend.dispatch_json(SCHEMA),
            reasoner(backend.dispatch_json(SCHEMA)),
            ended,
            backend.dispatch_regex("[a-c]{400}"),
            reasoner(backend.dispatch_regex("(yes|no)*")),
            None,
            backend.dispatch_regex("(yes|no), because [a-z]{3,400}"),
        )
        self.reqs = [request(grammar) for grammar in grammars]
        self._rng = np.random.default_rng(6)

    def turn(self) -> None:
        """Requests come to other slots."""
        self.reqs.append(self.reqs.pop(0))

    def candidates(self, rows: list[int], num_drafts: int) -> torch.Tensor:
        """For about half of the requests text that lies in some of the grammars, for others noise."""
        drafts = self._rng.integers(0, VOCABULARY, (len(rows), num_drafts, 16))
        letters = [ENCODE(letter)[0] for letter in "abc"]
        for own in drafts[::2]:
            own[:, 0] = self._rng.choice(letters, num_drafts)
        if num_drafts > 4:
            drafts[1, 3, 0] = THINK_END
        return torch.from_numpy(drafts)

    def commit(self, grammars: list[Any], repaired: RepairedDrafts, masks: torch.Tensor) -> None:
        """What a round might: up to two of the drafts, and a token that its mask allows."""
        width = repaired.host.width
        for slot, grammar in enumerate(grammars):
            if not is_walkable(grammar):
                continue
            drafts = repaired.tokens[slot].tolist()[:2]
            match = match_of(cursor_of(grammar, TEXT, scratch()), drafts)
            for token in drafts[: match.num_moved]:
                grammar.accept_token(token)
            bits = masks[slot * width + match.num_moved].numpy()
            allowed = [token for token in range(VOCABULARY) if bits[token >> 5] >> (token & 31) & 1 and token != END]
            if allowed:
                grammar.accept_token(allowed[int(self._rng.integers(len(allowed)))])


def check_masks(grammar: Any, drafts: list[int], masks: torch.Tensor) -> None:
    """Those that matter are SGLang's own; a block that no grammar constrains allows all."""
    if not is_walkable(grammar) or leaves_block_alone(grammar, np.array(drafts)):
        assert (masks == -1).all()
        return
    num_masks = num_masks_of(match_of(cursor_of(grammar, TEXT, scratch()), drafts))
    wanted = allowed_by_sglang(grammar, drafts)[:num_masks]
    assert torch.equal(masks[:num_masks], wanted)


def test_rounds_of_any_width_follow_one_another(backend: BaseGrammarBackend) -> None:
    world, kept = World(backend), block_grammars()
    for number, width in enumerate(WIDTHS):
        world.turn()
        reqs = world.reqs[number % 2 :]  # one is away in every other round
        rows = kept.rows_of(reqs)
        candidates = world.candidates(rows, width - 1)
        found = []
        for grammars in (kept, block_grammars(width)):
            repaired = grammars.repair(reqs, rows, CandidatesCopy(candidates), VOCABULARY)
            filled = grammars.masks(repaired)
            assert repaired.tokens.shape == (len(rows), width - 1)
            assert filled.mask.vocab_mask.shape == (len(rows) * width, VOCABULARY // 32)
            assert filled.limits == [width - 1] * len(rows)
            for slot, masks in enumerate(filled.mask.vocab_mask.split(width)):
                check_masks(reqs[rows[slot]].grammar, repaired.tokens[slot].tolist(), masks)
            if width == 1:
                assert torch.equal(next_masks_of(grammars, reqs, rows, VOCABULARY).host, filled.mask.vocab_mask)
            found.append((repaired, filled.mask.vocab_mask))
        (ours, masks), (fresh, _) = found
        assert torch.equal(ours.tokens, fresh.tokens)
        for own, other in zip(ours.blocks, fresh.blocks, strict=True):
            assert (own is None) == (other is None)
            if own is not None and other is not None:
                assert own.repair.match == other.repair.match
                assert own.repair.changes.tolist() == other.repair.changes.tolist()
        world.commit([reqs[row].grammar for row in rows], ours, masks)


@pytest.mark.parametrize("alone", [0.0, 60.0], ids=["several threads", "one thread"])
def test_masks_of_rounds_that_draft_nothing_are_sglangs(
    backend: BaseGrammarBackend, alone: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_masks, "ALONE_SECONDS", alone)
    world, grammars = World(backend), block_grammars()
    for _ in range(12):
        world.turn()
        rows = grammars.rows_of(world.reqs)
        found = next_masks_of(grammars, world.reqs, rows, VOCABULARY).mask.vocab_mask
        for row, mask in zip(rows, found, strict=True):
            grammar = world.reqs[row].grammar
            wanted = torch.full((1, VOCABULARY // 32), -1, dtype=torch.int32)
            if not grammar.is_terminated():
                grammar.fill_vocab_mask(wanted, 0)
            assert torch.equal(mask, wanted[0])


@pytest.mark.parametrize("seconds", [60.0, 0.0], ids=["few masks", "no time"])
@pytest.mark.parametrize("skippable", [{0, 1}, {1}, set()], ids=str)
def test_slow_grammars_in_rounds_of_any_width(backend: BaseGrammarBackend, seconds: float, skippable: set[int]) -> None:
    """What verification emits stays, up to the limit of a block that is cut; a mask per request is always filled."""
    kept = block_grammars(seconds=seconds)
    for width in WIDTHS:
        world = Judged(backend, width)
        repaired = world.repair(kept)
        for block in repaired.blocks:
            assert block is not None
            for _ in range(NUM_SLOW_BLOCKS if seconds else 0):
                kept._filler._slow.add(block.cursor.key or 0)
        cut = kept.masks(repaired, skippable, world.best)
        is_xgrammar = isinstance(backend, XGrammarGrammarBackend)
        knows = skippable if is_xgrammar else set()
        for number, (ours, whole) in enumerate(
            zip(world.emitted(cut.mask.vocab_mask), world.emitted(world.masks), strict=True)
        ):
            assert cut.limits[number] <= width - 1
            assert seconds == 0 or cut.limits[number] == width - 1
            if seconds == 0 and number not in knows:
                # llguidance fills two rows to know how long one takes.
                assert cut.limits[number] == (0 if is_xgrammar or width != 2 else 1)
            length = cut.limits[number] + 1
            assert ours[:length] == whole[:length]


def test_a_narrow_round_leaves_room_for_the_widest(backend: BaseGrammarBackend) -> None:
    """No round but the first makes buffers, unless it has more requests."""
    grammar, buffers = backend.dispatch_regex("a"), BlockBuffers(WIDTH, "cpu")
    first = buffers.take(3, 1, grammar, VOCABULARY)
    for width in range(1, WIDTH + 1):
        taken = buffers.take(3, width, grammar, VOCABULARY)
        assert taken.width == width and len(taken.slots) == 3
        assert taken.masks.data_ptr() == first.masks.data_ptr() and taken.ids.data_ptr() == first.ids.data_ptr()
        for number, slot in enumerate(taken.slots):
            assert slot.masks.data_ptr() == taken.masks[number * width].data_ptr()
            assert slot.block.shape == (width,) and slot.drafts.shape == (width - 1,)
    assert buffers.take(4, 1, grammar, VOCABULARY).masks.data_ptr() != first.masks.data_ptr()
    for width in (0, WIDTH + 1):
        with pytest.raises(AssertionError, match=f"a block of {width}, where {WIDTH} is the largest"):
            buffers.take(1, width, grammar, VOCABULARY)


def test_rows_of_another_width_are_wiped(backend: BaseGrammarBackend) -> None:
    """A row that one width filled allows all in a block of another width that wants no masks."""
    grammar, buffers = backend.dispatch_regex("a"), BlockBuffers(WIDTH, "cpu")
    for filled in WIDTHS:
        for wiped in WIDTHS:
            for slot in buffers.take(3, filled, grammar, VOCABULARY).slots:
                slot.bits[:] = 7
                slot.are_filled[:] = True
            taken = buffers.take(3, wiped, grammar, VOCABULARY)
            taken.slots[1].allow_all()
            first, own, last = taken.masks.split(wiped)
            assert (own == -1).all()
            assert wiped > filled or bool((first == 7).all() and (last == 7).all())
