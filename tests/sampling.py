"""What tests of sampling share: batches without a scheduler, and a comparison of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from scipy.stats import chi2
from sglang.srt.sampling.sampling_params import TOP_K_ALL

_DEFAULTS = {
    "temperature": 1.0,
    "top_k": TOP_K_ALL,
    "top_p": 1.0,
    "min_p": 0.0,
    "custom_params": None,
    "min_new_tokens": 0,
}


def decode_batch(
    params: Sequence[dict[str, Any]], prefix_lens: torch.Tensor, seeds: torch.Tensor | None = None, *, vocab_size: int
) -> Any:
    """What `TokenChoice` reads of a `ScheduleBatch`: sampling parameters by request; prefix_lens: [bs] int64."""
    params = [_DEFAULTS | given for given in params]
    device = prefix_lens.device
    info = SimpleNamespace(
        temperatures=torch.tensor([[p["temperature"]] for p in params], device=device),
        top_ks=torch.tensor([p["top_k"] for p in params], dtype=torch.int32, device=device),
        top_ps=torch.tensor([p["top_p"] for p in params], device=device),
        min_ps=torch.tensor([p["min_p"] for p in params], device=device),
        sampling_seed=seeds,
        acc_additive_penalties=None,
        acc_scaling_penalties=None,
        logit_bias=None,
        has_custom_logit_processor=False,
        vocab_size=vocab_size,
    )
    reqs = [SimpleNamespace(sampling_params=SimpleNamespace(**p), custom_logit_processor=None) for p in params]
    return SimpleNamespace(reqs=reqs, sampling_info=info, seq_lens=prefix_lens, device=str(device))


def top_k_renorm(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """The definition of FlashInfer's function, row by row. probs: [n, V], top_ks: [n]"""
    rows = []
    for row, top_k in zip(probs, top_ks.tolist(), strict=True):
        floor = row.sort(descending=True).values[min(top_k, len(row)) - 1]
        rows.append(torch.where(row >= floor, row, 0))
    return torch.stack([row / row.sum() for row in rows])


def top_p_renorm(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """The definition of FlashInfer's function, row by row. probs: [n, V], top_ps: [n]"""
    rows = []
    for row, top_p in zip(probs, top_ps.tolist(), strict=True):
        ordered = row.sort(descending=True)
        kept, mass = torch.zeros_like(row), 0.0
        for value, token in zip(ordered.values.tolist(), ordered.indices.tolist(), strict=True):
            kept[token] = value
            mass += value
            if mass >= top_p:
                break
        rows.append(kept / kept.sum())
    return torch.stack(rows)


def same_source(ours: Sequence[Hashable], theirs: Sequence[Hashable], rare: int = 12) -> float:
    """The p-value of chi-square for two samples from one distribution, values seen fewer times in all taken together.

    1 where only one value is left.
    """
    counts = Counter(ours), Counter(theirs)
    pooled = counts[0] + counts[1]
    bins: dict[Hashable, list[int]] = {}
    for value, seen in pooled.items():
        found = bins.setdefault(value if seen >= rare else "rare", [0, 0])
        for sample in (0, 1):
            found[sample] += counts[sample][value]
    sizes = len(ours), len(theirs)
    statistic = 0.0
    for found in bins.values():
        for sample in (0, 1):
            expected = sum(found) * sizes[sample] / sum(sizes)
            statistic += (found[sample] - expected) ** 2 / expected
    return float(chi2.sf(statistic, len(bins) - 1)) if len(bins) > 1 else 1.0
