"""The sweep's arithmetic, its report, its comparison, and when a file may be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.common.equality import Answer
from benchmarks.common.greedy import MAX_NEW_TOKENS, Prompt
from benchmarks.common.widen import SHAPES
from benchmarks.speed import compare, sweep
from benchmarks.speed.load import Load, is_complete, request_of
from benchmarks.speed.measures import (
    SERVE_METRICS,
    Request,
    chunks_of,
    decode_measures,
    gaps_while_all_decode,
    serve_measures,
    tokens_per_cycle,
)
from benchmarks.speed.prompts import FAMILIES, LONGEST, PromptPool, in_turn
from benchmarks.speed.published import PUBLISHED, published_for, released_shape
from benchmarks.speed.report import report, table
from benchmarks.speed.sweep import CPU, GPU, Contender, Mode, Selection, SweepError
from sglang_orthrus.cli.demo import NANO

TINY = replace(CPU, settings=sweep.by_concurrency((1, 2), 4, 2, 16), check_prompts=2)


def request(first: float, *gaps: float, tokens_per_chunk: int = 1, family: str = "json", text: str = "x") -> Request:
    """A request whose chunks come after `gaps` seconds."""
    tokens = 1 + tokens_per_chunk * len(gaps)
    chunks = tuple((gap, tokens_per_chunk) for gap in gaps)
    return Request(family, first, 0.5, 0.5 + sum(gaps), chunks, tokens, len(gaps), text)


def point(pass_ms: float, throughput: float, cycle: float = 1.0, answers: str = "a b") -> dict[str, Any]:
    """A point with the figures that the report reads."""
    family = {"requests": 1, "tokens": 101, "passes": round(100 / cycle), "decode_s": 100 / throughput}
    return {
        "serve": {
            **dict.fromkeys(SERVE_METRICS, 1.0),
            "output_throughput": throughput,
            "median_ttft_ms": 20.0,
            "idle_ttft_ms": 10.0,
            "tokens_per_cycle": cycle,
            "families": {"json": family, "prose": family},
            "answers": answers,
        },
        "decode": {"pass_ms": pass_ms, "server_pass_ms": pass_ms},
        "gpu_mib": 1000,
    }


def result(mode: Mode = TINY, **servers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A result file's content, from server -> setting -> point."""
    arguments = sweep.describe(mode, NANO)
    arguments["model"]["released_shape"] = "8B"
    return {
        "arguments": arguments,
        "key": {"commit": "abc"},
        "servers": {
            label: {"points": points, "memory": {"token_capacity": 100}, "starts": [{"machine": "here"}]}
            for label, points in servers.items()
        },
    }


# What the load generator gives


def test_chunks_are_recovered_from_latencies_per_token() -> None:
    # SGLang writes a chunk of 4 tokens after 0.2 s as four times 0.05.
    assert chunks_of([0.05] * 4 + [0.3] + [0.1] * 2) == ((0.2, 4), (0.3, 1), (0.2, 2))
    assert chunks_of([]) == ()


def test_rounds_are_recovered_from_the_accept_length() -> None:
    output = SimpleNamespace(
        start_time=3.0,
        ttft=0.5,
        latency=2.0,
        itl=[0.1] * 10,
        output_len=11,
        spec_accept_length=11 / 3,
        generated_text="",
    )
    found = request_of(Prompt("json/0", "json", (1,)), output)
    assert (found.passes, found.first, found.tokens) == (3, 3.5, 11)
    output.spec_accept_length = 0.0
    assert request_of(Prompt("json/0", "json", (1,)), output).passes == 10


def test_a_cut_answer_is_a_failure() -> None:
    load = Load((), 1, new_tokens=8, to_the_end=False)
    assert is_complete(SimpleNamespace(success=True, output_len=8), load)
    assert not is_complete(SimpleNamespace(success=True, output_len=5), load)
    assert is_complete(SimpleNamespace(success=True, output_len=5), replace(load, to_the_end=True))
    assert not is_complete(SimpleNamespace(success=False, output_len=5), replace(load, to_the_end=True))


# Measures


def test_gaps_count_only_while_all_decode() -> None:
    early = request(0.0, 1.0, 1.0, 1.0)  # chunks at 0, 1, 2, 3
    late = request(0.9, 0.5, 0.5)  # at 0.9, 1.4, 1.9
    assert sorted(gaps_while_all_decode([early, late], 2)) == pytest.approx([0.5, 0.5])
    late = request(0.9, 0.5, 0.5, 0.5, 0.5)  # until 2.9: the early one's gap from 1 to 2 counts as well
    assert sorted(gaps_while_all_decode([early, late], 2)) == pytest.approx([0.5, 0.5, 0.5, 0.5, 1.0])


def test_one_request_after_another_decodes_alone() -> None:
    assert len(gaps_while_all_decode([request(0.0, 1.0, 1.0), request(5.0, 1.0, 1.0)], 1)) == 4


def test_pass_times_are_those_of_rounds_not_of_tokens() -> None:
    found = decode_measures([request(0.0, 0.04, 0.05, 0.06, tokens_per_chunk=8)], 1, [0.05, 0.07, 0.06])
    assert found["pass_ms"] == found["mean_pass_ms"] == pytest.approx(50)
    assert found["server_pass_ms"] == pytest.approx(60)
    assert found["chunks_per_pass"] == 1


def test_merged_chunks_show() -> None:
    merged = replace(request(0.0, 0.1, 0.1), passes=4)
    found = decode_measures([merged], 1)
    assert found["chunks_per_pass"] == 0.5
    assert (found["pass_ms"], found["mean_pass_ms"], found["server_pass_ms"]) == (100, 50, None)


def test_tokens_per_cycle_leave_out_the_first_token() -> None:
    assert tokens_per_cycle([request(0, 1, 1, tokens_per_chunk=4), request(0, 1, tokens_per_chunk=1)]) == 3
    assert tokens_per_cycle([request(0, 1, 1)]) == 1


def test_families_are_counted_apart() -> None:
    requests = [request(0, 1, 1, tokens_per_chunk=4, family="json"), request(0, 1, family="prose")]
    found = serve_measures(dict.fromkeys(SERVE_METRICS, 2.0), requests)
    assert found["families"]["json"] == {"requests": 1, "tokens": 9, "passes": 2, "decode_s": 2}
    assert found["families"]["prose"]["tokens"] == 2
    assert len(found["answers"].split()) == 2


# Prompts


def test_families_take_turns_without_repeats() -> None:
    prompts = [Prompt(f"{f}/{i}", f, (i // 2, len(f))) for f in ("json", "prose") for i in range(4)]
    names = [prompt.name for prompt in in_turn(prompts, ("prose", "json"), 9)]
    assert names == ["prose/0", "json/0", "prose/2", "json/2"]
    assert not list(in_turn(prompts, ("json",), 1))


def test_prompts_have_the_length_asked_for_and_share_no_history() -> None:
    pool = PromptPool(NANO)
    plain = pool.take(10)
    assert [prompt.family for prompt in plain] == [*FAMILIES, *FAMILIES]
    assert max(len(prompt.ids) for prompt in plain) <= LONGEST
    long = pool.take(6, 3000)
    assert {len(prompt.ids) for prompt in long} == {3000}
    assert len({prompt.ids[:64] for prompt in long}) == 6
    assert long == PromptPool(NANO).take(6, 3000)
    with pytest.raises(ValueError, match="found"):
        pool.take(10**5)


def test_every_setting_finds_its_prompts() -> None:
    pool = PromptPool(NANO)
    for mode in (CPU, GPU):
        for setting in mode.settings:
            if setting.context is None:
                assert len(pool.take(setting.requests)) >= setting.decodes


def test_the_gpu_sweep_covers_the_issue_and_fits_the_widened_context() -> None:
    assert [s.concurrency for s in GPU.settings if s.context is None] == [1, 2, 4, 8, 16, 32, 64, 128]
    contexts = [s.context for s in GPU.settings if s.context is not None]
    assert (contexts[0], contexts[-1]) == (512, 40000)
    assert contexts[-1] + MAX_NEW_TOKENS < 40960
    assert [contender.label for contender in GPU.contenders] == ["plain", "orthrus", "ngram", "plain_again"]


# Report


def test_the_report_gives_cost_break_even_and_speed_up() -> None:
    found = report(
        result(
            plain={"c1": point(10, 100)},
            orthrus={"c1": point(22, 400, cycle=11, answers="a c")},
            plain_again={"c1": point(12, 100)},
        )
    )
    (row,) = found["settings"]
    peer = row["peers"]["orthrus"]
    assert row["plain_step_ms"] == 11
    assert row["drift"] == {"step": 1.2, "throughput": 1}
    assert peer["round_cost"] == peer["break_even_tokens_per_cycle"] == 2
    assert peer["speed_up"] == peer["decode_speed_up"] == peer["decode_speed_up_json_and_tools"] == 4
    assert peer["tokens_per_cycle_json_and_tools"] == pytest.approx(11, rel=0.02)
    assert peer["identical_answers"] == "1 of 2"
    computed = {entry["task"]: entry["speed_up"] for entry in peer["computed"]}
    assert computed["GSM8K"] == pytest.approx(10.6 / 2)
    assert found["memory"]["orthrus"] == {"token_capacity": 100, "peak_gpu_mib": 1000}
    assert "orthrus" in table(found)


def test_a_loss_is_reported_as_one() -> None:
    (row,) = report(result(plain={"c2": point(10, 100)}, orthrus={"c2": point(60, 50, cycle=2)}))["settings"]
    assert row["peers"]["orthrus"]["speed_up"] == 0.5
    assert row["drift"] is None


def test_an_unfinished_sweep_has_a_report() -> None:
    assert report(result())["settings"] == []
    (row,) = report(result(plain={"c1": point(10, 100)}, orthrus={}))["settings"]
    assert row["peers"] == {}
    unmeasured = point(10, 100)
    unmeasured["decode"] = {"pass_ms": None, "server_pass_ms": None}
    (row,) = report(result(plain={"c1": point(10, 100)}, orthrus={"c1": unmeasured}))["settings"]
    assert row["peers"]["orthrus"]["round_cost"] is None
    assert "-" in table({"settings": [row], "machines": []})


def test_pieces_from_several_machines_are_pointed_out() -> None:
    content = result(plain={"c1": point(10, 100)}, orthrus={"c1": point(10, 100)})
    assert "several machines" not in table(report(content))
    content["servers"]["orthrus"]["starts"][0]["machine"] = "there"
    assert "several machines" in table(report(content))


def test_published_figures_belong_to_released_shapes() -> None:
    assert {figure.shape for figure in PUBLISHED} <= set(SHAPES)
    for name, width in SHAPES.items():
        assert released_shape({"hidden_size": width.hidden, "num_hidden_layers": width.layers}) == name
    assert released_shape(json.loads((NANO / "config.json").read_text())) is None
    assert published_for(None) == []


# Answers

NO_SERVER: Any = None


def expected(*gaps: float) -> list[dict[str, Any]]:
    ranked = tuple(((-0.1, 5), (-0.1 - gap, 6)) for gap in gaps)
    return [sweep.keep(Answer((1, 2, 3), 0, ranked))]


@pytest.mark.parametrize(("gap", "passed"), [(1e-6, True), (0.5, False)])
def test_answers_may_part_at_near_ties_only(gap: float, passed: bool) -> None:
    prompts = [Prompt("json/0", "json", (1,))]
    tally = sweep.compare(prompts, expected(1.0, gap, 1.0), [Answer((1, 9, 3), 1)], CPU.setup)
    assert tally.passed is passed
    assert sweep.compare(prompts, expected(1.0, gap, 1.0), [Answer((1, 2, 3), 1)], CPU.setup).divergences == {}


def test_another_answer_ends_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt("json/0", "json", (1,))]
    monkeypatch.setattr(sweep, "collect", lambda *_: [Answer((1, 9, 3), 1)])
    content = result(orthrus={}, ngram={}) | {"expected": expected(1, 1, 1)}
    with pytest.raises(SweepError, match="orthrus does not give plain SGLang's answers"):
        sweep.check(CPU, sweep.ORTHRUS, NO_SERVER, prompts, content)
    sweep.check(CPU, sweep.NGRAM, NO_SERVER, prompts, content)
    assert content["servers"]["ngram"]["check"]["passed"] is False


# Resuming


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replaces the measuring of a server by a note of what it was asked for."""
    notes: list[tuple[str, str]] = []

    def measure(
        mode: Mode, contender: Contender, model: Path, settings: Any, pool: Any, content: Any, out: Path
    ) -> None:
        record = content["servers"].setdefault(contender.label, {"points": {}, "memory": {}})
        for setting in settings:
            notes.append((contender.label, setting.name))
            record["points"][setting.name] = point(10, 100)
            sweep.write(content, out)

    monkeypatch.setattr(sweep, "measure_server", measure)
    return notes


def test_resuming_measures_what_is_missing(tmp_path: Path, measured: list[tuple[str, str]]) -> None:
    out = tmp_path / "out.json"
    sweep.run(TINY, NANO, out, selection=Selection(servers=frozenset({"plain"}), settings=frozenset({"c1"})))
    assert measured == [("plain", "c1")]
    content = sweep.run(TINY, NANO, out, resume=True)
    assert measured[1:] == [
        *(("plain", "c2"), ("orthrus", "c1"), ("orthrus", "c2"), ("plain_again", "c1"), ("plain_again", "c2"))
    ]
    assert "libcuda" in content["servers"]["ngram"]["skipped"]
    assert len(content["resumed"]) == 1
    before = len(measured)
    sweep.run(TINY, NANO, out, resume=True)
    assert len(measured) == before
    sweep.run(TINY, NANO, out)
    assert len(measured) == before + 6


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda key: key.update(commit="other"), "commit"),
        (lambda key: key.update(gpu="another"), "gpu"),
        (lambda key: key.update(source="other"), "source"),
        (lambda key: key["arguments"]["model"].update(sha256="other"), "arguments.model.sha256"),
        (lambda key: key["arguments"]["args"].append("--page-size"), "arguments.args"),
    ],
)
def test_another_sweep_is_not_resumed(
    tmp_path: Path, measured: list[tuple[str, str]], change: Callable[[dict[str, Any]], None], named: str
) -> None:
    out = tmp_path / "out.json"
    content = sweep.run(TINY, NANO, out)
    change(content["key"])
    out.write_text(json.dumps(content))
    before = len(measured)
    with pytest.raises(SweepError, match=f"these differ: {named}$"):
        sweep.run(TINY, NANO, out, resume=True)
    assert len(measured) == before


def test_a_result_file_in_the_tree_does_not_hinder_resuming() -> None:
    same: dict[str, Any] = {"gpu": None, "versions": {}}
    assert sweep.resume_key({"commit": "abc-dirty", **same}) == sweep.resume_key({"commit": "abc", **same})


# Comparing


def test_comparing_lists_every_figure_of_either_sweep() -> None:
    first = result(plain={"c1": point(10, 100)})
    second = result(plain={"c1": point(20, 150), "c2": point(10, 100)})
    found = {(one.setting, one.metric): one for one in compare.compare(first, second)}
    assert found["c1", "pass_ms"].ratio == 2
    assert found["c1", "output_throughput"].ratio == 1.5
    assert found["c2", "pass_ms"].first is None and found["c2", "pass_ms"].ratio is None
    assert len(found) == 2 * len(compare.METRICS)
    assert "2.000" in compare.table(list(found.values()))
