"""How rounds ran, as a log line and as a metric."""

from __future__ import annotations

import logging

import pytest

from sglang_orthrus.metrics import RoundMetrics, RoundPath


def test_a_log_line_sums_up_every_interval(caplog: pytest.LogCaptureFixture) -> None:
    metrics = RoundMetrics(log_interval=3, with_metrics=False)
    with caplog.at_level(logging.INFO):
        for path in (RoundPath.GRAPH, RoundPath.EAGER, RoundPath.GRAPH, RoundPath.SPLIT):
            metrics.count(path)
    assert [record.message for record in caplog.records] == ["ORTHRUS rounds: 2 in one CUDA graph, 0 in two, 1 eager"]


def test_the_metric_counts_by_path() -> None:
    from prometheus_client import REGISTRY

    metrics = RoundMetrics(log_interval=100, with_metrics=True)
    for path in (RoundPath.SPLIT, RoundPath.SPLIT, RoundPath.GRAPH):
        metrics.count(path)
    name = "sglang_orthrus:rounds_total"
    assert REGISTRY.get_sample_value(name, {"path": "split"}) == 2
    assert REGISTRY.get_sample_value(name, {"path": "graph"}) == 1
