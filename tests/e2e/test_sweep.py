"""A small sweep on the bundled checkpoint: what it writes, that answers are equal, and that it can be resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed import sweep
from benchmarks.speed.plot import plot
from benchmarks.speed.prompts import FAMILIES
from benchmarks.speed.sweep import CPU, by_concurrency
from sglang_orthrus.cli.demo import NANO
from tests.servers import SETUP

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
]

# In fp32 on either device, so that answers can be compared as text.
TINY = replace(
    CPU,
    setup=SETUP,
    args=() if SETUP.args != CPU.setup.args else CPU.args,
    contenders=(sweep.PLAIN, sweep.ORTHRUS),
    settings=by_concurrency((1, 2), at_least=5, waves=2, decode_tokens=64),
    check_prompts=2,
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "sweep.json"


@pytest.fixture(scope="module")
def result(out: Path) -> dict[str, Any]:
    sweep.run(TINY, NANO, out)
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def test_every_server_runs_every_setting(result: dict[str, Any]) -> None:
    for server in result["servers"].values():
        assert server["check"] == {"passed": True, "prompts": 2, "divergences": {}}
        assert server["memory"]["token_capacity"] > 0
        assert set(server["points"]) == {"c1", "c2"}
        for point in server["points"].values():
            assert point["serve"]["completed"] == point["serve"]["requests"] == 5
            assert point["serve"]["output_throughput"] > 0
            assert point["serve"]["median_ttft_ms"] > 0
            assert (point["serve"]["idle_ttft_ms"] is not None) == (point is server["points"]["c1"])
            assert set(point["serve"]["families"]) == set(FAMILIES)
            assert point["decode"]["pass_ms"] > 0
            assert point["decode"]["gaps"] > 0


def test_answers_are_those_of_plain_sglang(result: dict[str, Any]) -> None:
    for row in result["report"]["settings"]:
        assert row["peers"]["orthrus"]["identical_answers"] == "5 of 5"
    tokens = [
        [server["points"][name]["serve"]["tokens"] for name in ("c1", "c2")] for server in result["servers"].values()
    ]
    assert tokens[0] == tokens[1]


def test_tokens_per_cycle_are_measured(result: dict[str, Any]) -> None:
    for row in result["report"]["settings"]:
        assert row["peers"]["orthrus"]["tokens_per_cycle"] > 4
        assert row["peers"]["orthrus"]["tokens_per_cycle_json_and_tools"] > 8
        assert row["peers"]["orthrus"]["round_cost"] > 1
    for point in result["servers"]["plain"]["points"].values():
        assert point["serve"]["tokens_per_cycle"] == 1
    # Of the same rounds, whoever runs beside them.
    passes = {point["serve"]["passes"] for point in result["servers"]["orthrus"]["points"].values()}
    assert len(passes) == 1


def test_a_finished_sweep_is_resumed_without_a_server(
    result: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "Server", None)
    # Sources may be edited while tests run; that such a file is refused is tested elsewhere.
    monkeypatch.setattr(sweep, "source_digest", lambda: result["key"]["source"])
    monkeypatch.setattr(
        sweep, "resume_key", lambda _: {key: result["key"][key] for key in ("commit", "gpu", "versions")}
    )
    assert sweep.run(TINY, NANO, out, resume=True)["servers"] == result["servers"]


def test_it_can_be_drawn(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    charts = ("speed_up", "decode_speed_up", "round_cost")
    assert {path.name for path in plot(result, tmp_path)} == {
        f"{name}.{kind}" for name in charts for kind in ("png", "svg")
    }
