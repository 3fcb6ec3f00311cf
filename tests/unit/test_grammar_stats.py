"""What is told about walks."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from sglang_orthrus.grammar import Change, Walk
from sglang_orthrus.grammar_stats import GrammarStats


def walk_of(*changes: Change) -> Walk:
    return Walk(np.zeros(len(changes), np.int64), np.array(changes, np.int8), len(changes) + 1)


WALKS = [
    walk_of(Change.NONE, Change.FORCED, Change.FORCED, Change.NONE),
    walk_of(Change.REPAIRED, Change.NONE, Change.NONE, Change.NONE),
]


def test_a_log_line_sums_up_every_interval(caplog: pytest.LogCaptureFixture) -> None:
    stats = GrammarStats(log_interval=2, with_metrics=False)
    with caplog.at_level(logging.INFO):
        for seconds in (0.001, 0.003, 0.005):
            stats.count(WALKS, seconds)
        stats.count([], 1.0)
    assert [record.message for record in caplog.records] == [
        "ORTHRUS grammar: 16 drafts, 12.5 % repaired, 25.0 % forced; walks 2.00 ms a round, at most 3.00 ms"
    ]


def test_the_metrics_count_drafts_and_time() -> None:
    from prometheus_client import REGISTRY

    stats = GrammarStats(log_interval=100, with_metrics=True)
    for _ in range(2):
        stats.count(WALKS, 0.002)
    name = "sglang_orthrus:grammar_drafts_total"
    counts = [REGISTRY.get_sample_value(name, {"change": change}) for change in ("none", "repaired", "forced")]
    assert counts == [10, 2, 4]
    assert REGISTRY.get_sample_value("sglang_orthrus:grammar_walk_seconds_count") == 2
