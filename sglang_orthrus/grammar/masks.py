"""Fills the masks of a round's blocks, in parallel and within its time.

Letters: R constrained requests, Q verify width of the round, W words of a mask row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

import torch

from sglang_orthrus.grammar.cursor import Cursor, Ids, Match, allow_only
from sglang_orthrus.grammar.llguidance import GuidanceCursor, fill_blocks
from sglang_orthrus.grammar.mask_buffers import HostBlocks, Slot
from sglang_orthrus.grammar.repair import Repair
from sglang_orthrus.grammar.slow_masks import SlowGrammars, TimeShares
from sglang_orthrus.grammar.threads import Job, ThreadTeam

# Masks that are needed get so much time in any case; few are.
MIN_NEEDED_SECONDS = 0.01

# For some requests, by their numbers among the constrained ones: [n, Q].
BestOf = Callable[[Sequence[int]], Ids]


class ConstrainedBlock(NamedTuple):
    """A grammar along a block: its cursor, at the committed text, and what became of the drafts."""

    cursor: Cursor
    repair: Repair


class Filled(NamedTuple):
    """What was filled.

    Attributes:
        limits: [R] the most drafts that may be accepted of each block: behind them its masks are missing.
        num_sparse: blocks that have no masks but those that were needed.
        seconds: that it took.
    """

    limits: list[int]
    num_sparse: int
    seconds: float


class _Block(NamedTuple):
    """How a block was filled: its leading rows, the time it was given, and the processor time that it took."""

    num_rows: int
    limit: float
    processor_seconds: float


class MaskFiller:
    """Some engines' masks take tens of milliseconds in some positions.

    So the masks of a round are filled for no longer than its time, but at least one of each block, and a block ends at
    the last one. And a grammar that is slow is asked for no mask that makes no difference, if that can be known.

    Args:
        seconds: the time of a round.
        team: fills masks side by side: engines do it outside the interpreter's lock.
    """

    def __init__(self, seconds: float, team: ThreadTeam) -> None:
        self._seconds = seconds
        self._slow = SlowGrammars()
        self._team = team

    def fill(
        self,
        host: HostBlocks,
        blocks: Sequence[ConstrainedBlock | None],
        skippable: Collection[int],
        best_of: BestOf,
    ) -> Filled:
        """Fill the masks of a round's blocks.

        Args:
            host: the blocks, and room for their masks.
            blocks: [R], None where a grammar does not constrain the block.
            skippable: numbers of the requests where skipping a mask cannot change any visible output.
            best_of: waits for verification and gives the best token after every row of some of their blocks, any token
                allowed.
        """
        self._slow.begin_round()
        started = time.perf_counter()
        keys = {
            number: block.cursor.key
            for number, block in enumerate(blocks)
            if block is not None and block.cursor.key is not None and number in skippable
        }
        sparse = {number for number, key in keys.items() if key in self._slow}
        num_drafts = host.width - 1
        limits = [num_drafts] * len(blocks)
        for number, block in self._fill_blocks(host, blocks, sparse).items():
            is_cut = block.num_rows < host.width
            if number not in keys:
                limits[number] = block.num_rows - 1
                continue
            # The clock ends a block that waited for a processor, too.
            if (is_cut and block.processor_seconds >= block.limit / 2) or block.processor_seconds >= self._seconds:
                self._slow.add(keys[number])
            if is_cut:
                sparse.add(number)
        seconds = time.perf_counter() - started
        if sparse:
            numbers = sorted(sparse)
            best = best_of(numbers)
            started = time.perf_counter()
            shares = TimeShares(max(self._seconds - seconds, MIN_NEEDED_SECONDS), len(numbers), self._team.size)
            self._team.run(
                [
                    partial(_fill_where_refused, host.slots[number], blocks[number], number, own, shares, limits)
                    for number, own in zip(numbers, best, strict=True)
                ]
            )
            seconds += time.perf_counter() - started
        return Filled(limits, sum(limits[number] == num_drafts for number in sparse), seconds)

    def _fill_blocks(
        self, host: HostBlocks, blocks: Sequence[ConstrainedBlock | None], but: Collection[int]
    ) -> dict[int, _Block]:
        """Fill the masks of all blocks but some, side by side if there are several."""
        filled = dict[int, _Block]()
        wanted = [(number, block) for number, block in enumerate(blocks) if block is not None and number not in but]
        guided = [
            (number, block.cursor, block.repair.match)
            for number, block in wanted
            if isinstance(block.cursor, GuidanceCursor)
        ]
        others = [(number, block) for number, block in wanted if not isinstance(block.cursor, GuidanceCursor)]
        shares = TimeShares(self._seconds, len(others) + bool(guided), self._team.size)
        # The longest first, so that the threads end together.
        others.sort(key=lambda one: one[1].repair.match.length, reverse=True)
        fills: list[Job] = [
            partial(_fill, host.slots[number], block, number, shares, filled) for number, block in others
        ]
        if guided:
            fills.append(partial(_fill_guided, host, guided, shares, filled))
        self._team.run(fills)
        return filled


def _fill(slot: Slot, block: ConstrainedBlock, number: int, shares: TimeShares, filled: dict[int, _Block]) -> None:
    limit = shares.take()
    started = time.thread_time()
    num_rows = block.cursor.fill_block(slot.block, slot.masks, limit)
    filled[number] = _Block(num_rows, limit, time.thread_time() - started)
    _close_end(slot, block.repair.match)


def _fill_where_refused(
    slot: Slot, block: ConstrainedBlock | None, number: int, best: Ids, shares: TimeShares, limits: list[int]
) -> None:
    assert block is not None, "a block without a grammar is not slow"
    slot.allow_all()
    num_touched, num_right = fill_where_refused(block.cursor, slot.drafts, best, slot.masks, shares.take())
    slot.are_filled[:num_touched] = True
    limits[number] = num_right - 1
    _close_end(slot, block.repair.match)


def _fill_guided(
    host: HostBlocks,
    guided: Sequence[tuple[int, GuidanceCursor, Match]],
    shares: TimeShares,
    filled: dict[int, _Block],
) -> None:
    cursors, limit = [(number, cursor) for number, cursor, _ in guided], shares.take()
    started = time.thread_time()
    num_rows = fill_blocks(cursors, host.ids, host.masks, limit)
    block = _Block(num_rows, limit, time.thread_time() - started)
    for number, _, match in guided:
        filled[number] = block
        _close_end(host.slots[number], match)


def _close_end(slot: Slot, match: Match) -> None:
    """Behind a stop token allow only the same again.

    SGLang brings grammars to the end of a round's run, and llguidance fails on whatever follows a stop token but on
    another one.
    """
    if match.ended:
        allow_only(slot.drafts.item(match.length - 1), slot.bits[match.length])
        slot.are_filled[match.length] = True


def fill_where_refused(
    cursor: Cursor, drafts: Ids, best: Ids, masks: torch.Tensor, limit: float = float("inf")
) -> tuple[int, int]:
    """Fill only the masks that change what verification makes of a block, given what it would choose without any.

    A chosen token that the grammar allows is chosen with its mask, too. So a mask is needed where the grammar refuses
    the choice, and none behind the first row where verification stops.

    Args:
        cursor: at the committed text, of a grammar that has a `key`; it is there again afterwards.
        drafts: [Q-1] that were verified.
        best: [Q] the best token after each row of the block, any token allowed.
        masks: [Q, W] int32 on the CPU, allowing all.
        limit: see `Cursor.fill_block`.

    Returns:
        How many leading rows may have been written to, and how many hold what is needed: Q if all do.
    """
    end = time.perf_counter() + limit
    row = moved = 0
    num_right = len(best)
    for row, token in enumerate(best.tolist()):
        if row and time.perf_counter() >= end:
            num_right = row
            break
        draft = drafts.item(row) if row < len(drafts) else None
        match = cursor.advance([token])
        if match.length and token != draft:  # the last token of the round
            cursor.rollback(match.num_moved)
            break
        if not match.length:
            cursor.fill(masks[row : row + 1])
            if draft is None or draft == token:
                break
            match = cursor.advance([draft])
        moved += match.num_moved
        if not match.num_moved:
            break
    cursor.rollback(moved)
    return row + 1, num_right
