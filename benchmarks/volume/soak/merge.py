"""One result of a soak that ran in slices, each with servers of its own, on a machine with many cores.

    python -m benchmarks.volume.soak --seed 1 --first 100000 --minutes 10 --results s1.json   # a slice, on some cores
    python -m benchmarks.volume.soak.merge all.json s*.json

Counts are added. Latencies and memory stay by slice, since slices have servers of their own.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.equality import PROMPTS_PER_EXCUSE
from benchmarks.volume.soak.report import write

_OWN = (
    *("seed", "requests", "failures", "seconds", "requests_per_hour", "in_flight", "ended_early", "tokens_per_cycle"),
    *("latency_seconds", "pool", "resident_memory"),
)


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The slices as one result.

    Raises:
        SystemExit: if they are not of one commit.
    """
    if len({part["provenance"]["commit"] for part in parts}) != 1:
        raise SystemExit("soak.merge: the slices are not of one commit")
    kinds: Counter[str] = Counter()
    for part in parts:
        kinds.update(part["kinds"])
    compared = sum(part["compared_with_plain"] for part in parts)
    found = [tie for part in parts for tie in part["near_ties"]["found"]]
    return {
        "requests": sum(part["requests"] for part in parts),
        "failures": sum(part["failures"] for part in parts),
        "seconds": max(part["seconds"] for part in parts),
        "compared_with_plain": compared,
        "near_ties": {
            "allowed": -(-compared // PROMPTS_PER_EXCUSE),
            "below": parts[0]["near_ties"]["below"],
            "found": found,
        },
        "kinds": dict(sorted(kinds.items())),
        "failed": [failure for part in parts for failure in part["failed"]],
        "plain_too": [failure for part in parts for failure in part["plain_too"]],
        "slices": [{name: part.get(name) for name in _OWN} for part in parts],
        "provenance": parts[0]["provenance"],
    }


def main() -> int:
    """Merge, and return 1 if anything failed."""
    out, *slices = map(Path, sys.argv[1:])
    result = merged([json.loads(path.read_text()) for path in slices])
    write(result, out)
    print(f"{result['requests']} requests in {len(slices)} slices, {result['failures']} failures: {out}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
