"""Which way rounds went, as a log line and a metric: a server that drops to eager passes should not do so unseen."""

from __future__ import annotations

import logging
from collections import Counter
from enum import Enum
from typing import Any

logger = logging.getLogger(__name__)


class Path(Enum):
    """How a round was run.

    GRAPH: draft and verify in one CUDA graph. SPLIT: a CUDA graph each, because tokens are chosen in between
    (grammars, sampling, penalties and the like).
    EAGER: no graph for this batch size, or none at all.
    """

    GRAPH = "graph"
    SPLIT = "split"
    EAGER = "eager"


class RoundPaths:
    """Counts rounds by path.

    Args:
        log_interval: a log line every so many rounds, as SGLang's `--decode-log-interval` does for its own.
        with_metrics: whether to export `sglang_orthrus:rounds_total{path=...}` beside SGLang's metrics.
    """

    def __init__(self, log_interval: int, with_metrics: bool) -> None:
        self._log_interval = log_interval
        self._since_log: Counter[Path] = Counter()
        self._metric: Any = None
        if with_metrics:
            # SGLang sets the directory of multi-process metrics before its processes start; the import reads it.
            from prometheus_client import Counter as PrometheusCounter

            self._metric = PrometheusCounter("sglang_orthrus:rounds", "Rounds by the way they were run.", ("path",))

    def count(self, path: Path) -> None:
        """Count one round."""
        self._since_log[path] += 1
        if self._metric is not None:
            self._metric.labels(path=path.value).inc()
        if self._since_log.total() >= self._log_interval:
            counts = (self._since_log[path] for path in Path)
            logger.info("ORTHRUS rounds: %d in one CUDA graph, %d in two, %d eager", *counts)
            self._since_log.clear()
