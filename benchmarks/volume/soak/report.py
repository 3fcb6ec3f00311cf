"""Figures of a soak: latencies, growth of memory, counts. Pure."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.volume.soak.client import Reply
from benchmarks.volume.soak.requests import Request


def percentile(values: Sequence[float], share: float) -> float | None:
    """By rank; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def latencies(pairs: Iterable[tuple[Request, Reply]]) -> dict[str, Any]:
    """Of requests that ran to their end, in seconds; overall and by interface."""
    groups: dict[str, list[float]] = {"all": []}
    for request, reply in pairs:
        if request.act in ("whole", "stream") and reply.status == 200 and not reply.aborted:
            groups["all"].append(reply.seconds)
            groups.setdefault(request.kind.partition(":")[0], []).append(reply.seconds)
    return {
        name: {
            "requests": len(values),
            "p50": _rounded(percentile(values, 0.5)),
            "p99": _rounded(percentile(values, 0.99)),
        }
        for name, values in groups.items()
    }


def growth(samples: Sequence[tuple[int, float]]) -> dict[str, float] | None:
    """Resident memory over the last half of a run.

    Args:
        samples: (requests so far, MiB).

    Returns:
        MiB per 1,000 requests by least squares, and the line's rise over the half; None with fewer than four samples.
    """
    half = samples[len(samples) // 2 :]
    if len(half) < 2 or len(samples) < 4 or half[0][0] == half[-1][0]:
        return None
    mean_x = sum(x for x, _ in half) / len(half)
    mean_y = sum(y for _, y in half) / len(half)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in half) / sum((x - mean_x) ** 2 for x, _ in half)
    return {
        "mib_per_1000_requests": round(slope * 1000, 3),
        "mib_in_the_last_half": round(slope * (half[-1][0] - half[0][0]), 2),
        "requests": half[-1][0] - half[0][0],
        "from_mib": round(half[0][1], 1),
        "to_mib": round(half[-1][1], 1),
    }


def memory_report(samples: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Growth per process and of all, and a few of the samples."""
    names = sorted({name for _, sizes in samples for name in sizes})
    by_name = {name: growth([(count, sizes[name]) for count, sizes in samples if name in sizes]) for name in names}
    every = max(1, len(samples) // 40)
    return {
        "growth": {"all": growth([(count, sum(sizes.values())) for count, sizes in samples]), **by_name},
        "samples": [[count, dict(sizes)] for count, sizes in samples[::every]],
    }


def kinds(requests: Iterable[Request]) -> dict[str, int]:
    """How many requests had each option: a request counts for its interface, its act and all of its words."""
    counts: Counter[str] = Counter()
    for request in requests:
        interface, _, words = request.kind.partition(": ")
        counts[interface if interface != "control" else request.kind] += 1
        if interface != "control":
            counts.update(word for word in words.split(", ") if word)
    return dict(sorted(counts.items()))


def write(result: Mapping[str, Any], out: Path) -> None:
    """In one go: a reader never finds half a file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
