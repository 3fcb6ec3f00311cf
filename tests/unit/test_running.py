"""What the doctor says of a running server."""

from __future__ import annotations

import pytest

from sglang_orthrus.cli.running import report, run

INFO = {
    "model_path": "/models/nano",
    "version": "0.5.23",
    "speculative_algorithm": "ORTHRUS",
    "speculative_num_draft_tokens": 32,
}
METRICS = """# TYPE sglang_orthrus:width_cost_seconds gauge
sglang_orthrus:width_cost_seconds{model_name="nano",requests="1",width="1"} 0.005
sglang_orthrus:width_cost_seconds{model_name="nano",requests="1",width="32"} 0.011
sglang_orthrus:width_cost_seconds{model_name="nano",requests="128",width="1"} 0.009
sglang_orthrus:width_cost_seconds{model_name="nano",requests="128",width="32"} 1.75e-01
"""


def counters(width: int, rounds: int, requests: int, tokens: int, seconds: float, plain: float) -> str:
    figures: dict[str, float] = {"rounds": rounds, "requests": requests, "tokens": tokens, "probes": 1}
    figures |= {"seconds": seconds, "plain_seconds": plain}
    return "".join(
        f'sglang_orthrus:width_{name}_total{{model_name="nano",width="{width}"}} {value}\n'
        for name, value in figures.items()
    )


def test_costs_and_rounds_of_every_width_are_shown() -> None:
    text = METRICS + counters(1, 30, 60, 60, 0.3, 0.3) + counters(32, 10, 10, 95, 0.11, 0.55)
    lines = [" ".join(line.split()) for line in report(INFO, text)]
    assert lines[:2] == ["/models/nano, SGLang 0.5.23", "It drafts and verifies blocks of 32 tokens at most."]
    assert lines[3:7] == [
        "Milliseconds of a round, as timed at start-up:",
        "requests width 1 width 32",
        "1 5.00 11.00",
        "128 9.00 175.00",
    ]
    assert lines[-2:] == ["1 75.0% 1 1.0 1.00", "32 25.0% 1 9.5 5.00"]


def test_a_server_without_traffic_has_costs_alone() -> None:
    text = METRICS + counters(1, 0, 0, 0, 0, 0) + counters(32, 0, 0, 0, 0, 0)
    assert list(report(INFO, text))[-1] == "No round has run yet."


@pytest.mark.parametrize(
    ("changes", "metrics", "said"),
    [
        ({}, "", "--enable-metrics"),
        ({}, 'sglang_orthrus:rounds_total{model_name="nano",path="graph"} 3\n', "ORTHRUS_WIDTHS names no other"),
        ({"speculative_algorithm": None}, METRICS, "does not run ORTHRUS"),
    ],
)
def test_what_is_missing_is_said(changes: dict[str, object], metrics: str, said: str) -> None:
    assert said in list(report(INFO | changes, metrics))[-1]


def test_an_address_without_a_server_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"--url http://127\.0\.0\.1:9: no SGLang server answers there"):
        run("http://127.0.0.1:9/v1")
