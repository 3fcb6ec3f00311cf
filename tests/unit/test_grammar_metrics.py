"""What is told about walks."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from sglang_orthrus.core import DraftChange
from sglang_orthrus.metrics import GrammarMetrics

NANO = {"model_name": "nano"}
CHANGES = [
    np.array([DraftChange.NONE, DraftChange.FORCED, DraftChange.FORCED, DraftChange.NONE], np.int8),
    np.array([DraftChange.REPAIRED, DraftChange.NONE, DraftChange.NONE, DraftChange.NONE], np.int8),
]


def test_a_log_line_sums_up_every_interval(caplog: pytest.LogCaptureFixture) -> None:
    metrics = GrammarMetrics(log_interval=2, model_name=None)
    with caplog.at_level(logging.INFO):
        for seconds in (0.001, 0.003, 0.005):
            metrics.count(CHANGES, seconds / 4, seconds * 3 / 4)
        metrics.count([], 1.0, 1.0)
    assert [record.message for record in caplog.records] == [
        "ORTHRUS grammar: 16 drafts, 12.5 % repaired, 25.0 % forced; walks 2.00 ms a round, at most 3.00 ms; "
        "of that before verification 0.50 ms, at most 0.75 ms"
    ]


def test_rounds_without_drafts_have_times_and_no_shares(caplog: pytest.LogCaptureFixture) -> None:
    metrics = GrammarMetrics(log_interval=2, model_name=None)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            metrics.count([np.zeros(0, np.int8)] * 2, 0.001, 0.003)
    assert [record.message for record in caplog.records] == [
        "ORTHRUS grammar: 0 drafts, 0.0 % repaired, 0.0 % forced; walks 4.00 ms a round, at most 4.00 ms; "
        "of that before verification 1.00 ms, at most 1.00 ms"
    ]


def test_the_metrics_count_drafts_and_time() -> None:
    from prometheus_client import REGISTRY

    metrics = GrammarMetrics(log_interval=100, model_name="nano")
    for _ in range(2):
        metrics.count(CHANGES, 0.0005, 0.0015, 1)
        metrics.count_next(num_masks=5, num_late=2)
    name = "sglang_orthrus:grammar_drafts_total"
    counts = [REGISTRY.get_sample_value(name, {"change": change, **NANO}) for change in ("none", "repaired", "forced")]
    assert counts == [10, 2, 4]
    name = "sglang_orthrus:grammar_blocks_total"
    counts = [REGISTRY.get_sample_value(name, {"masks": masks, **NANO}) for masks in ("all", "needed", "next", "late")]
    assert counts == [2, 2, 6, 4]
    for times, seconds in (("choose", 0.001), ("walk", 0.004)):
        assert REGISTRY.get_sample_value(f"sglang_orthrus:grammar_{times}_seconds_count", NANO) == 2
        assert REGISTRY.get_sample_value(f"sglang_orthrus:grammar_{times}_seconds_sum", NANO) == pytest.approx(seconds)
