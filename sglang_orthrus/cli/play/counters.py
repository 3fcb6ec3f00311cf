"""What the metrics of ORTHRUS say of drafts under a grammar. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sglang_orthrus.cli.samples import parse


def grammar_drafts(metrics: str) -> Counter[str]:
    """Drafts by what a grammar made of them: `none`, `repaired` or `forced`, from Prometheus's text."""
    counts = Counter[str]()
    for sample in parse(metrics):
        if sample.name == "sglang_orthrus:grammar_drafts_total":
            counts[sample.labels["change"]] += int(sample.value)
    return counts


def since(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    """What was counted in between."""
    return {change: after.get(change, 0) - before.get(change, 0) for change in ("none", "repaired", "forced")}
