"""The grammars of a batch: repair the drafts of its constrained requests before verify, and fill their masks during it.

Letters: R constrained requests of a batch of bs, Q verify width of the round, K candidates per position, W words of a
mask row.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask, GrammarRow

from sglang_orthrus.compat.ledger import SHARED_BY_WORKERS, depends_on
from sglang_orthrus.config import DraftMode
from sglang_orthrus.core import rows_index
from sglang_orthrus.grammar.cursor import Cursor, Ids
from sglang_orthrus.grammar.cursors import cursor_of, is_walkable
from sglang_orthrus.grammar.llguidance import GuidanceCursor
from sglang_orthrus.grammar.mask_buffers import BlockBuffers, HostBlocks, Slot
from sglang_orthrus.grammar.masks import BestOf, ConstrainedBlock, MaskFiller
from sglang_orthrus.grammar.next_masks import (
    LateMask,
    Likeliest,
    NextMaskFiller,
    NextRow,
    StartedMasks,
    allowed_instead,
    fill_refused,
)
from sglang_orthrus.grammar.reasoning import leaves_block_alone
from sglang_orthrus.grammar.repair import MAX_REPAIRS, repair_drafts
from sglang_orthrus.grammar.slow_masks import Deadline
from sglang_orthrus.grammar.threads import ThreadTeam, available_cores
from sglang_orthrus.grammar.token_text import TokenText
from sglang_orthrus.metrics import GrammarMetrics

# What a grammar allows may lie deep in a distribution, as white space does where the model wants none. On the schemas
# of tests/data with white space anywhere, 16 candidates give a tenth fewer tokens per cycle
# (docs/structured_measured.md).
NUM_CANDIDATES = 64
# A grammar may change drafts for so long, in processor time; common ones take a tenth of that.
MIN_REPAIR_SECONDS = 0.005
# And what it forces is looked for this long before a round, per request. Mostly it takes some ten microseconds.
MAX_FORCED_SECONDS = 0.0005
# On 16 cores the masks of 32 requests take 1.4 to 1.6 ms with 8, 12 or 16 threads, and 2.1 or 2.2 with 12 or 16 on a
# slower host (XGrammar, docs/log.md). Some cores are left to the rest of the server.
MAX_THREADS = 12


class RepairedDrafts(NamedTuple):
    """The drafts of a round's constrained requests, whose masks are to be filled.

    Attributes:
        rows: the requests' rows in the batch, to index tensors on the model's device with.
        tokens: [R, Q-1] int64, on the model's device. Chosen by a rule, whatever their probability: for rejection
            sampling the proposal puts all its weight on each.
        host: the same on the host, and room for their masks.
        blocks: [R], None where a grammar does not constrain the block.
        any_grammar: the object that applies the masks of all.
        seconds: that the repair took.
    """

    rows: torch.Tensor | slice
    tokens: torch.Tensor
    host: HostBlocks
    blocks: list[ConstrainedBlock | None]
    any_grammar: Any
    seconds: float


class BlockMasks(NamedTuple):
    """What may follow the tokens of the repaired blocks.

    Attributes:
        mask: [R * Q, W], on the model's device.
        limits: [R] the most drafts that may be accepted of each block: behind them its masks are missing.
    """

    mask: GrammarMask
    limits: list[int]


class BegunMasks(NamedTuple):
    """What may follow committed texts, while helpers still fill some of it.

    Attributes:
        any_grammar: the object that applies the masks of all.
        host: [R, W], on the CPU.
        numbers: [n] requests that have a mask, by their numbers: texts of others are at their end.
        started: theirs.
    """

    any_grammar: Any
    host: torch.Tensor
    numbers: list[int]
    started: StartedMasks


class NextMasks(NamedTuple):
    """What may follow committed texts.

    Attributes:
        mask: [R, W], on the model's device.
        host: the same on the CPU.
        late: requests, by their numbers, whose masks allow all so far; see `BlockGrammars.late_masks`.
    """

    mask: GrammarMask
    host: torch.Tensor
    late: dict[int, LateMask]


class CandidatesCopy:
    """Candidates of the constrained requests on their way to the host: [R, Q-1, K] int64. Started before verify."""

    def __init__(self, candidates: torch.Tensor) -> None:
        self._done: Any = None
        if candidates.device.type == "cpu":
            self._host = candidates
            return
        self._host = torch.empty(candidates.shape, dtype=candidates.dtype, pin_memory=True)
        self._host.copy_(candidates, non_blocking=True)
        self._done = torch.get_device_module(candidates.device).Event()
        self._done.record()

    @property
    def width(self) -> int:
        """Q."""
        return self._host.shape[1] + 1

    def wait(self) -> Ids:
        """The candidates, once the draft pass has run."""
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy()


class BlockGrammars:
    """Drafts of all constrained requests, and their masks, in parallel, in one buffer.

    Rounds may be of any width: that of their candidates. For a round that drafts nothing there is `next_masks`.

    Args:
        mode: see `DraftMode`.
        max_width: the largest Q of any round.
        device: of the model.
        tokenizer: of the model, Hugging Face's.
        metrics: told of every round.
        slow_seconds: see `slow_mask_seconds`.
    """

    def __init__(
        self,
        mode: DraftMode,
        max_width: int,
        device: str | torch.device,
        tokenizer: Any,
        metrics: GrammarMetrics,
        slow_seconds: float = float("inf"),
    ) -> None:
        self._max_repairs = MAX_REPAIRS if mode is DraftMode.REPAIR else 0
        self._device = device
        self.text = TokenText(tokenizer)
        self._metrics = metrics
        self._slow_seconds = slow_seconds
        self._buffers = BlockBuffers(max_width, device)
        team = ThreadTeam(min(MAX_THREADS, available_cores()), "orthrus-grammar")
        self._filler = MaskFiller(slow_seconds, team)
        self._next_filler = NextMaskFiller(slow_seconds, team, watches_new=torch.device(device).type != "cpu")
        self._scratch: torch.Tensor | None = None

    @property
    def num_candidates(self) -> int:
        """How many candidates per position a repair needs; the first is the draft."""
        return NUM_CANDIDATES if self._max_repairs else 1

    def rows_of(self, reqs: Sequence[Any]) -> list[int]:
        """Rows of the requests whose grammars matter in this round."""
        return [row for row, req in enumerate(reqs) if req.grammar is not None and not req.finished()]

    def num_forced(self, reqs: Sequence[Any], vocab_size: int, most: int) -> list[int]:
        """How many tokens will be drafted because a grammar forces them, of each request.

        They are those that come next, behind the text that the grammar has seen.

        Args:
            reqs: a batch.
            vocab_size: of the logits.
            most: tokens that are looked for.
        """
        found = [0] * len(reqs)
        if not self._max_repairs:
            return found
        num_words = -(-vocab_size // 32)
        if self._scratch is None or self._scratch.shape[1] != num_words:
            self._scratch = torch.empty(1, num_words, dtype=torch.int32)
        for row in self.rows_of(reqs):
            if is_walkable(grammar := reqs[row].grammar):
                cursor = cursor_of(grammar, self.text, self._scratch)
                found[row] = len(cursor.forced(most, Deadline(MAX_FORCED_SECONDS)))
        return found

    def repair(
        self, reqs: Sequence[Any], rows: Sequence[int], candidates: CandidatesCopy, vocab_size: int
    ) -> RepairedDrafts:
        """Repair the drafts of every constrained request, whose grammars are at the committed text.

        Host work, while a GPU still drafts. The same buffers serve every round: the former round's copies out of them
        are done once this round's candidates are here, since the stream that drafts has waited for them.

        Args:
            reqs: the batch.
            rows: its constrained requests, at least one.
            candidates: theirs; the first is the draft.
            vocab_size: of the logits.
        """
        self._next_filler.drop()
        grammars = [reqs[row].grammar for row in rows]
        host = self._buffers.take(len(rows), candidates.width, grammars[0], vocab_size)
        cursors = [self._cursor(slot, grammar) for slot, grammar in zip(host.slots, grammars, strict=True)]
        index, room = rows_index(rows, self._device), self._buffers.room_on_device(host)
        ids = candidates.wait()
        started = time.perf_counter()
        host.set_drafts(ids[:, :, 0])
        # One by one: short calls, most of them under the interpreter's lock.
        seconds = max(MIN_REPAIR_SECONDS, self._slow_seconds / len(rows))
        blocks = [self._repair(*own, seconds) for own in zip(host.slots, grammars, cursors, ids, strict=True)]
        tokens = self._buffers.drafts_on_device(host, room)
        return RepairedDrafts(index, tokens, host, blocks, grammars[0], time.perf_counter() - started)

    def masks(
        self, drafts: RepairedDrafts, skippable: Collection[int] = (), best_of: BestOf | None = None
    ) -> BlockMasks:
        """What may follow each token of the blocks. Host work, while a GPU verifies.

        Args:
            drafts: of this round.
            skippable: see `MaskFiller.fill`.
            best_of: see there; not needed if none is skippable.
        """
        filled = self._filler.fill(drafts.host, drafts.blocks, skippable, best_of or _nothing_skippable)
        changes = [block.repair.changes for block in drafts.blocks if block is not None]
        num_cut = sum(limit < drafts.tokens.shape[1] for limit in filled.limits)
        self._metrics.count(changes, drafts.seconds, filled.seconds, filled.num_sparse, num_cut)
        masks = self._buffers.masks_on_device(drafts.host)
        return BlockMasks(GrammarMask(drafts.any_grammar, masks), filled.limits)

    @depends_on(
        "sglang.srt.constrained.base_grammar_backend:BaseGrammarObject.fill_vocab_mask_batched",
        "entries",
        "vocab_mask",
        what="called where llguidance fills the masks of rounds that draft nothing, as SGLang does for a decode step",
        why="such a round is a decode step, and llguidance fills its masks in parallel",
        until=SHARED_BY_WORKERS,
    )
    def begin_next_masks(
        self, reqs: Sequence[Any], rows: Sequence[int], vocab_size: int, skippable: Collection[int] = ()
    ) -> BegunMasks:
        """What may follow the committed text of every constrained request: one row each.

        For rounds that draft nothing. Host work, while a GPU verifies. SGLang has XGrammar fill one mask after the
        other. Here several threads do it, some of them until `finish_next_masks` and longer. Grammars may go on
        meanwhile.

        Args:
            reqs: the batch.
            rows: its constrained requests, at least one.
            vocab_size: of the logits.
            skippable: see `MaskFiller.fill`.
        """
        grammars = [reqs[row].grammar for row in rows]
        masks = grammars[0].allocate_vocab_mask(vocab_size=vocab_size, batch_size=len(rows), device=self._device)
        entries = [
            GrammarRow(number, grammar) for number, grammar in enumerate(grammars) if not grammar.is_terminated()
        ]
        own = [masks[entry.row : entry.row + 1] for entry in entries]
        to_fill = [
            NextRow(cursor_of(entry.grammar, self.text, mask), mask) for entry, mask in zip(entries, own, strict=True)
        ]
        if any(isinstance(row.cursor, GuidanceCursor) for row in to_fill):
            grammars[0].fill_vocab_mask_batched(entries, masks)
            to_fill = []
        places = [place for place, entry in enumerate(entries) if entry.row in skippable] if to_fill else []
        started = self._next_filler.start(to_fill, places)
        return BegunMasks(grammars[0], masks, [entry.row for entry in entries], started)

    def finish_next_masks(self, begun: BegunMasks) -> NextMasks:
        """The masks, of which slow ones may be missing: see `late_masks`."""
        late = self._next_filler.finish(begun.started)
        by_request = {begun.numbers[place]: mask for place, mask in late.items()}
        self._metrics.count_next(len(begun.numbers), len(late))
        return NextMasks(self._on_device(begun.any_grammar, begun.host), begun.host, by_request)

    def late_masks(self, masks: NextMasks, chosen: Mapping[int, int]) -> GrammarMask | None:
        """The same masks with those that refuse what was chosen without them; None if they make no difference.

        chosen: the tokens of the requests in `masks.late`, by their numbers.
        """
        if not fill_refused(masks.late, chosen):
            return None
        return self._on_device(masks.mask.grammar, masks.host)

    def allowed_instead(
        self, masks: NextMasks, chosen: Mapping[int, int], likeliest: Likeliest
    ) -> dict[int, int] | None:
        """What is chosen instead of tokens that late masks refuse, see `next_masks.allowed_instead`."""
        return allowed_instead(masks.late, chosen, likeliest)

    def _on_device(self, grammar: Any, masks: torch.Tensor) -> GrammarMask:
        return GrammarMask(grammar, grammar.move_vocab_mask(masks, self._device))

    def _cursor(self, slot: Slot, grammar: Any) -> Cursor | None:
        # What a cursor writes to a mask here is filled anew later.
        return cursor_of(grammar, self.text, slot.masks) if is_walkable(grammar) else None

    def _repair(
        self, slot: Slot, grammar: Any, cursor: Cursor | None, candidates: Ids, seconds: float
    ) -> ConstrainedBlock | None:
        if cursor is None or leaves_block_alone(grammar, slot.drafts):
            slot.allow_all()
            return None
        repair = repair_drafts(cursor, slot.drafts, candidates, slot.masks, self._max_repairs, Deadline(seconds))
        if repair.tokens is not slot.drafts:
            slot.drafts[:] = repair.tokens
        slot.are_filled[:] = True
        return ConstrainedBlock(cursor, repair)


def _nothing_skippable(numbers: Sequence[int]) -> Ids:
    raise AssertionError(f"no best tokens of {numbers}")
