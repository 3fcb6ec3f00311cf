"""What a sweep's points say: per setting, round cost, break-even, speed-up and drift. Pure: JSON in, JSON out.

- *round cost*: time of a round over plain SGLang's step at the same setting, both decode-only;
- *break-even tokens per cycle*: the same number. Fewer tokens per cycle are a loss;
- *speed-up*: output tokens per second, end to end, prefills included, over plain SGLang's;
- *decode speed-up*: the same from the first token on, for all prompts and for JSON and tool calls alone;
- *computed*: published tokens per cycle over the measured round cost. Not measured.

Plain SGLang's figure is the mean of its first and its last run; *drift* is the last over the first.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.speed.published import published_for

Json = Mapping[str, Any]
BASELINES = ("plain", "plain_again")
STRUCTURED = ("json", "tools")


def report(result: Json) -> dict[str, Any]:
    """Over all settings that plain SGLang and another server finished, and the servers' memory."""
    rows = (row(result, setting) for setting in result["arguments"]["settings"])
    return {
        "settings": [found for found in rows if found is not None],
        "memory": memory(result),
        "machines": machines(result),
    }


def machines(result: Json) -> list[str]:
    """On which GPUs or hosts the servers ran. If there are several, ratios between servers are not to be trusted."""
    starts = (start for server in result["servers"].values() for start in server.get("starts", ()))
    return sorted({start["machine"] for start in starts})


def row(result: Json, setting: Json) -> dict[str, Any] | None:
    """One setting; None if plain SGLang has not run it."""
    points = {
        label: server["points"][setting["name"]]
        for label, server in result["servers"].items()
        if setting["name"] in server.get("points", {})
    }
    plain = [points[label] for label in BASELINES if label in points]
    if not plain:
        return None
    shape = result["arguments"]["model"]["released_shape"]
    return {
        **{key: setting[key] for key in ("name", "concurrency", "context")},
        "plain_step_ms": mean_of(plain, "decode", "pass_ms"),
        "plain_throughput": mean_of(plain, "serve", "output_throughput"),
        "drift": drift(plain),
        "peers": {label: peer(points[label], plain, shape) for label in points if label not in BASELINES},
    }


def peer(point: Json, plain: Sequence[Json], shape: str | None) -> dict[str, Any]:
    """One speculating server against plain SGLang at one setting."""
    cost = ratio(point["decode"]["pass_ms"], mean_of(plain, "decode", "pass_ms"))
    return {
        "round_ms": point["decode"]["pass_ms"],
        "round_cost": cost,
        "round_cost_by_server": ratio(point["decode"]["server_pass_ms"], mean_of(plain, "decode", "server_pass_ms")),
        "break_even_tokens_per_cycle": cost,
        "tokens_per_cycle": point["serve"]["tokens_per_cycle"],
        "throughput": point["serve"]["output_throughput"],
        "speed_up": ratio(point["serve"]["output_throughput"], mean_of(plain, "serve", "output_throughput")),
        "decode_speed_up": decode_speed_up(point, plain),
        "decode_speed_up_json_and_tools": decode_speed_up(point, plain, STRUCTURED),
        "tokens_per_cycle_json_and_tools": family_tokens_per_cycle(point, STRUCTURED),
        "ttft_ratio": ratio(point["serve"]["median_ttft_ms"], mean_of(plain, "serve", "median_ttft_ms")),
        "idle_ttft_ratio": ratio(point["serve"]["idle_ttft_ms"], mean_of(plain, "serve", "idle_ttft_ms")),
        "identical_answers": identical(point, plain[0]),
        "computed": [
            {
                "task": figure.task,
                "tokens_per_cycle": figure.tokens_per_cycle,
                "speed_up": ratio(figure.tokens_per_cycle, cost),
                "source": figure.source,
            }
            for figure in published_for(shape)
        ],
    }


def drift(plain: Sequence[Json]) -> dict[str, float | None] | None:
    """Plain SGLang's last run over its first."""
    if len(plain) < 2:
        return None
    first, last = plain
    return {
        "step": ratio(last["decode"]["pass_ms"], first["decode"]["pass_ms"]),
        "throughput": ratio(last["serve"]["output_throughput"], first["serve"]["output_throughput"]),
    }


def memory(result: Json) -> dict[str, Any]:
    """Each server's weights and KV pool as SGLang states them, and the most GPU memory seen in use."""
    return {
        label: {
            **server["memory"],
            "peak_gpu_mib": max((point["gpu_mib"] or 0 for point in server["points"].values()), default=0) or None,
        }
        for label, server in result["servers"].items()
        if "memory" in server
    }


def decode_speed_up(point: Json, plain: Sequence[Json], families: Iterable[str] | None = None) -> float | None:
    """Decoded tokens per second of a request over plain SGLang's."""
    speeds = [decode_speed(one, families) for one in plain]
    return ratio(decode_speed(point, families), statistics.mean(speeds))


def decode_speed(point: Json, families: Iterable[str] | None = None) -> float:
    """Tokens after the first per second from the first token on, over the requests of these families, or of all."""
    groups = _groups(point, families)
    seconds = sum(group["decode_s"] for group in groups)
    return sum(group["tokens"] - group["requests"] for group in groups) / seconds if seconds else 0.0


def family_tokens_per_cycle(point: Json, families: Iterable[str]) -> float | None:
    """Tokens per cycle over the requests of these families."""
    groups = _groups(point, families)
    return ratio(sum(group["tokens"] - group["requests"] for group in groups), sum(group["passes"] for group in groups))


def identical(point: Json, plain: Json) -> str:
    """How many answers are plain SGLang's, as "n of m"."""
    pairs = list(zip(point["serve"]["answers"].split(), plain["serve"]["answers"].split(), strict=True))
    return f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)}"


def mean_of(points: Sequence[Json], part: str, key: str) -> float | None:
    """Mean over the points that have a value."""
    values = [point[part][key] for point in points if point[part][key] is not None]
    return round(statistics.mean(values), 4) if values else None


def ratio(value: float | None, base: float | None) -> float | None:
    """None where one of them is missing or the base is 0."""
    return round(value / base, 3) if value is not None and base else None


def table(found: Json) -> str:
    """The report as aligned text."""
    figures = ("round_ms", "round_cost", "tokens_per_cycle", "speed_up", "ttft_ratio", "idle_ttft_ratio")
    titles = ("round ms", "cost = break-even", "tok/cycle", "speed-up", "TTFT", "idle TTFT")
    rows: list[tuple[str, ...]] = [("setting", "server", "step ms", *titles, "identical")]
    for line in found["settings"]:
        for label, values in line["peers"].items():
            numbers = (line["plain_step_ms"], *(values[key] for key in figures))
            cells = ("-" if number is None else f"{number:.2f}" for number in numbers)
            rows.append((line["name"], label, *cells, values["identical_answers"]))
    warning = "\nmeasured on several machines: compare with care" if len(found["machines"]) > 1 else ""
    return aligned(rows) + warning


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns, right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _groups(point: Json, families: Iterable[str] | None) -> list[Json]:
    chosen = point["serve"]["families"] if families is None else families
    return [point["serve"]["families"][family] for family in chosen if family in point["serve"]["families"]]
