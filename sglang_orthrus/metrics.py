"""What rounds did, as log lines and as metrics beside SGLang's."""

from __future__ import annotations

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    MIXED: one token per request, chosen behind a prefill that took them along (`--enable-mixed-chunk`).
    """

    GRAPH = "graph"
    SPLIT = "split"
    EAGER = "eager"
    MIXED = "mixed"


# A round of one request takes tenths of a millisecond; a batch on few cores may take tens of them.
_BUCKETS = tuple(
    milliseconds / 1e3 for milliseconds in (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100, 500)
)


@dataclass(frozen=True)
class Family:
    """A metric that is exported beside SGLang's. All of them have the label `model_name`, as SGLang's own have.

    Args:
        name: with its unit, and with `_total` for a counter, as Prometheus wants it. The colon is SGLang's custom.
        help: for `/metrics`.
        label: that tells counters and gauges apart; a histogram has none.
        values: of the label; those of `width` are the server's.
        second_label: of a gauge.
    """

    name: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ()
    second_label: str = ""

    @property
    def kind(self) -> str:
        """Prometheus' word for it."""
        if self.name.endswith("_total"):
            return "counter"
        return "gauge" if self.label else "histogram"

    def counters(self, model_name: str, values: Sequence[str] = ()) -> dict[str, Any]:
        """Counters by the label's value. All are exported as 0 at first, so that a rate sees the first event."""
        # SGLang sets the directory of multi-process metrics before its processes start; the import reads it.
        from prometheus_client import Counter

        counter = Counter(self.name, self.help, ("model_name", self.label))
        return {value: counter.labels(model_name, value) for value in self.values or values}

    def set_gauges(self, model_name: str, figures: Mapping[tuple[str, str], float]) -> None:
        """Gauges by the values of both labels, which stay as they are."""
        from prometheus_client import Gauge

        labels = ("model_name", self.label, self.second_label)
        gauge = Gauge(self.name, self.help, labels, multiprocess_mode="mostrecent")
        for values, figure in figures.items():
            gauge.labels(model_name, *values).set(figure)

    def histogram(self, model_name: str) -> Any:
        """A histogram of seconds."""
        from prometheus_client import Histogram

        return Histogram(self.name, self.help, ("model_name",), buckets=_BUCKETS).labels(model_name)


ROUNDS = Family(
    "sglang_orthrus:rounds_total",
    "Rounds of draft and verification, by how they ran.",
    "path",
    tuple(path.value for path in RoundPath),
)
WIDTHS = {
    name: Family(f"sglang_orthrus:width_{name}_total", text, "width")
    for name, text in (
        ("rounds", "Rounds, every step of plain decoding counted as one, by width."),
        ("requests", "Requests of rounds, each counted once per round or step, by width."),
        ("tokens", "Tokens that texts took in from rounds, by width."),
        ("probes", "Rounds that were to learn about their width, by width."),
        ("seconds", "Estimated seconds of rounds, by width."),
        ("plain_seconds", "Estimated seconds of plain decoding for the same tokens, by width."),
    )
}
WIDTH_COSTS = Family(
    "sglang_orthrus:width_cost_seconds",
    "Seconds of a round as timed at start-up, by width and by requests in the batch.",
    "width",
    second_label="requests",
)
GRAMMAR_DRAFTS = Family(
    "sglang_orthrus:grammar_drafts_total",
    "Drafts of requests with a grammar, by what the grammar made of them.",
    "change",
    tuple(change.name.lower() for change in DraftChange),
)
GRAMMAR_BLOCKS = Family(
    "sglang_orthrus:grammar_blocks_total",
    "Blocks of requests with a grammar, by which of their masks were filled.",
    "masks",
    ("all", "needed", "cut", "next", "late"),
)
CHOOSE_SECONDS = Family(
    "sglang_orthrus:grammar_choose_seconds",
    "Seconds per round in which grammars repaired drafts; verification waits for it.",
)
WALK_SECONDS = Family(
    "sglang_orthrus:grammar_walk_seconds",
    "Seconds per round in which grammars repaired drafts and filled masks.",
)
FAMILIES = (ROUNDS, *WIDTHS.values(), WIDTH_COSTS, GRAMMAR_DRAFTS, GRAMMAR_BLOCKS, CHOOSE_SECONDS, WALK_SECONDS)


class RoundMetrics:
    """Counts rounds by path.

    Args:
        log_interval: a log line every so many rounds, as SGLang's `--decode-log-interval` does for its own.
        model_name: of exported metrics; None exports none.
    """

    def __init__(self, log_interval: int, model_name: str | None) -> None:
        self._log_interval = log_interval
        self._since_log: Counter[RoundPath] = Counter()
        self._counters = {} if model_name is None else ROUNDS.counters(model_name)

    def count(self, path: RoundPath) -> None:
        """Count one round."""
        self._since_log[path] += 1
        if self._counters:
            self._counters[path.value].inc()
        if self._since_log.total() >= self._log_interval:
            counts = (self._since_log[path] for path in RoundPath)
            logger.info("ORTHRUS rounds: %d in one CUDA graph, %d in two, %d eager, %d mixed with a prefill", *counts)
            self._since_log.clear()


class WidthFigures(NamedTuple):
    """What a round of some width came to.

    Attributes:
        width: W.
        is_probe: whether the round was to learn about the width.
        requests: that it counted for, once for each of its steps.
        tokens: that it committed.
        seconds: that it took, by the cost model.
        plain_seconds: that plain decoding would have taken for as many tokens; 0 if that is not known.
        rounds: steps that it took: more than one only at width 1.
    """

    width: int
    is_probe: bool
    requests: int
    tokens: int
    seconds: float
    plain_seconds: float
    rounds: int = 1


class WidthMetrics:
    """Counts rounds by width, and what they brought.

    Args:
        log_interval: a log line every so many rounds.
        model_name: of exported metrics; None exports none.
        costs: seconds of a round by width, for every width that rounds may have, and by batch size.
    """

    def __init__(self, log_interval: int, model_name: str | None, costs: Mapping[int, Mapping[int, float]]) -> None:
        self._log_interval = log_interval
        self._since_log = 0
        self._counters: dict[str, dict[str, Any]] = {}
        if model_name is not None:
            values = [str(width) for width in costs]
            self._counters = {name: family.counters(model_name, values) for name, family in WIDTHS.items()}
            seconds = {(str(width), str(size)): cost for width, row in costs.items() for size, cost in row.items()}
            WIDTH_COSTS.set_gauges(model_name, seconds)

    def count(self, figures: WidthFigures, report: Callable[[], object]) -> None:
        """Count one round. report: what the log line says, asked for only then."""
        self._since_log += 1
        if self._counters:
            counts = figures._asdict() | {"probes": int(figures.is_probe)}
            for name, by_width in self._counters.items():
                by_width[str(figures.width)].inc(counts[name])
        if self._since_log >= self._log_interval:
            logger.info("ORTHRUS widths: %s", report())
            self._since_log = 0


class GrammarMetrics:
    """Counts drafts by what a grammar made of them, and times what the grammars of each round take.

    Args:
        log_interval: a log line every so many rounds that have a grammar.
        model_name: of exported metrics; None exports none.
    """

    def __init__(self, log_interval: int, model_name: str | None) -> None:
        self._log_interval = log_interval
        self._drafts = np.zeros(len(DraftChange), np.int64)
        self._choose_seconds: list[float] = []
        self._seconds: list[float] = []
        self._is_exported = model_name is not None
        if model_name is not None:
            self._drafts_by_change = GRAMMAR_DRAFTS.counters(model_name)
            self._blocks_by_masks = GRAMMAR_BLOCKS.counters(model_name)
            self._choose_histogram = CHOOSE_SECONDS.histogram(model_name)
            self._walk_histogram = WALK_SECONDS.histogram(model_name)

    def count_next(self, num_masks: int, num_late: int) -> None:
        """Count a round that drafts nothing: its masks, one per request, and how many were not there in time."""
        if self._is_exported:
            self._blocks_by_masks["next"].inc(num_masks - num_late)
            self._blocks_by_masks["late"].inc(num_late)

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
        if self._is_exported:
            for change in DraftChange:
                self._drafts_by_change[change.name.lower()].inc(int(drafts[change]))
            num_whole = len(changes) - num_sparse - num_cut
            for masks, count in (("needed", num_sparse), ("cut", num_cut), ("all", num_whole)):
                self._blocks_by_masks[masks].inc(count)
            self._choose_histogram.observe(choose_seconds)
            self._walk_histogram.observe(seconds)
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
