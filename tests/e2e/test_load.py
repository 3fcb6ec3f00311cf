"""The benchmark of widths under load, with a few requests: its JSON and its picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load import plot
from benchmarks.load.figures import ADAPTIVE, PLAIN
from benchmarks.load.run import MODES, Runs, Setting, servers
from benchmarks.load.traffic import FOREIGN, MIXED
from sglang_orthrus.cli.demo import NANO

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_load_is_measured_and_drawn(tmp_path: Path) -> None:
    settings = (Setting(MIXED, 2, True), Setting(FOREIGN, 2, False))
    mode = replace(MODES["cpu"], settings=settings, steps=((1.5, 1), (1.5, 3)), shares=(0.5,))
    out = tmp_path / "load.json"
    result: dict[str, Any] = {
        "summary": [],
        "runs": [],
        "steps": {},
        "open": [],
        "provenance": {"gpu": None, "cpu": "some"},
    }
    with servers(mode, NANO, []) as sides:
        described = {name: side.describe() for name, side in sides.items()}
        Runs(mode, NANO, sides, result, out).all()
    assert {name: one["speculative_algorithm"] for name, one in described.items()} == {PLAIN: None, ADAPTIVE: "ORTHRUS"}
    assert all(one["max_total_tokens"] == 16384 and one["start_up_seconds"] > 1 for one in described.values())
    written = json.loads(out.read_text())
    assert [(run["server"], run["traffic"]) for run in written["runs"]] == [
        *((server, MIXED) for server in (PLAIN, "32", "16", "8", "1", ADAPTIVE)),
        *((server, FOREIGN) for server in (PLAIN, ADAPTIVE)),
    ]
    for run in written["runs"]:
        assert run["identical_to_plain"] == run["requests"], run["server"]
        assert run["decode"]["rounds"] > 0 and run["decode"]["tokens_per_second"] > 0
        if run["server"].isdecimal():
            assert list(run["decode"]["widths"]) == [run["server"]]
    fixed = {run["server"]: run["decode"]["tokens_per_cycle"] for run in written["runs"] if run["traffic"] == MIXED}
    # A round that commits a request's last token commits fewer.
    assert fixed["32"] > fixed["16"] > fixed["8"] > 2 and fixed["1"] <= 1
    rows = {(row["traffic"], row["concurrency"]) for row in written["summary"]}
    assert rows == {(MIXED, 2), (FOREIGN, 2)}
    assert all(row["ratio_to_plain"] > 0 for row in written["summary"])
    assert set(written["steps"]) == {PLAIN, "32", ADAPTIVE}
    assert [run["server"] for run in written["open"]] == [PLAIN, "32", ADAPTIVE]
    assert all(0 < run["median_ttft_ms"] <= run["p99_ttft_ms"] for run in written["open"])
    pytest.importorskip("matplotlib")
    for file in plot.draw(written, tmp_path / "img"):
        assert file.stat().st_size > 1000
