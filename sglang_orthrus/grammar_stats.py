"""What grammars made of drafts and how long that took, as a log line and as metrics."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_orthrus.grammar import Change, Walk

logger = logging.getLogger(__name__)

# A round of one request takes tenths of a millisecond; a batch on few cores may take tens of them.
_BUCKETS = tuple(
    milliseconds / 1e3 for milliseconds in (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 500)
)


class GrammarStats:
    """Counts drafts by what a grammar made of them, and times the walks of each round, mask fills included.

    Args:
        log_interval: a log line every so many rounds that have a grammar.
        with_metrics: whether to export `sglang_orthrus:grammar_drafts_total{change="none"|"repaired"|"forced"}` and
            the histogram `sglang_orthrus:grammar_walk_seconds` beside SGLang's metrics.
    """

    def __init__(self, log_interval: int, with_metrics: bool) -> None:
        self._log_interval = log_interval
        self._drafts = np.zeros(len(Change), np.int64)
        self._seconds: list[float] = []
        self._drafts_metric: Any = None
        self._seconds_metric: Any = None
        if with_metrics:
            # SGLang sets the directory of multi-process metrics before its processes start; the import reads it.
            from prometheus_client import Counter, Histogram

            self._drafts_metric = Counter(
                "sglang_orthrus:grammar_drafts_total", "Drafts by what a grammar made of them.", ("change",)
            )
            self._seconds_metric = Histogram(
                "sglang_orthrus:grammar_walk_seconds",
                "Time per round for the grammars of the batch: walks and masks.",
                buckets=_BUCKETS,
            )

    def count(self, walks: Sequence[Walk], seconds: float) -> None:
        """Count one round, in which these walks took that long together."""
        if not walks:
            return
        drafts = sum((np.bincount(walk.changes, minlength=len(Change)) for walk in walks), np.zeros_like(self._drafts))
        self._drafts += drafts
        self._seconds.append(seconds)
        if self._drafts_metric is not None:
            for change in Change:
                self._drafts_metric.labels(change=change.name.lower()).inc(int(drafts[change]))
            self._seconds_metric.observe(seconds)
        if len(self._seconds) >= self._log_interval:
            logger.info(
                "ORTHRUS grammar: %d drafts, %.1f %% repaired, %.1f %% forced; walks %.2f ms a round, at most %.2f ms",
                self._drafts.sum(),
                *(100 * self._drafts[change] / self._drafts.sum() for change in (Change.REPAIRED, Change.FORCED)),
                1e3 * statistics.median(self._seconds),
                1e3 * max(self._seconds),
            )
            self._drafts[:] = 0
            self._seconds.clear()
