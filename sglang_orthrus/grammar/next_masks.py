"""Fills the masks of rounds that draft nothing: one of each constrained request, what may come next.

Most masks take microseconds, some tens of milliseconds, and only their end tells which. So helpers fill the masks of
grammars that may have slow ones. What takes too long is not waited for: it goes on beside a choice without it.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from math import isfinite
from typing import NamedTuple

import torch

from sglang_orthrus.grammar.cursor import ALL_ALLOWED, Cursor
from sglang_orthrus.grammar.slow_masks import MAX_GRAMMARS, Deadline
from sglang_orthrus.grammar.threads import Job, StartedJobs, ThreadTeam
from sglang_orthrus.grammar.xgrammar import XGrammarCursor

# One mask of each request mostly takes microseconds, less than other threads take to wake up. After so long they are
# asked to help.
ALONE_SECONDS = 0.0003

# Of a round's time for masks. A mask that takes longer is slow.
SLOW_SHARE = 0.1
# A round waits so long for helpers, about as long as a GPU verifies.
WAIT_SHARE = 0.4
# Behind that, as long as one mask comes so soon after the other, none is slow: helpers need the interpreter's lock for
# each of them, which the scheduler has held until now.
PATIENCE_SECONDS = 0.001
# A grammar is watched until so many masks in a row were fast.
NUM_WATCHED = 1024
# So many helpers at a time; one that has a slow mask is away for some rounds.
MAX_HELPERS = 4
# A watched grammar is copied at every mask, which takes 10 us, and 20 ns more for each token of its text (XGrammar).
# All copies of a round take about so much processor time at most.
COPY_SECONDS = 0.003
# Where a late mask refuses what was chosen, so many tokens are asked for before the mask is waited for.
NUM_LIKELIEST = 64

# Of some requests, by their numbers: the logits of so many likeliest tokens, the largest first, and these tokens.
Likeliest = Callable[[Sequence[int], int], Mapping[int, tuple[Sequence[float], Sequence[int]]]]


class NextRow(NamedTuple):
    """Where a mask is to be filled: a cursor, and the mask of what may come next, [1, W] int32 on the CPU."""

    cursor: Cursor
    mask: torch.Tensor


class LateMask(NamedTuple):
    """A mask that allows all, until a helper is done with its own.

    Attributes:
        row: the grammar, at the committed text, and the mask.
        own: the helper's, [1, W].
        jobs: the helpers'.
        number: of this one.
    """

    row: NextRow
    own: torch.Tensor
    jobs: StartedJobs
    number: int

    def is_done(self) -> bool:
        """Whether the helper is."""
        return self.number not in self.jobs.wait(0.0)

    def fill(self) -> None:
        """Wait for the helper."""
        self.jobs.wait_for(self.number)
        self.row.mask.copy_(self.own)


class StartedMasks(NamedTuple):
    """One mask each of some cursors, some of which helpers still fill.

    Attributes:
        waiting: the helpers', by the numbers of their rows.
        end: when the round is to go on, by the performance counter.
    """

    waiting: dict[int, LateMask]
    end: float


class NextMaskFiller:
    """A grammar is watched that had a slow mask lately, or may have one: no round waits long for its masks.

    Args:
        seconds: the time of a round's masks; infinite for no limit.
        team: fills masks side by side: engines do it outside the interpreter's lock.
        watches_new: see `GrammarWatch`.
    """

    def __init__(self, seconds: float, team: ThreadTeam, watches_new: bool) -> None:
        self._seconds = seconds
        self._team = team
        self._watch = GrammarWatch(watches_new)
        self._jobs: StartedJobs | None = None

    def drop(self) -> None:
        """The round whose masks were started last is over: helpers begin no more of them.

        What is chosen without slow masks is mostly allowed, and nobody waits for them then. They would queue up, and
        masks that are waited for would be behind them.
        """
        if self._jobs is not None:
            self._jobs.drop()
            self._jobs = None

    def start(self, rows: Sequence[NextRow], skippable: Collection[int] = ()) -> StartedMasks:
        """Fill one mask at each of some cursors, but for those that helpers fill from now on.

        Args:
            rows: where to fill.
            skippable: numbers of the rows where skipping a mask cannot change any visible output, if what is chosen
                without it is looked at.
        """
        self.drop()
        end = time.perf_counter() + WAIT_SHARE * self._seconds
        watched = sorted(skippable) if isfinite(self._seconds) else ()
        waiting = self._start({number: rows[number] for number in watched})
        self._fill_here([row for number, row in enumerate(rows) if number not in waiting])
        return StartedMasks(waiting, end)

    def finish(self, started: StartedMasks) -> dict[int, LateMask]:
        """Wait for helpers, but not for long.

        Returns:
            Masks that they still fill, by the numbers of their rows: `fill_refused` is to be told what was chosen
            there.
        """
        masks, left = started.waiting, started.end - time.perf_counter()
        waiting = next(iter(masks.values())).jobs.wait(left, PATIENCE_SECONDS) if masks else frozenset()
        late = {number: mask for number, mask in masks.items() if mask.number in waiting}
        for number, mask in masks.items():
            self._watch.learn(mask.row.cursor.key, is_slow=number in late)
            if number in late:
                mask.row.mask.fill_(ALL_ALLOWED)
            else:
                mask.row.mask.copy_(mask.own)
        return late

    def _fill_here(self, rows: Sequence[NextRow]) -> None:
        """Fill masks, and wait for all."""
        slow = list[int | None]()

        def fill(row: NextRow) -> None:
            began = time.thread_time()
            row.cursor.fill(row.mask)
            if time.thread_time() - began > SLOW_SHARE * self._seconds:
                slow.append(row.cursor.key)

        started, left = time.perf_counter(), iter(rows)
        for row in left:
            fill(row)
            if time.perf_counter() - started > ALONE_SECONDS:
                break
        self._team.run([partial(fill, row) for row in left])
        for key in slow:
            self._watch.learn(key, is_slow=True)

    def _start(self, rows: Mapping[int, NextRow]) -> dict[int, LateMask]:
        """Have helpers fill masks of watched grammars, by copies of these, as far as there is time to copy."""
        deadline, fills = Deadline(COPY_SECONDS), list[Job]()
        found = dict[int, tuple[NextRow, torch.Tensor]]()
        for number, row in rows.items():
            if not isinstance(row.cursor, XGrammarCursor) or not self._watch.includes(row.cursor.key):
                continue
            own = torch.empty_like(row.mask)
            fills.append(partial(row.cursor.copied_fill(), own))
            found[number] = row, own
            if deadline.is_over():
                break
        if not found:
            return {}
        self._jobs = jobs = self._team.start(fills, MAX_HELPERS)
        return {number: LateMask(*own, jobs, place) for place, (number, own) in enumerate(found.items())}


class GrammarWatch:
    """Remembers which grammars' masks have been fast for long. Not for several threads at once.

    Args:
        watches_new: whether a grammar is watched before it had a slow mask. Helpers cost a host 0.1 ms a round, which
            nobody notices while a GPU verifies.
    """

    def __init__(self, watches_new: bool) -> None:
        self._watches_new = watches_new
        # Fast masks in a row by key; the grammar that was seen least recently is first. Clients choose the keys, so
        # only so many are remembered.
        self._num_fast: OrderedDict[int, int] = OrderedDict()

    def includes(self, key: int | None) -> bool:
        """Whether a grammar is watched; one without a key never is."""
        return key is not None and self._num_fast.get(key, 0 if self._watches_new else NUM_WATCHED) < NUM_WATCHED

    def learn(self, key: int | None, is_slow: bool) -> None:
        """Of a mask of a grammar."""
        if key is None:
            return
        self._num_fast[key] = 0 if is_slow else self._num_fast.get(key, 0) + 1
        self._num_fast.move_to_end(key)
        if len(self._num_fast) > MAX_GRAMMARS:
            self._num_fast.popitem(last=False)


def fill_refused(masks: Mapping[int, LateMask], chosen: Mapping[int, int]) -> bool:
    """Fill the masks that refuse what was chosen while they allowed all. Returns whether there are any.

    A token that a grammar allows is chosen with its mask, too.

    Args:
        masks: late ones, by their numbers.
        chosen: tokens by the same numbers.
    """
    refused = _refused(masks, chosen)
    for number in refused:
        masks[number].fill()
    return bool(refused)


def allowed_instead(
    masks: Mapping[int, LateMask], chosen: Mapping[int, int], likeliest: Likeliest
) -> dict[int, int] | None:
    """What would be chosen with masks instead of what they refuse, without waiting for them.

    Args:
        masks: late ones, by their numbers.
        chosen: tokens that were chosen without these.
        likeliest: gives some requests' likeliest tokens, any allowed.

    Returns:
        Tokens by the numbers of those that refuse what was chosen; None if it takes the masks to tell.
    """
    refused = _refused(masks, chosen)
    if all(masks[number].is_done() for number in refused):
        return None if refused else {}
    found = dict[int, int]()
    for number, (logits, tokens) in likeliest(refused, NUM_LIKELIEST).items():
        token = _first_allowed(masks[number].row.cursor, logits, tokens)
        if token is None:
            return None
        found[number] = token
    return found


def _refused(masks: Mapping[int, LateMask], chosen: Mapping[int, int]) -> list[int]:
    """Numbers of the masks that do not allow what was chosen."""
    return [number for number, mask in masks.items() if not _allows(mask.row.cursor, chosen[number])]


def _first_allowed(cursor: Cursor, logits: Sequence[float], tokens: Sequence[int]) -> int | None:
    """The token of the largest logit that a grammar allows.

    None if none of these is allowed, or if the logits do not tell: another one may be as large, or none is finite.

    Args:
        cursor: of the grammar.
        logits: the largest first.
        tokens: that have these logits.
    """
    found: tuple[float, int] | None = None
    for logit, token in zip(logits, tokens, strict=True):
        if found is not None and logit < found[0]:
            return found[1]
        if _allows(cursor, token):
            if found is not None or not isfinite(logit):
                return None
            found = logit, token
    return None


def _allows(cursor: Cursor, token: int) -> bool:
    """Whether a token may come next."""
    match = cursor.advance([token])
    cursor.rollback(match.num_moved)
    return match.length == 1
