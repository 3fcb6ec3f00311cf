"""The grammars of a batch: choose the drafts of its constrained rows before verify, and fill their masks during it.

Letters: R constrained requests of a batch of bs, Q verify width, K candidates per position, W words of a mask row.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask

from sglang_orthrus.block_buffers import BlockBuffers, Slot
from sglang_orthrus.crew import Crew, Job
from sglang_orthrus.grammar import Choice, Cursor, Ids, Reach, allow_only, choose, fill_where_refused
from sglang_orthrus.grammar_cursors import (
    Encode,
    GuidanceCursor,
    cursor_of,
    fill_blocks,
    is_walkable,
    leaves_block_alone,
)
from sglang_orthrus.grammar_stats import GrammarStats
from sglang_orthrus.rows import rows_index
from sglang_orthrus.settings import DraftMode

# What a grammar allows may lie deep in a distribution, as white space does where the model wants none. On the schemas
# of tests/data with white space anywhere, 16 candidates give a tenth fewer tokens per cycle (docs/structured.md).
NUM_CANDIDATES = 64
# On 16 cores the masks of 32 requests take 1.4 to 1.6 ms with 8, 12 or 16 threads, and 2.1 or 2.2 with 12 or 16 on a
# slower host (XGrammar, docs/log.md). Some cores are left to the rest of the server.
MAX_THREADS = 12


class Walk(NamedTuple):
    """A grammar along a block: its cursor, at the committed text, and what became of the drafts."""

    cursor: Cursor
    choice: Choice


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
        self.encode = encoder(tokenizer)
        self._stats = stats
        self._slow_seconds = slow_seconds
        # Keys of grammars whose blocks took that long to fill. SGLang keeps these strings, too, with what it compiled.
        self._slow_keys: set[str] = set()
        # The engines fill masks outside the interpreter's lock.
        self._crew = Crew(min(MAX_THREADS, len(os.sched_getaffinity(0))), "orthrus-grammar")
        self._buffers = BlockBuffers(verify_width, device)

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
        walks = list(map(self._choose, slots, grammars, cursors, candidates))
        drafts = self._buffers.drafts_on_device(room)
        return Chosen(index, drafts, walks, grammars[0], time.perf_counter() - started)

    def masks(self, chosen: Chosen, best_of: Callable[[], Ids] | None = None) -> GrammarMask:
        """What may follow each token of the chosen blocks: [R * Q, W], on the model's device.

        Host work, while a GPU verifies. Some engines' masks take tens of milliseconds in some places, so a grammar that
        is slow, or was so once, is asked for no mask that makes no difference, if that can be known.

        best_of: waits for verification and gives the best token after every row of the chosen blocks, any token
            allowed: [R, Q]. None if not all of them choose the best token.
        """
        started = time.perf_counter()
        slow = [] if best_of is None else self._slow_slots(chosen)
        self._crew.run(self._fills(chosen, slow, float("inf") if best_of is None else self._slow_seconds))
        seconds = time.perf_counter() - started
        if best_of is not None and slow:
            best = best_of()
            started = time.perf_counter()
            self._crew.run([partial(self._fill_where_refused, chosen, number, best[number]) for number in slow])
            seconds += time.perf_counter() - started
        choices = [walk.choice for walk in chosen.walks if walk is not None]
        self._stats.count(choices, chosen.seconds, seconds, len(slow))
        return GrammarMask(chosen.any_grammar, self._buffers.masks_on_device(len(chosen.walks)))

    def _cursor(self, slot: Slot, grammar: Any) -> Cursor | None:
        # What a cursor writes to a mask here is filled anew later.
        return cursor_of(grammar, self.encode, slot.masks) if is_walkable(grammar) else None

    def _choose(self, slot: Slot, grammar: Any, cursor: Cursor | None, candidates: Ids) -> Walk | None:
        if cursor is None or leaves_block_alone(grammar, slot.drafts):
            slot.allow_all()
            return None
        choice = choose(cursor, slot.drafts, candidates, slot.masks, self._mode)
        if choice.tokens is not slot.drafts:
            slot.drafts[:] = choice.tokens
        slot.num_filled = len(slot.bits)
        return Walk(cursor, choice)

    def _slow_slots(self, chosen: Chosen) -> list[int]:
        return [
            number
            for number, walk in enumerate(chosen.walks)
            if walk is not None and walk.cursor.key in self._slow_keys
        ]

    def _fills(self, chosen: Chosen, slow: list[int], limit: float) -> list[Job]:
        """What is to be done for the masks of all slots but the slow ones; side by side, if there are several.

        Slots that do not meet the limit join the slow ones.
        """
        fills = list[Job]()
        guided = list[tuple[int, GuidanceCursor, Reach]]()
        walks = [(number, walk) for number, walk in enumerate(chosen.walks) if walk is not None and number not in slow]
        # The longest first, so that the threads end together.
        for number, walk in sorted(walks, key=lambda one: one[1].choice.reach.length, reverse=True):
            if isinstance(walk.cursor, GuidanceCursor):
                guided.append((number, walk.cursor, walk.choice.reach))
            else:
                fills.append(partial(self._fill, number, walk, slow, limit))
        if guided:
            fills.append(partial(self._fill_guided, guided))
        return fills

    def _fill(self, number: int, walk: Walk, slow: list[int], limit: float) -> None:
        slot, cursor = self._buffers.slots[number], walk.cursor
        started = time.perf_counter()
        is_done = cursor.fill_block(slot.block, slot.masks, float("inf") if cursor.key is None else limit)
        if cursor.key is not None and time.perf_counter() - started >= self._slow_seconds:
            self._slow_keys.add(cursor.key)
        if is_done:
            _close_end(slot, walk.choice.reach)
        else:
            slow.append(number)

    def _fill_where_refused(self, chosen: Chosen, number: int, best: Ids) -> None:
        walk, slot = chosen.walks[number], self._buffers.slots[number]
        assert walk is not None, "a grammar with nothing to say is not slow"
        slot.allow_all()
        slot.num_filled = fill_where_refused(walk.cursor, slot.drafts, best, slot.masks)
        _close_end(slot, walk.choice.reach)

    def _fill_guided(self, guided: Sequence[tuple[int, GuidanceCursor, Reach]]) -> None:
        cursors = [(number, cursor) for number, cursor, _ in guided]
        fill_blocks(cursors, self._buffers.blocks, self._buffers.masks)
        for number, _, reach in guided:
            _close_end(self._buffers.slots[number], reach)


def _close_end(slot: Slot, reach: Reach) -> None:
    """Behind a stop token allow only the same again.

    SGLang brings grammars to the end of a round's run, and llguidance fails on whatever follows a stop token but on
    another one.
    """
    if reach.ended:
        allow_only(slot.drafts.item(reach.length - 1), slot.bits[reach.length])
        slot.num_filled = max(slot.num_filled, reach.length + 1)


def encoder(tokenizer: Any) -> Encode:
    """Text to ids without special tokens, remembered: grammars force the same strings over and over."""
    # Hugging Face's own `encode` sets options on the tokenizer first, which threads must not do at once.
    backend = getattr(tokenizer, "backend_tokenizer", None)

    @lru_cache(maxsize=65536)
    def encode(text: str) -> Sequence[int]:
        if backend is not None:
            return tuple(backend.encode(text, add_special_tokens=False).ids)
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    return encode
