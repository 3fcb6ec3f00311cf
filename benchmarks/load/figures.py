"""Figures of a run from what the recorder wrote. Pure: no server.

A result is a decode step, a round or a prefill. Its time is that from the end of the batch before it to its own end.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

# Servers that are compared.
ADAPTIVE, PLAIN = "adaptive", "plain"
# Results of fewer requests, as a share of the concurrency, come before the first or after the last requests.
FULL = 0.6


class Result(NamedTuple):
    """A line of the recorder's file.

    Attributes:
        at: when the batch had run, in seconds of a monotonic clock.
        is_decode: whether it is a decode step or round; a prefill otherwise.
        requests: in the batch.
        width: of the round; 1 for plain decoding.
        steps: decode steps of the round; more than one only at width 1.
        kinds: (requests, tokens) by kind.
    """

    at: float
    is_decode: bool
    requests: int
    width: int
    steps: int
    kinds: Mapping[str, Sequence[int]]

    @property
    def tokens(self) -> int:
        """Committed by all requests."""
        return sum(tokens for _, tokens in self.kinds.values())


def parse(line: Sequence[Any]) -> Result:
    """Of a decoded line."""
    at, is_decode, *others = line
    return Result(at, bool(is_decode), *others)


def decode_figures(results: Sequence[Result], concurrency: int) -> dict[str, Any]:
    """Speed while `concurrency` requests decode, overall, by kind and by width.

    - `tokens_per_second`: of all requests. A batch with fewer requests counts by its share;
    - `kinds`: by kind, tokens per second of one request, and tokens per cycle;
    - `widths`: rounds and mean milliseconds of a round by width; a round of two steps counts as two.
    """
    rows = _timed(results, FULL * concurrency)
    request_seconds = sum(result.requests * seconds for result, seconds in rows)
    tokens = sum(result.tokens for result, _ in rows)
    request_rounds = sum(
        count * result.steps for result, _ in rows for count, committed in result.kinds.values() if committed
    )
    return {
        "tokens_per_second": _rounded(concurrency * tokens / request_seconds if request_seconds else None),
        "tokens_per_cycle": _rounded(tokens / request_rounds if request_rounds else None),
        "rounds": len(rows),
        "milliseconds": _rounded(1e3 * sum(seconds for _, seconds in rows) / len(rows) if rows else None),
        "kinds": _by_kind(rows),
        "widths": _by_width(rows),
    }


def _timed(results: Sequence[Result], least: float) -> list[tuple[Result, float]]:
    """Decode results of so many requests, and their times."""
    return [
        (result, result.at - before.at)
        for before, result in pairwise(results)
        if result.is_decode and result.requests >= least
    ]


def _by_kind(rows: Iterable[tuple[Result, float]]) -> dict[str, dict[str, float | None]]:
    seconds: defaultdict[str, float] = defaultdict(float)
    rounds: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for result, took in rows:
        for kind, (requests, committed) in result.kinds.items():
            seconds[kind] += requests * took
            rounds[kind] += requests * result.steps
            tokens[kind] += committed
    return {
        kind: {
            "tokens_per_second_of_one": _rounded(tokens[kind] / seconds[kind]),
            "tokens_per_cycle": _rounded(tokens[kind] / rounds[kind]),
        }
        for kind in sorted(seconds)
    }


def _by_width(rows: Iterable[tuple[Result, float]]) -> dict[str, dict[str, float | None]]:
    seconds: defaultdict[int, float] = defaultdict(float)
    steps: Counter[int] = Counter()
    for result, took in rows:
        seconds[result.width] += took
        steps[result.width] += result.steps
    return {
        str(width): {"rounds": count, "milliseconds": _rounded(1e3 * seconds[width] / count)}
        for width, count in sorted(steps.items())
    }


def timeline(results: Sequence[Result], seconds: float = 0.1) -> list[dict[str, Any]]:
    """Tokens per second, requests and width of successive spans of time; the width is that of most rounds."""
    rows = []
    for number, group in groupby(results, lambda result: int((result.at - results[0].at) / seconds)):
        found = list(group)
        decoded = [result for result in found if result.is_decode]
        widths = Counter(result.width for result in decoded)
        rows.append(
            {
                "second": round(number * seconds, 3),
                "requests": max(result.requests for result in found),
                "width": widths.most_common(1)[0][0] if widths else None,
                "widths": [result.width for result in decoded],
                "tokens_per_second": round(sum(result.tokens for result in found) / seconds, 1),
            }
        )
    return rows


def summary(
    runs: Sequence[Mapping[str, Any]], fixed: Sequence[str], rivals: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Ratios of the adaptive server's speed to plain SGLang's and to the best fixed width's, by traffic.

    `kinds` of a mix compares the speed of one request of every kind, `rivals` theirs to plain SGLang's.
    """
    speeds = {(run["server"], run["traffic"], run["concurrency"]): run["decode"] for run in runs}
    rows = []
    for (server, traffic, concurrency), ours in speeds.items():
        theirs = speeds.get((PLAIN, traffic, concurrency))
        if server != ADAPTIVE or theirs is None:
            continue
        others = [speeds[key] for name in fixed if (key := (name, traffic, concurrency)) in speeds]
        best = max((other["tokens_per_second"] for other in others), default=None)
        ratios = {
            rival: _rounded(speeds[key]["tokens_per_second"] / theirs["tokens_per_second"])
            for rival in rivals
            if (key := (rival, traffic, concurrency)) in speeds
        }
        kinds = {
            kind: _rounded(own["tokens_per_second_of_one"] / theirs["kinds"][kind]["tokens_per_second_of_one"])
            for kind, own in ours["kinds"].items()
            if len(ours["kinds"]) > 1 and theirs["kinds"].get(kind, {}).get("tokens_per_second_of_one")
        }
        rows.append(
            {
                "concurrency": concurrency,
                "traffic": traffic,
                "ratio_to_plain": _rounded(ours["tokens_per_second"] / theirs["tokens_per_second"]),
                "ratio_to_best_fixed": _rounded(ours["tokens_per_second"] / best) if best else None,
                **({"kinds": kinds} if kinds else {}),
                **({"rivals": ratios} if ratios else {}),
            }
        )
    return sorted(rows, key=lambda row: (row["traffic"], row["concurrency"]))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
