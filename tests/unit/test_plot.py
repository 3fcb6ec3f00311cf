"""Charts come from a sweep's JSON alone and show every point."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.plot import Chart, caption, charts, plot


def peer(speed_up: float, cost: float | None) -> dict[str, Any]:
    return {
        "speed_up": speed_up,
        "decode_speed_up_json_and_tools": 2 * speed_up,
        "round_cost": cost,
        "throughput": 100 * speed_up,
    }


def row(concurrency: int, context: int | None, **peers: dict[str, Any]) -> dict[str, Any]:
    return {"concurrency": concurrency, "context": context, "plain_throughput": 100.0, "peers": peers}


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "provenance": {
            "gpu": "NVIDIA H200",
            "cpu": "AMD EPYC, 2 cores",
            "date": "2026-11-24T01:02:03+00:00",
            "commit": "0123456789abcdef",
            "command": ["sweep", "gpu", "--resume"],
            "versions": {"sglang": "0.5.23"},
        },
        "arguments": {"model": {"released_shape": "8B"}},
        "servers": {"plain": {}, "orthrus": {}, "ngram": {"skipped": "no library"}},
        "report": {
            "settings": [
                row(1, None, orthrus=peer(5.0, 2.1), ngram=peer(1.2, 1.1)),
                row(8, None, orthrus=peer(3.0, 2.6)),
                row(64, None, orthrus=peer(0.7, None)),
                row(1, 512, orthrus=peer(5.0, 2.1)),
                row(1, 40000, orthrus=peer(0.9, 2.2)),
            ]
        },
    }


def points(chart: Chart) -> dict[str, tuple[tuple[float, float], ...]]:
    return {line.server: line.points for line in chart.lines}


def test_charts_hold_all_points_losses_included(result: dict[str, Any]) -> None:
    speed_up, decode, cost, throughput = charts(result)
    assert points(speed_up) == {"orthrus": ((1, 5.0), (8, 3.0), (64, 0.7)), "ngram": ((1, 1.2),)}
    assert points(decode) == {"orthrus": ((1, 10.0), (8, 6.0), (64, 1.4)), "ngram": ((1, 2.4),)}
    assert points(cost) == {"orthrus": ((1, 2.1), (8, 2.6)), "ngram": ((1, 1.1),)}
    assert points(throughput) == {"plain": ((512, 100), (40000, 100)), "orthrus": ((512, 500), (40000, 90))}


def test_a_chart_without_points_is_left_out(result: dict[str, Any]) -> None:
    result["report"]["settings"] = result["report"]["settings"][3:]
    assert [chart.name for chart in charts(result)] == ["throughput"]


def test_the_caption_names_hardware_date_commit_command_and_what_is_missing(result: dict[str, Any]) -> None:
    text = caption(result)
    for part in ("NVIDIA H200", "8B", "2026-11-24", "0123456789ab", "benchmarks.sweep gpu --resume", "ngram: not run"):
        assert part in text


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib, extra `bench`, is missing")
def test_files_are_written_with_every_point_and_axes_from_zero(result: dict[str, Any], tmp_path: Path) -> None:
    paths = plot(json.loads(json.dumps(result)), tmp_path / "img")
    assert {path.name for path in paths} == {
        f"{name}.{suffix}"
        for name in ("speed_up", "decode_speed_up", "round_cost", "throughput")
        for suffix in ("png", "svg")
    }
    assert all(path.stat().st_size > 1000 for path in paths)
    drawing = (tmp_path / "img" / "speed_up.svg").read_text()
    line = re.search(r'<g id="line-orthrus">\s*<path d="([^"]*)"', drawing)
    assert line is not None and len(re.findall("[ML]", line[1])) == 3
    assert plot(result, tmp_path / "again")[1].read_bytes() == paths[1].read_bytes()
