"""Figures of a load: what the recorder's lines come to."""

from __future__ import annotations

import pytest

from benchmarks.load.figures import Result, decode_figures, summary, timeline


def _results() -> list[Result]:
    """Two requests: a prefill, a step of 10 ms, a round of 20 ms, a step of 5 ms; then one of them alone."""
    return [
        Result(1.000, False, 2, 1, 1, {"a": (1, 1), "b": (1, 1)}),
        Result(1.010, True, 2, 1, 1, {"a": (1, 1), "b": (1, 1)}),
        Result(1.030, True, 2, 8, 1, {"a": (1, 6), "b": (1, 2)}),
        Result(1.035, True, 2, 1, 1, {"a": (1, 1), "b": (1, 1)}),
        Result(1.045, True, 1, 8, 1, {"a": (1, 4)}),
    ]


def test_speed_is_that_of_full_batches_while_they_decode() -> None:
    figures = decode_figures(_results(), 2)
    assert figures["rounds"] == 3
    assert figures["tokens_per_second"] == pytest.approx(12 / 0.035)
    assert figures["tokens_per_cycle"] == 2.0
    assert figures["milliseconds"] == pytest.approx(35 / 3, abs=1e-4)


def test_a_batch_takes_from_the_end_of_the_one_before_to_its_own() -> None:
    """Beside prefills, too. One that left out all its requests, since they had ended, takes next to nothing."""
    rows = [
        Result(0.00, False, 1, 1, 1, {"a": (1, 1)}),
        Result(0.02, True, 1, 8, 1, {"a": (1, 8)}),
        Result(0.05, True, 1, 8, 1, {"a": (1, 4)}),
        Result(0.05, True, 1, 8, 1, {"a": (1, 0)}),
        Result(0.30, False, 1, 1, 1, {"a": (1, 1)}),
        Result(0.31, True, 1, 8, 1, {"a": (1, 8)}),
    ]
    figures = decode_figures(rows, 1)
    assert figures["tokens_per_second"] == pytest.approx(20 / 0.06) and figures["rounds"] == 4


def test_a_round_of_two_steps_counts_as_two() -> None:
    rows = [Result(0.0, True, 4, 1, 1, {}), Result(0.2, True, 4, 1, 2, {"a": (4, 8)})]
    figures = decode_figures(rows, 4)
    assert figures["tokens_per_cycle"] == 1.0 and figures["tokens_per_second"] == pytest.approx(40.0)
    assert figures["widths"] == {"1": {"rounds": 2, "milliseconds": pytest.approx(100.0)}}
    assert figures["kinds"]["a"]["tokens_per_cycle"] == 1.0


def test_kinds_and_widths_have_figures_of_their_own() -> None:
    figures = decode_figures(_results(), 2)
    assert figures["kinds"]["a"] == pytest.approx({"tokens_per_second_of_one": 228.5714, "tokens_per_cycle": 2.6667})
    assert figures["kinds"]["b"] == pytest.approx({"tokens_per_second_of_one": 114.2857, "tokens_per_cycle": 1.3333})
    assert figures["widths"] == {"1": {"rounds": 2, "milliseconds": 7.5}, "8": {"rounds": 1, "milliseconds": 20.0}}


def test_a_batch_that_is_not_full_counts_by_its_share() -> None:
    """Three requests take as long as four would: each is as fast as it is."""
    rows = [Result(0.0, True, 3, 1, 1, {"a": (3, 3)}), Result(0.1, True, 3, 1, 1, {"a": (3, 3)})]
    assert decode_figures(rows, 4)["tokens_per_second"] == pytest.approx(40.0)


def test_rows_of_requests_that_have_ended_cost_what_they_cost() -> None:
    rows = [
        Result(0.0, False, 4, 1, 1, {}),
        *(Result(at, True, 4, 8, 1, {"a": (4, 12)}) for at in (0.1, 0.2)),
    ]
    figures = decode_figures(rows, 4)
    assert figures["tokens_per_second"] == pytest.approx(120.0)
    assert figures["kinds"]["a"]["tokens_per_second_of_one"] == pytest.approx(30.0)


def test_no_results_give_no_figures() -> None:
    figures = decode_figures([], 4)
    assert figures["tokens_per_second"] is None and figures["rounds"] == 0


def _run(server: str, speed: float, kinds: dict[str, float]) -> dict[str, object]:
    found = {kind: {"tokens_per_second_of_one": of_one} for kind, of_one in kinds.items()}
    decode = {"tokens_per_second": speed, "kinds": found}
    return {"server": server, "traffic": "mixed", "concurrency": 8, "decode": decode}


def test_the_summary_compares_with_plain_and_with_the_best_fixed_width() -> None:
    runs = [
        _run("plain", 100.0, {"a": 10.0, "b": 10.0}),
        _run("32", 220.0, {"a": 40.0, "b": 9.0}),
        _run("8", 200.0, {"a": 30.0, "b": 11.0}),
        _run("ngram", 130.0, {"a": 13.0, "b": 13.0}),
        _run("adaptive", 231.0, {"a": 35.0, "b": 8.0}),
    ]
    (row,) = summary(runs, ["32", "8"], ["ngram"])
    assert row["concurrency"] == 8 and row["traffic"] == "mixed"
    assert row["ratio_to_plain"] == 2.31 and row["ratio_to_best_fixed"] == 1.05
    assert row["kinds"] == {"a": 3.5, "b": 0.8} and row["rivals"] == {"ngram": 1.3}


def test_a_timeline_has_the_width_of_most_rounds() -> None:
    rows = timeline(_results(), 0.02)
    assert [row["width"] for row in rows] == [1, 8, 8]
    assert [row["requests"] for row in rows] == [2, 2, 1]
    assert rows[1]["widths"] == [8, 1] and rows[1]["tokens_per_second"] == pytest.approx(500.0)
