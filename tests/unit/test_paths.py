"""Which way rounds went."""

from __future__ import annotations

import logging

import pytest

from sglang_orthrus.paths import Path, RoundPaths


def test_a_log_line_sums_up_every_interval(caplog: pytest.LogCaptureFixture) -> None:
    paths = RoundPaths(log_interval=3, with_metrics=False)
    with caplog.at_level(logging.INFO):
        for path in (Path.GRAPH, Path.EAGER, Path.GRAPH, Path.SPLIT):
            paths.count(path)
    assert [record.message for record in caplog.records] == ["ORTHRUS rounds: 2 in one CUDA graph, 0 in two, 1 eager"]


def test_the_metric_counts_by_path() -> None:
    from prometheus_client import REGISTRY

    paths = RoundPaths(log_interval=100, with_metrics=True)
    for path in (Path.SPLIT, Path.SPLIT, Path.GRAPH):
        paths.count(path)
    name = "sglang_orthrus:rounds_total"
    assert REGISTRY.get_sample_value(name, {"path": "split"}) == 2
    assert REGISTRY.get_sample_value(name, {"path": "graph"}) == 1
