"""Figures of a load: what the recorder's lines come to."""

from __future__ import annotations

import pytest

from benchmarks.load.figures import Result, decode_figures, summary, timeline


def _results() -> list[Result]:
    """Two requests: a prefill, a step that waited for it, a round of 20 ms, a step of 5 ms; then one of them alone."""
    return [
        Result(1.000, False, False, 2, 1, 1, {"a": (1, 1), "b": (1, 1)}),
        Result(1.010, False, True, 2, 1, 1, {"a": (1, 1), "b": (1, 1)}),
        Result(1.030, False, True, 2, 8, 1, {"a": (1, 6), "b": (1, 2)}),
        Result(1.035, False, True, 2, 1, 1, {"a": (1, 1), "b": (1, 1)}),
        Result(1.045, False, True, 1, 8, 1, {"a": (1, 4)}),
    ]


def test_speed_is_that_of_full_batches_while_they_decode() -> None:
    figures = decode_figures(_results(), 2)
    assert figures["rounds"] == 3
    assert figures["tokens_per_second"] == pytest.approx(12 / 0.03)
    assert figures["tokens_per_cycle"] == 2.0
    assert figures["milliseconds"] == pytest.approx(10.0)


def test_a_result_that_waited_for_a_prefill_to_be_queued_or_to_run_takes_as_long_as_others() -> None:
    """Of the scheduler's order: the prefill is queued, then the result of the round before it is taken in."""
    rows = [
        Result(0.00, False, True, 2, 8, 1, {"a": (2, 6)}),
        Result(0.01, False, True, 2, 8, 1, {"a": (2, 8)}),
        Result(0.05, False, True, 2, 8, 1, {"a": (2, 6)}),
        Result(0.06, False, False, 1, 1, 1, {"a": (1, 1)}),
        Result(0.10, False, True, 2, 8, 1, {"a": (2, 12)}),
        Result(0.11, False, True, 2, 8, 1, {"a": (2, 8)}),
    ]
    figures = decode_figures(rows, 2)
    assert figures["rounds"] == 5 and figures["tokens_per_second"] == pytest.approx(40 / 0.05)
    assert figures["milliseconds"] == pytest.approx(10.0)


def test_it_takes_as_long_as_others_of_its_width_with_about_as_many_requests() -> None:
    def results(width: int, requests: int, milliseconds: float) -> list[Result]:
        times = [1e-3 * milliseconds * number for number in range(6)]
        return [Result(at, False, True, requests, width, 1, {"a": (requests, requests)}) for at in times]

    prefill = Result(0.0, False, False, 1, 1, 1, {"a": (1, 1)})
    late = [
        Result(0.4, False, True, 70, 8, 1, {"a": (70, 490)}),
        Result(0.4, False, False, 1, 1, 1, {}),
        Result(0.5, False, True, 70, 16, 1, {}),
    ]
    rows = [*results(8, 64, 20.0), prefill, *results(8, 128, 40.0), prefill, *results(1, 128, 5.0), prefill, *late]
    figures = decode_figures(rows, 64)
    assert figures["widths"]["8"] == {"rounds": 13, "milliseconds": pytest.approx(29.2308)}
    assert figures["widths"]["1"] == {"rounds": 6, "milliseconds": pytest.approx(5.0)}
    assert "16" not in figures["widths"], "nothing tells what it took"


def test_a_result_that_is_known_to_have_run_takes_what_it_took() -> None:
    """As on a CPU. One that left out all its requests, since they had ended, takes next to nothing."""
    rows = [
        Result(0.00, True, False, 1, 1, 1, {"a": (1, 1)}),
        Result(0.02, True, True, 1, 8, 1, {"a": (1, 8)}),
        Result(0.05, True, True, 1, 8, 1, {"a": (1, 4)}),
        Result(0.05, True, True, 1, 8, 1, {"a": (1, 0)}),
        Result(0.30, True, False, 1, 1, 1, {"a": (1, 1)}),
        Result(0.31, True, True, 1, 8, 1, {"a": (1, 8)}),
    ]
    figures = decode_figures(rows, 1)
    assert figures["tokens_per_second"] == pytest.approx(20 / 0.06) and figures["rounds"] == 4


def test_kinds_and_widths_have_figures_of_their_own() -> None:
    figures = decode_figures(_results(), 2)
    assert figures["kinds"]["a"] == pytest.approx({"tokens_per_second_of_one": 266.6667, "tokens_per_cycle": 2.6667})
    assert figures["kinds"]["b"] == pytest.approx({"tokens_per_second_of_one": 133.3333, "tokens_per_cycle": 1.3333})
    assert figures["widths"] == {"1": {"rounds": 2, "milliseconds": 5.0}, "8": {"rounds": 1, "milliseconds": 20.0}}


def test_a_batch_that_is_not_full_counts_by_its_share() -> None:
    """Three requests take as long as four would: each is as fast as it is."""
    rows = [Result(0.0, False, True, 3, 1, 1, {"a": (3, 3)}), Result(0.1, False, True, 3, 1, 1, {"a": (3, 3)})]
    assert decode_figures(rows, 4)["tokens_per_second"] == pytest.approx(40.0)


def test_rows_of_requests_that_have_ended_cost_what_they_cost() -> None:
    rows = [
        Result(0.0, False, False, 4, 1, 1, {}),
        *(Result(at, False, True, 4, 8, 1, {"a": (4, 12)}) for at in (0.1, 0.2)),
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
