"""Figures of structured generation: counts of a run, which add up over slices of the prompts, and rates made of them.

aborted: by the grammar engine, without an answer; preparing_seconds: for a first token of every prompt, grammars
compiled; tokens_per_second: after that, of one server; tokens_per_cycle: (tokens - 1) /
rounds over all answers; repaired, forced: shares of drafts; walk_ms: per round of all requests, taken from within the
buckets of the server's histogram; choose_ms: the part of it that verification waits for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Row = dict[str, Any]

SETTING = ("backend", "whitespace", "server", "prompts", "concurrency")
COUNTS = ("answers", "ended", "aborted", "valid", "identical", "tokens", "rounds", "seconds", "preparing_seconds")
TIMES = ("walk", "choose")
GRAMMAR_COUNTS = ("drafts", *(f"{time}_buckets" for time in TIMES))


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Of a histogram with cumulative counts by upper bound, in milliseconds; None if it is empty or in the last one."""
    bounds = [(0.0, 0.0), *sorted(buckets.items())]
    wanted = share * bounds[-1][1]
    for (low, below), (high, count) in pairwise(bounds):
        if wanted and count >= wanted:
            if high == float("inf"):
                return None
            return round(1e3 * (low + (high - low) * (wanted - below) / (count - below)), 3)
    return None


def grammar_counts(before: Mapping[str, float], after: Mapping[str, float]) -> Row:
    """What grammars did between two readings of the metrics: drafts by change, rounds by the time of their walks."""
    new = {name: value - before.get(name, 0.0) for name, value in after.items()}

    def label(name: str, key: str) -> str:
        return name.partition(f'{key}="')[2].partition('"')[0]

    drafts = {label(name, "change"): value for name, value in new.items() if "drafts_total" in name}
    if not sum(drafts.values()):
        return {}
    found: Row = {"drafts": drafts}
    for time in TIMES:
        buckets = {name: value for name, value in new.items() if f"{time}_seconds_bucket" in name}
        found[f"{time}_buckets"] = {label(name, "le"): value for name, value in buckets.items()}
    return found


def rates(counts: Mapping[str, Any]) -> Row:
    """What a run's counts come to."""
    tokens, rounds, answered = counts["tokens"], counts["rounds"], counts["answers"] - counts["aborted"]
    found: Row = {
        "tokens_per_second": round(tokens / counts["seconds"], 1),
        "tokens_per_cycle": round((tokens - answered) / rounds, 3) if rounds else None,
    }
    if "drafts" in counts:
        drafts = counts["drafts"]
        found |= {change: round(drafts[change] / sum(drafts.values()), 4) for change in ("repaired", "forced")}
    for time in TIMES:
        if f"{time}_buckets" in counts:
            buckets = {float(bound): count for bound, count in counts[f"{time}_buckets"].items()}
            found[f"{time}_ms"] = {"median": quantile(buckets, 0.5), "p99": quantile(buckets, 0.99)}
    return found


def merged(slices: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of a run over all prompts, from the rows of its slices."""
    by_setting: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for rows in slices for row in rows):
        by_setting.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    found = []
    for setting, parts in by_setting.items():
        counts: Row = {key: round(sum(part[key] for part in parts), 3) for key in COUNTS}
        counts["different"] = sorted(name for part in parts for name in part["different"])
        for key in GRAMMAR_COUNTS:
            tables = [part[key] for part in parts if key in part]
            if tables:
                counts[key] = {name: sum(table[name] for table in tables) for name in tables[0]}
        found.append(dict(zip(SETTING, setting, strict=True)) | counts | rates(counts))
    return found
