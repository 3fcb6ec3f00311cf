"""One result of a soak that ran in slices, each with servers of its own, on a machine with many cores.

    python -m benchmarks.volume.soak --seed 1 --first 100000 --minutes 10 --results s1.json   # a slice, on some cores
    python -m benchmarks.volume.soak.merge all.json s*.json

Counts are added. Latencies and memory stay by slice, since slices have servers of their own. Failures are judged again
by the checks of today: a check may have been wrong, and slices take hours of processor time. What is a failure no more
stays in the result, as `excused`, with what the slice said of it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.equality import PROMPTS_PER_EXCUSE
from benchmarks.common.provenance import commit
from benchmarks.volume.soak.checks import check
from benchmarks.volume.soak.client import Answer, Reply
from benchmarks.volume.soak.report import write
from benchmarks.volume.soak.requests import ABORT_ALL, Mix

_OWN = (
    *("seed", "requests", "failures", "seconds", "requests_per_hour", "in_flight", "ended_early", "tokens_per_cycle"),
    *("latency_seconds", "pool", "resident_memory"),
)


def judged_again(failure: Mapping[str, Any], mix: Mix, in_flight: int) -> list[str]:
    """The problems of a failure of a slice that are left. `mix`: the slice's requests."""
    if failure["request"] is None:
        return list(failure["problems"])
    request = mix.request(failure["request"]["number"])
    answers = [Answer(**answer) for answer in failure["ours"]["answers"]]
    reply = Reply(**{**failure["ours"], "answers": answers})
    near = range(max(0, request.number - in_flight), request.number + in_flight)
    if reply.aborted and any(mix.request(number).kind == ABORT_ALL for number in near):
        return []
    # Others may have been compared with plain SGLang, which is not here.
    return list(failure["problems"]) if request.greedy else check(request, reply)


def merged(parts: Sequence[Mapping[str, Any]], processor: str | None = None) -> dict[str, Any]:
    """The slices as one result.

    processor: SGLang's custom processor in their requests.

    Raises:
        SystemExit: if they are not of one commit.
    """
    if len({part["provenance"]["commit"] for part in parts}) != 1:
        raise SystemExit("soak.merge: the slices are not of one commit")
    kinds: Counter[str] = Counter()
    for part in parts:
        kinds.update(part["kinds"])
    left: list[Any] = []
    excused: list[Any] = []
    for part in parts:
        mix = Mix(part["seed"], processor=processor)
        for failure in part["failed"]:
            problems = judged_again(failure, mix, part["in_flight"])
            (left if problems else excused).append(failure)
    compared = sum(part["compared_with_plain"] for part in parts)
    found = [tie for part in parts for tie in part["near_ties"]["found"]]
    return {
        "requests": sum(part["requests"] for part in parts),
        "failures": sum(part["failures"] for part in parts) - len(excused),
        "seconds": max(part["seconds"] for part in parts),
        "compared_with_plain": compared,
        "near_ties": {
            "allowed": -(-compared // PROMPTS_PER_EXCUSE),
            "below": parts[0]["near_ties"]["below"],
            "found": found,
        },
        "kinds": dict(sorted(kinds.items())),
        "failed": left,
        "excused": excused,
        "plain_too": [failure for part in parts for failure in part["plain_too"]],
        "slices": [
            {name: part.get(name) for name in _OWN} | {"settings": part["provenance"].get("settings", {})}
            for part in parts
        ],
        "provenance": parts[0]["provenance"],
        "judged_by": commit(),
    }


def main() -> int:
    """Merge, and return 1 if anything failed."""
    out, *slices = map(Path, sys.argv[1:])
    from benchmarks.volume.soak.run import processor

    result = merged([json.loads(path.read_text()) for path in slices], processor())
    write(result, out)
    print(f"{result['requests']} requests in {len(slices)} slices, {result['failures']} failures: {out}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
