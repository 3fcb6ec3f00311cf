"""Rows of requests whose texts have ended in the former round, which the overlap scheduler does not know yet.

It plans a round before it takes in the result of the one before. So every request takes part in one more round when
its text has ended. The wider rounds are, the larger a share of them that is: a text of 60 tokens takes eight rounds of
width 8, and one for nothing. A round that waits for the former result leaves these rows out.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch

from sglang_orthrus.compat.ledger import SHARED_BY_WORKERS, depends_on
from sglang_orthrus.compat.stops import ends_with
from sglang_orthrus.core import OrthrusState, Verdict, snapshot
from sglang_orthrus.sampling.acceptance import spread


class UnreadResults:
    """Results of rounds that the scheduler has not taken in, the oldest first."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[Sequence[Any], Any]] = deque()

    def add(self, reqs: Sequence[Any], result: Any) -> None:
        """A round is queued. result: SGLang's `GenerationBatchResult`, which it copies to the host."""
        self._rounds.append((list(reqs), result))

    def pop(self) -> None:
        """The scheduler takes in the oldest result."""
        self._rounds.popleft()

    def running(self, reqs: Sequence[Any]) -> list[int]:
        """Rows of a batch whose texts go on, as far as results tell. Waits for all of them."""
        ended: set[int] = set()
        for former, result in self._rounds:
            result.copy_done.synchronize()
            tokens = result.next_token_ids.view(len(former), -1).tolist()
            lens = result.accept_lens.tolist()
            ended.update(
                id(req)
                for req, own, length in zip(former, tokens, lens, strict=True)
                if length and ends_with(req, own[:length])
            )
        return [row for row, req in enumerate(reqs) if id(req) not in ended]


class RoundRows:
    """The requests of a decode batch that a round runs for, and what it comes to for all.

    Args:
        batch: SGLang's. Its state, which the scheduler replaces meanwhile, is read here.
        rows: of the requests, ascending; None for all.
    """

    def __init__(self, batch: ScheduleBatch, rows: Sequence[int] | None = None) -> None:
        self._batch = batch
        self._anchors = batch.spec_info.bonus_tokens.long()
        self._prefix_lens = batch.seq_lens
        self.rows = range(len(batch.reqs)) if rows is None else rows
        self._are_all = len(self.rows) == len(batch.reqs)

    @property
    def state(self) -> OrthrusState:
        """Of the whole batch before the round."""
        return OrthrusState(self._anchors, self._prefix_lens)

    def batch(self) -> ScheduleBatch:
        """Of these requests, at least one."""
        return self._batch if self._are_all else with_rows(self._batch, self.rows)

    def of_all(self, verdict: Verdict | None = None) -> Verdict:
        """Of the whole batch. verdict: of these requests; None if there are none."""
        if verdict is not None and self._are_all:
            return verdict
        return spread(verdict, self.rows, self._anchors, self._prefix_lens)


@depends_on(
    "sglang.srt.managers.schedule_batch:ScheduleBatch.filter_batch",
    "keep_indices",
    what="called on a copy of a decode batch",
    why="it knows all that a batch holds of its requests",
    until=SHARED_BY_WORKERS,
)
def with_rows(batch: ScheduleBatch, rows: Sequence[int]) -> ScheduleBatch:
    """Some requests of a decode batch, at least one. None has options that change logits. The batch stays as it is."""
    own = snapshot(batch)
    own.sampling_info = copy.copy(batch.sampling_info)
    # The scheduler keeps its penalizers, and nobody has a penalty.
    own.sampling_info.penalizer_orchestrator = SimpleNamespace(filter=lambda rows: None)
    own.spec_info = OrthrusState(batch.spec_info.bonus_tokens, batch.seq_lens)
    own.filter_batch(keep_indices=list(rows))
    return own
