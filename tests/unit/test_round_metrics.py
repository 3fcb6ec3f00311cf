"""How rounds ran, as a log line and as a metric."""

from __future__ import annotations

import logging

import pytest

from sglang_orthrus.metrics import RoundMetrics, RoundPath, WidthFigures, WidthMetrics


def test_a_log_line_sums_up_every_interval(caplog: pytest.LogCaptureFixture) -> None:
    metrics = RoundMetrics(log_interval=3, model_name=None)
    with caplog.at_level(logging.INFO):
        for path in (RoundPath.GRAPH, RoundPath.EAGER, RoundPath.GRAPH, RoundPath.SPLIT):
            metrics.count(path)
    assert [record.message for record in caplog.records] == [
        "ORTHRUS rounds: 2 in one CUDA graph, 0 in two, 1 eager, 0 mixed with a prefill"
    ]


def test_the_metric_counts_by_path() -> None:
    from prometheus_client import REGISTRY

    def counts() -> dict[str, float | None]:
        labels = ({"path": path.value, "model_name": "nano"} for path in RoundPath)
        return {own["path"]: REGISTRY.get_sample_value("sglang_orthrus:rounds_total", own) for own in labels}

    metrics = RoundMetrics(log_interval=100, model_name="nano")
    assert counts() == {"graph": 0, "split": 0, "eager": 0, "mixed": 0}, "a rate needs the count before the first event"
    for path in (RoundPath.SPLIT, RoundPath.SPLIT, RoundPath.GRAPH):
        metrics.count(path)
    assert counts() == {"graph": 1, "split": 2, "eager": 0, "mixed": 0}


def test_the_metrics_of_widths_count_what_rounds_brought(caplog: pytest.LogCaptureFixture) -> None:
    from prometheus_client import REGISTRY

    def count(name: str, width: int) -> float | None:
        labels = {"width": str(width), "model_name": "nano"}
        return REGISTRY.get_sample_value(f"sglang_orthrus:width_{name}_total", labels)

    metrics = WidthMetrics(2, "nano", {1: {4: 0.25}, 8: {4: 0.5}})
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            metrics.count(WidthFigures(8, True, requests=3, tokens=9, seconds=0.5, plain_seconds=1.5), lambda: "said")
    assert [record.message for record in caplog.records] == ["ORTHRUS widths: said"]
    names = ("rounds", "requests", "tokens", "probes", "seconds", "plain_seconds")
    assert [count(name, 8) for name in names] == [2, 6, 18, 2, 1, 3]
    assert [count(name, 1) for name in names] == [0] * 6
    labels = {"width": "8", "requests": "4", "model_name": "nano"}
    assert REGISTRY.get_sample_value("sglang_orthrus:width_cost_seconds", labels) == 0.5
