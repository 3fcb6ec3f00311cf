"""What is told about walks."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from sglang_orthrus.grammar.repair import Change, Choice, Reach
from sglang_orthrus.grammar_stats import GrammarStats


def choice_of(*changes: Change) -> Choice:
    return Choice(np.zeros(len(changes), np.int64), np.array(changes, np.int8), Reach(len(changes), False))


CHOICES = [
    choice_of(Change.NONE, Change.FORCED, Change.FORCED, Change.NONE),
    choice_of(Change.REPAIRED, Change.NONE, Change.NONE, Change.NONE),
]


def test_a_log_line_sums_up_every_interval(caplog: pytest.LogCaptureFixture) -> None:
    stats = GrammarStats(log_interval=2, with_metrics=False)
    with caplog.at_level(logging.INFO):
        for seconds in (0.001, 0.003, 0.005):
            stats.count(CHOICES, seconds / 4, seconds * 3 / 4)
        stats.count([], 1.0, 1.0)
    assert [record.message for record in caplog.records] == [
        "ORTHRUS grammar: 16 drafts, 12.5 % repaired, 25.0 % forced; walks 2.00 ms a round, at most 3.00 ms; "
        "of that before verification 0.50 ms, at most 0.75 ms"
    ]


def test_the_metrics_count_drafts_and_time() -> None:
    from prometheus_client import REGISTRY

    stats = GrammarStats(log_interval=100, with_metrics=True)
    for _ in range(2):
        stats.count(CHOICES, 0.0005, 0.0015, 1)
    name = "sglang_orthrus:grammar_drafts_total"
    counts = [REGISTRY.get_sample_value(name, {"change": change}) for change in ("none", "repaired", "forced")]
    assert counts == [10, 2, 4]
    name = "sglang_orthrus:grammar_blocks_total"
    assert [REGISTRY.get_sample_value(name, {"masks": masks}) for masks in ("all", "needed")] == [2, 2]
    for times, seconds in (("choose", 0.001), ("walk", 0.004)):
        assert REGISTRY.get_sample_value(f"sglang_orthrus:grammar_{times}_seconds_count") == 2
        assert REGISTRY.get_sample_value(f"sglang_orthrus:grammar_{times}_seconds_sum") == pytest.approx(seconds)
