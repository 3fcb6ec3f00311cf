"""What a round will be, decided once, before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang.srt.managers.schedule_batch import ScheduleBatch

from sglang_orthrus.sampling.logit_adjustments import are_adjusted


class RoundPlan(NamedTuple):
    """How a round is to run.

    Attributes:
        width: Q, tokens drafted and verified per request, the anchor included; 1 drafts nothing.
        may_fuse: whether one CUDA graph may draft and verify, if there is one for this batch size.
        is_deferred: whether the scheduler takes in the former round's result between draft and verify.
    """

    width: int
    may_fuse: bool
    is_deferred: bool


class Policy:
    """Plans rounds, today all of the largest width.

    Args:
        widths: ascending.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        self._widths = tuple(widths)

    def plan(self, batch: ScheduleBatch, can_defer: bool) -> RoundPlan:
        """Of a decode batch; can_defer: whether the scheduler overlaps rounds."""
        return RoundPlan(
            self._widths[-1],
            may_fuse=_is_greedy_without_options(batch),
            is_deferred=bool(batch.has_grammar) and can_defer,
        )


def _is_greedy_without_options(batch: ScheduleBatch) -> bool:
    """Only such rounds choose nothing between their passes."""
    info = batch.sampling_info
    return info.is_all_greedy and not (batch.has_grammar or batch.return_logprob or are_adjusted(info))
