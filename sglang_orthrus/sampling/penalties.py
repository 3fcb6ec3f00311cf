"""Frequency, presence and repetition penalties at every position of a block, as tensor functions.

Letters: n requests, W rows of a block, V vocabulary, K tokens whose order inside the block matters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.utils.common import async_h2d

TABLE_ROWS = 16  # 10 MB of counts for a vocabulary of 151,936


@dataclass(frozen=True, slots=True)
class Penalties:
    """The parameters of requests, each [n] fp32; 0, 0 and 1 leave logits as they are."""

    frequency: torch.Tensor
    presence: torch.Tensor
    repetition: torch.Tensor

    def at(self, rows: torch.Tensor | slice) -> Penalties:
        """The same for some of the requests."""
        return Penalties(self.frequency[rows], self.presence[rows], self.repetition[rows])


def penalise_inplace(
    logits: torch.Tensor, counts: torch.Tensor, tokens: torch.Tensor, visible: torch.Tensor, penalties: Penalties
) -> None:
    """Penalise what occurs in a request's output, as plain SGLang does: additive penalties, then scaling.

    Args:
        logits: [n, W, V] fp32, changed in context.
        counts: [n, V] int, occurrences in the output before the block.
        tokens: [n, K] int64, tokens of the block.
        visible: [W, K] bool, which of them come before the token that a row chooses.
        penalties: of the requests.
    """
    index = tokens[:, None, :].expand(-1, logits.shape[1], -1)
    untouched = logits.gather(2, index)
    _penalise_inplace(logits, counts[:, None, :], penalties)
    # Whatever occurs in the block is written once more: a token that occurs twice gets the same value twice.
    is_same = (tokens[:, :, None] == tokens[:, None, :]).float()
    counts_there = counts.gather(1, tokens)[:, None, :] + visible.float() @ is_same
    _penalise_inplace(untouched, counts_there, penalties)
    logits.scatter_(2, index, untouched)


def _penalise_inplace(logits: torch.Tensor, counts: torch.Tensor, penalties: Penalties) -> None:
    """counts: as logits, or one row for all of a request's. One temporary of the logits' size at a time."""
    occurs = counts > 0
    presence = torch.where(occurs, penalties.presence[:, None, None], 0)
    logits.sub_(penalties.frequency[:, None, None] * counts + presence)
    scale = torch.where(occurs, penalties.repetition[:, None, None], 1)
    is_negative = logits < 0
    # Either factor is 1 where the other counts: multiplying by 1 / scale would round differently.
    logits.mul_(torch.where(is_negative, scale, 1)).div_(torch.where(is_negative, 1, scale))


def forbid_inplace(logits: torch.Tensor, num_before: torch.Tensor, min_new: torch.Tensor, stops: torch.Tensor) -> None:
    """Keep requests from stopping before they have emitted `min_new` tokens.

    Args:
        logits: [n, W, V], changed in context.
        num_before: [n, W] int, tokens emitted before the one that a row chooses.
        min_new: [n] int, 0 to allow everything.
        stops: [n, S] int64, the tokens that stop a request, in any order, repeated at will.
    """
    too_early = num_before < min_new[:, None]
    index = stops[:, None, :].expand(-1, logits.shape[1], -1)
    allowed = logits.gather(2, index)
    logits.scatter_(2, index, allowed.masked_fill(too_early[:, :, None], float("-inf")))


class TokenCounts:
    """How often every token occurs in the outputs of penalised requests, on the device: a row for each that runs.

    A row holds what comes before the request's anchor. It is written on the stream of the passes, so it is up to date
    when the host does not know the last round's result yet. Rows come in tables of `TABLE_ROWS`, made when they are
    needed and dropped when nobody has a row there.

    Args:
        vocab_size: V.
        device: where the tables live.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._nothing = torch.zeros(vocab_size, dtype=torch.int32, device=device)
        self._tables: list[torch.Tensor] = []
        self._rows: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    @property
    def num_bytes(self) -> int:
        """Memory of the tables."""
        return sum(table.numel() * table.element_size() for table in self._tables)

    def start(self, reqs: Sequence[Any]) -> None:
        """Give requests rows of zeros, of those whose requests have ended, were retracted or are among them.

        A round that still runs for an ended request has read its row before the stream comes to the next owner.
        """
        for req in [req for req in self._rows if req.finished() or req.is_retracted]:
            del self._rows[req]
        for req in reqs:
            self._rows.pop(req, None)
        taken = set(self._rows.values())
        while self._tables and taken.isdisjoint(range(len(self._tables) * TABLE_ROWS)[-TABLE_ROWS:]):
            self._tables.pop()
        free = (row for row in count() if row not in taken)
        for req, row in zip(reqs, free, strict=False):
            if row == len(self._tables) * TABLE_ROWS:
                self._tables.append(self._nothing.new_zeros(TABLE_ROWS, self._nothing.shape[0]))
            self._row(row).zero_()
            self._rows[req] = row

    def of(self, reqs: Sequence[Any]) -> torch.Tensor:
        """[n, V] int32, zeros for a request that has no row."""
        rows = [self._rows.get(req) for req in reqs]
        return torch.stack([self._nothing if row is None else self._row(row) for row in rows])

    def add(self, reqs: Sequence[Any], tokens: torch.Tensor, lens: torch.Tensor) -> None:
        """Count the first `lens` tokens of every request that has a row. tokens: [n, W] int64, lens: [n]."""
        counted = (torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]).int()
        by_table: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for number, req in enumerate(reqs):
            row = self._rows.get(req)
            if row is not None:
                by_table[row // TABLE_ROWS].append((number, row % TABLE_ROWS))
        for table, members in by_table.items():
            numbers, rows = async_h2d(list(zip(*members, strict=True)), dtype=torch.int64, device=tokens.device)
            index = rows[:, None] * self._nothing.shape[0] + tokens[numbers]
            self._tables[table].view(-1).index_add_(0, index.flatten(), counted[numbers].flatten())

    def _row(self, row: int) -> torch.Tensor:
        return self._tables[row // TABLE_ROWS][row % TABLE_ROWS]
