"""What the counts of a seeded parity run amount to, in one piece or in slices of it. Pure: no server, no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.equality import NEAR_TIE
from benchmarks.common.slices import Slice, check_all

ANSWERS_PER_EXCUSE = 200
# What slices of one run have in common.
SHARED = ("prompts of the whole run", "max new tokens", "slices")
SUMS = ("prompts", "answers", "answers that are not the greedy one", "tokens")
ROUNDS = "tokens and rounds"


def conclude(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Counts with the verdict before them and tokens per cycle behind.

    Args:
        counts: with the differences, and `tokens and rounds` by server and kind of request: those that count as
            (tokens - 1) of every answer, and the rounds that they took.
    """
    differences = counts["differences"]
    are_near = all(found["margin"] is not None and found["margin"] < NEAR_TIE for found in differences)
    return {
        "passed": are_near and len(differences) * ANSWERS_PER_EXCUSE <= counts["answers"],
        **counts,
        **{
            f"tokens per cycle, {server}": {
                label: round(tokens / max(rounds, 1), 3) for label, (tokens, rounds) in sorted(labels.items())
            }
            for server, labels in counts[ROUNDS].items()
        },
    }


def merge(slices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of a run from the results of all its slices, in any order.

    Raises:
        ValueError: if they are not all slices of one run, each once.
    """
    shared = {name: slices[0][name] for name in SHARED}
    for result in slices:
        found = {name: result[name] for name in SHARED}
        if found != shared:
            raise ValueError(f"slices of different runs: {shared} and {found}")
    check_all([Slice(result["slice"], result["slices"]) for result in slices])
    commits = {result["provenance"]["commit"] for result in slices}
    if len(commits) > 1:
        raise ValueError(f"slices of different code: {sorted(commits)}")
    rounds: dict[str, dict[str, Counter[str]]] = {}
    for result in slices:
        for server, labels in result[ROUNDS].items():
            for label, (tokens, number) in labels.items():
                found = rounds.setdefault(server, {}).setdefault(label, Counter())
                found.update({"tokens": tokens, "rounds": number})
    ordered = sorted(slices, key=lambda result: result["slice"])
    return conclude(
        {
            **shared,
            **{name: sum(result[name] for result in slices) for name in SUMS},
            "differences": [found for result in ordered for found in result["differences"]],
            ROUNDS: {
                server: {label: [both["tokens"], both["rounds"]] for label, both in labels.items()}
                for server, labels in rounds.items()
            },
            "provenance of slices": [result["provenance"] for result in ordered],
        }
    )
