"""What rounds did, as log lines and as metrics beside SGLang's."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_orthrus.core import DraftChange

logger = logging.getLogger(__name__)


class RoundPath(Enum):
    """How a round was run.

    GRAPH: draft and verify in one CUDA graph. SPLIT: a CUDA graph each, because tokens are chosen in between
    (grammars, sampling, penalties and the like).
    EAGER: no graph for this batch size, or none at all.
    """

    GRAPH = "graph"
    SPLIT = "split"
    EAGER = "eager"


class RoundMetrics:
    """Counts rounds by path.

    Args:
        log_interval: a log line every so many rounds, as SGLang's `--decode-log-interval` does for its own.
        with_metrics: whether to export `sglang_orthrus:rounds_total{path=...}` beside SGLang's metrics.
    """

    def __init__(self, log_interval: int, with_metrics: bool) -> None:
        self._log_interval = log_interval
        self._since_log: Counter[RoundPath] = Counter()
        self._metric: Any = None
        if with_metrics:
            # SGLang sets the directory of multi-process metrics before its processes start; the import reads it.
            from prometheus_client import Counter as PrometheusCounter

            self._metric = PrometheusCounter("sglang_orthrus:rounds", "Rounds by the way they were run.", ("path",))

    def count(self, path: RoundPath) -> None:
        """Count one round."""
        self._since_log[path] += 1
        if self._metric is not None:
            self._metric.labels(path=path.value).inc()
        if self._since_log.total() >= self._log_interval:
            counts = (self._since_log[path] for path in RoundPath)
            logger.info("ORTHRUS rounds: %d in one CUDA graph, %d in two, %d eager", *counts)
            self._since_log.clear()


class WidthFigures(NamedTuple):
    """What a round of some width came to.

    Attributes:
        width: W.
        is_probe: whether the round was to learn about the width.
        requests: that it counted for.
        tokens: that it committed.
        seconds: that it took, by the cost model.
        plain_seconds: that plain decoding would have taken for as many tokens; 0 if that is not known.
    """

    width: int
    is_probe: bool
    requests: int
    tokens: int
    seconds: float
    plain_seconds: float


class WidthMetrics:
    """Counts rounds by width, and what they brought.

    Args:
        log_interval: a log line every so many rounds.
        with_metrics: whether to export counters beside SGLang's metrics, by `width`:
            `sglang_orthrus:width_rounds_total`, `..._requests_total`, `..._tokens_total`, `..._probes_total`,
            `..._seconds_total` and `..._plain_seconds_total`.
    """

    def __init__(self, log_interval: int, with_metrics: bool) -> None:
        self._log_interval = log_interval
        self._since_log = 0
        self._counters: dict[str, Any] = {}
        if with_metrics:
            # SGLang sets the directory of multi-process metrics before its processes start; the import reads it.
            from prometheus_client import Counter as PrometheusCounter

            for name, text in (
                ("rounds", "Rounds by their width."),
                ("requests", "Requests in rounds, by width."),
                ("tokens", "Tokens by their round's width."),
                ("probes", "Rounds that were to learn about a width."),
                ("seconds", "Estimated time of rounds, by width."),
                ("plain_seconds", "What plain decoding would have taken for the tokens of these rounds."),
            ):
                self._counters[name] = PrometheusCounter(f"sglang_orthrus:width_{name}", text, ("width",))

    def count(self, figures: WidthFigures, report: Callable[[], object]) -> None:
        """Count one round. report: what the log line says, asked for only then."""
        self._since_log += 1
        if self._counters:
            counts = figures._asdict() | {"rounds": 1, "probes": int(figures.is_probe)}
            for name, counter in self._counters.items():
                counter.labels(width=str(figures.width)).inc(counts[name])
        if self._since_log >= self._log_interval:
            logger.info("ORTHRUS widths: %s", report())
            self._since_log = 0


# A round of one request takes tenths of a millisecond; a batch on few cores may take tens of them.
_BUCKETS = tuple(
    milliseconds / 1e3 for milliseconds in (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 500)
)


class GrammarMetrics:
    """Counts drafts by what a grammar made of them, and times what the grammars of each round take.

    Args:
        log_interval: a log line every so many rounds that have a grammar.
        with_metrics: whether to export `sglang_orthrus:grammar_drafts_total{change="none"|"repaired"|"forced"}`,
            `sglang_orthrus:grammar_blocks_total{masks="all"|"needed"|"cut"}` and the histograms
            `sglang_orthrus:grammar_choose_seconds`, which verification waits for, and
            `sglang_orthrus:grammar_walk_seconds`, with the masks, beside SGLang's metrics.
    """

    def __init__(self, log_interval: int, with_metrics: bool) -> None:
        self._log_interval = log_interval
        self._drafts = np.zeros(len(DraftChange), np.int64)
        self._choose_seconds: list[float] = []
        self._seconds: list[float] = []
        self._drafts_metric: Any = None
        self._blocks_metric: Any = None
        self._choose_metric: Any = None
        self._seconds_metric: Any = None
        if with_metrics:
            # SGLang sets the directory of multi-process metrics before its processes start; the import reads it.
            from prometheus_client import Counter, Histogram

            self._drafts_metric = Counter(
                "sglang_orthrus:grammar_drafts_total", "Drafts by what a grammar made of them.", ("change",)
            )
            self._blocks_metric = Counter(
                "sglang_orthrus:grammar_blocks_total", "Blocks by which of their masks were filled.", ("masks",)
            )
            self._choose_metric = Histogram(
                "sglang_orthrus:grammar_choose_seconds",
                "Time per round for the grammars of the batch: drafts.",
                buckets=_BUCKETS,
            )
            self._seconds_metric = Histogram(
                "sglang_orthrus:grammar_walk_seconds",
                "Time per round for the grammars of the batch: drafts and masks.",
                buckets=_BUCKETS,
            )

    def count(
        self,
        changes: Sequence[npt.NDArray[np.int8]],
        choose_seconds: float,
        masks_seconds: float,
        num_sparse: int = 0,
        num_cut: int = 0,
    ) -> None:
        """Count one round: its drafts, the time to repair them and that to fill their masks.

        changes: [R][Q-1] `DraftChange` of every draft; Q may differ between rounds, and is 1 where nothing is drafted.
        num_sparse: how many of the blocks have none but the masks that were needed, and all of those.
        num_cut: how many end before their last mask.
        """
        if not changes:
            return
        drafts = np.bincount(np.concatenate(changes), minlength=len(DraftChange))
        self._drafts += drafts
        seconds = choose_seconds + masks_seconds
        self._choose_seconds.append(choose_seconds)
        self._seconds.append(seconds)
        if self._drafts_metric is not None:
            for change in DraftChange:
                self._drafts_metric.labels(change=change.name.lower()).inc(int(drafts[change]))
            for masks, count in (
                ("needed", num_sparse),
                ("cut", num_cut),
                ("all", len(changes) - num_sparse - num_cut),
            ):
                self._blocks_metric.labels(masks=masks).inc(count)
            self._choose_metric.observe(choose_seconds)
            self._seconds_metric.observe(seconds)
        if len(self._seconds) >= self._log_interval:
            num_drafts = self._drafts.sum()
            logger.info(
                "ORTHRUS grammar: %d drafts, %.1f %% repaired, %.1f %% forced; walks %.2f ms a round, at most %.2f ms; "
                "of that before verification %.2f ms, at most %.2f ms",
                num_drafts,
                *(
                    100 * self._drafts[change] / max(1, num_drafts)
                    for change in (DraftChange.REPAIRED, DraftChange.FORCED)
                ),
                *(
                    1e3 * figure(seconds)
                    for seconds in (self._seconds, self._choose_seconds)
                    for figure in (statistics.median, max)
                ),
            )
            self._drafts[:] = 0
            self._choose_seconds.clear()
            self._seconds.clear()
