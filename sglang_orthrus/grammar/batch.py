"""The grammars of a batch: choose the drafts of its constrained rows before verify, and their masks during it.

Letters: R constrained requests of a batch of bs, Q verify width, K candidates per position, W words of a mask row.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask

from sglang_orthrus.config import DraftMode
from sglang_orthrus.grammar.cursors import cursor_of, is_walkable, leaves_block_alone
from sglang_orthrus.grammar.mask_buffers import BlockBuffers, Slot
from sglang_orthrus.grammar.masks import BestOf, MaskFiller, Walk
from sglang_orthrus.grammar.repair import Cursor, Ids, choose
from sglang_orthrus.grammar.slow_masks import Deadline
from sglang_orthrus.grammar.token_text import TokenText
from sglang_orthrus.grammar_stats import GrammarStats
from sglang_orthrus.sampling.request_groups import rows_index

# What a grammar allows may lie deep in a distribution, as white space does where the model wants none. On the schemas
# of tests/data with white space anywhere, 16 candidates give a tenth fewer tokens per cycle (docs/structured.md).
NUM_CANDIDATES = 64
# A grammar may change drafts for so long, in processor time; common ones take a tenth of that.
MIN_WALK_SECONDS = 0.005


class Chosen(NamedTuple):
    """The drafts of the constrained requests of a round, whose masks are to be filled.

    Attributes:
        rows: the requests' places in the batch, to index tensors on the model's device with.
        drafts: [R, Q-1] int64, on the model's device. Chosen by a rule, whatever their probability: for rejection
            sampling the proposal puts all its weight on each.
        walks: [R], None where a grammar has nothing to say about the block.
        any_grammar: the object that applies the masks of all.
        seconds: that the choice took.
    """

    rows: torch.Tensor | slice
    drafts: torch.Tensor
    walks: list[Walk | None]
    any_grammar: Any
    seconds: float


class BlockMasks(NamedTuple):
    """What may follow the tokens of the chosen blocks.

    Attributes:
        mask: [R * Q, W], on the model's device.
        limits: [R] the most drafts that may be accepted of each block: behind them its masks are missing.
    """

    mask: GrammarMask
    limits: list[int]


class Proposal:
    """Candidates of the constrained rows on their way to the host: [R, Q-1, K] int64. Started before verify."""

    def __init__(self, candidates: torch.Tensor) -> None:
        self._done: Any = None
        if candidates.device.type == "cpu":
            self._host = candidates
            return
        self._host = torch.empty(candidates.shape, dtype=candidates.dtype, pin_memory=True)
        self._host.copy_(candidates, non_blocking=True)
        self._done = torch.get_device_module(candidates.device).Event()
        self._done.record()

    def wait(self) -> Ids:
        """The candidates, once the draft pass has run."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy()


class BlockGrammars:
    """Drafts of all constrained requests, and their masks, in parallel, in one buffer.

    Args:
        mode: see `DraftMode`.
        verify_width: Q.
        device: of the model.
        tokenizer: of the model, Hugging Face's.
        stats: told of every round.
        slow_seconds: see `slow_mask_seconds`.
    """

    def __init__(
        self,
        mode: DraftMode,
        verify_width: int,
        device: str | torch.device,
        tokenizer: Any,
        stats: GrammarStats,
        slow_seconds: float = float("inf"),
    ) -> None:
        self._mode = mode
        self._device = device
        self.text = TokenText(tokenizer)
        self._stats = stats
        self._slow_seconds = slow_seconds
        self._buffers = BlockBuffers(verify_width, device)
        self._filler = MaskFiller(self._buffers, verify_width, slow_seconds)

    @property
    def changes_drafts(self) -> bool:
        """Whether drafts have to wait for the grammars before they are verified."""
        return self._mode is not DraftMode.OFF

    @property
    def num_candidates(self) -> int:
        """How many candidates per position are needed to choose."""
        return NUM_CANDIDATES if self.changes_drafts else 1

    def rows_of(self, reqs: Sequence[Any]) -> list[int]:
        """Places of the requests whose grammars matter in this round."""
        return [row for row, req in enumerate(reqs) if req.grammar is not None and not req.finished()]

    def choose(
        self,
        reqs: Sequence[Any],
        rows: Sequence[int],
        proposal: Proposal,
        vocab_size: int,
    ) -> Chosen:
        """Choose the drafts of every constrained request, whose grammars are at the committed text.

        Host work, while a GPU still drafts. The same buffers serve every round: the former round's copies out of them
        are done once this round's candidates are here, since the stream that drafts has waited for them.

        Args:
            reqs: the batch.
            rows: its constrained requests, at least one.
            proposal: their candidates; the first is the draft.
            vocab_size: of the logits.
        """
        grammars = [reqs[row].grammar for row in rows]
        slots = self._buffers.take(len(rows), grammars[0], vocab_size)
        cursors = [self._cursor(slot, grammar) for slot, grammar in zip(slots, grammars, strict=True)]
        index, room = rows_index(rows, self._device), self._buffers.room_on_device(len(rows))
        candidates = proposal.wait()
        started = time.perf_counter()
        self._buffers.set_drafts(candidates[:, :, 0])
        # One by one: short calls, most of them under the interpreter's lock.
        seconds = max(MIN_WALK_SECONDS, self._slow_seconds / len(rows))
        walks = [self._choose(*own, seconds) for own in zip(slots, grammars, cursors, candidates, strict=True)]
        drafts = self._buffers.drafts_on_device(room)
        return Chosen(index, drafts, walks, grammars[0], time.perf_counter() - started)

    def masks(self, chosen: Chosen, foreseeable: Collection[int] = (), best_of: BestOf | None = None) -> BlockMasks:
        """What may follow each token of the chosen blocks. Host work, while a GPU verifies.

        Args:
            foreseeable: numbers, in R, of the requests whose best tokens can be known.
            best_of: see `MaskFiller.fill`; not needed if there are none.
        """
        filled = self._filler.fill(chosen.walks, foreseeable, best_of or _nothing_foreseen)
        choices = [walk.choice for walk in chosen.walks if walk is not None]
        num_cut = sum(limit < chosen.drafts.shape[1] for limit in filled.limits)
        self._stats.count(choices, chosen.seconds, filled.seconds, filled.num_sparse, num_cut)
        masks = self._buffers.masks_on_device(len(chosen.walks))
        return BlockMasks(GrammarMask(chosen.any_grammar, masks), filled.limits)

    def _cursor(self, slot: Slot, grammar: Any) -> Cursor | None:
        # What a cursor writes to a mask here is filled anew later.
        return cursor_of(grammar, self.text, slot.masks) if is_walkable(grammar) else None

    def _choose(self, slot: Slot, grammar: Any, cursor: Cursor | None, candidates: Ids, seconds: float) -> Walk | None:
        if cursor is None or leaves_block_alone(grammar, slot.drafts):
            slot.allow_all()
            return None
        choice = choose(cursor, slot.drafts, candidates, slot.masks, self._mode, Deadline(seconds))
        if choice.tokens is not slot.drafts:
            slot.drafts[:] = choice.tokens
        slot.num_filled = len(slot.bits)
        return Walk(cursor, choice)


def _nothing_foreseen(numbers: Sequence[int]) -> Ids:
    raise AssertionError(f"no best tokens of {numbers}")
