"""What tests of sampling share: batches without a scheduler, and a comparison of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from scipy.stats import chi2
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_DEFAULTS = {
    "temperature": 1.0,
    "top_k": TOP_K_ALL,
    "top_p": 1.0,
    "min_p": 0.0,
    "custom_params": None,
    "min_new_tokens": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logit_bias": None,
    "stop_token_ids": None,
}


class Peak(TorchDispatchMode):
    """The largest sum of all storages that operations made while it is on; their inner workspaces are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self._live[ref.cdata] = ref, storage.nbytes()
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return result


class Request(SimpleNamespace):
    """What is read of a `Req`; weakly referable and hashable as that is."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def finished(self) -> bool:
        """Whether it has ended."""
        return bool(self.has_ended)


def request(params: dict[str, Any], **given: Any) -> Request:
    """A request with these sampling parameters; given: other attributes."""
    defaults: dict[str, Any] = {
        "custom_logit_processor": None,
        "return_logprob": False,
        "output_ids": [],
        "is_retracted": False,
        "has_ended": False,
    }
    return Request(sampling_params=SimpleNamespace(**(_DEFAULTS | params)), **(defaults | given))


def decode_batch(
    params: Sequence[dict[str, Any]],
    prefix_lens: torch.Tensor,
    seeds: torch.Tensor | None = None,
    *,
    vocab_size: int,
    top_logprobs: Sequence[int | None] | None = None,
) -> Any:
    """What `BatchSampler` reads of a `ScheduleBatch`.

    Args:
        params: sampling parameters by request.
        prefix_lens: [bs] int64.
        seeds: [bs] int64.
        vocab_size: V.
        top_logprobs: how many log probabilities each wants; None for none at all.
    """
    params = [_DEFAULTS | given for given in params]
    device = prefix_lens.device
    top_logprobs = top_logprobs or [None] * len(params)
    penalised = any(p["frequency_penalty"] or p["presence_penalty"] or p["repetition_penalty"] != 1 for p in params)
    biases = None
    if any(p["logit_bias"] for p in params):
        biases = torch.zeros(len(params), vocab_size, device=device)
        for row, p in enumerate(params):
            for token, bias in (p["logit_bias"] or {}).items():
                biases[row, int(token)] = bias
    info = SimpleNamespace(
        temperatures=torch.tensor([[p["temperature"]] for p in params], device=device),
        top_ks=torch.tensor([p["top_k"] for p in params], dtype=torch.int32, device=device),
        top_ps=torch.tensor([p["top_p"] for p in params], device=device),
        min_ps=torch.tensor([p["min_p"] for p in params], device=device),
        sampling_seed=seeds,
        acc_additive_penalties=torch.zeros(len(params), vocab_size, device=device) if penalised else None,
        acc_scaling_penalties=None,
        logit_bias=biases,
        has_custom_logit_processor=False,
        is_all_greedy=all(p["top_k"] <= 1 for p in params),
        vocab_size=vocab_size,
    )
    return SimpleNamespace(
        reqs=[request(p, return_logprob=top is not None) for p, top in zip(params, top_logprobs, strict=True)],
        sampling_info=info,
        seq_lens=prefix_lens,
        device=str(device),
        return_logprob=any(top is not None for top in top_logprobs),
        top_logprobs_nums=[top or 0 for top in top_logprobs],
        token_ids_logprobs=[None] * len(params),
    )


def top_k_renorm(probs: torch.Tensor, top_ks: torch.Tensor) -> torch.Tensor:
    """The definition of FlashInfer's function. probs: [n, V], top_ks: [n]"""
    last = top_ks.long().clamp(max=probs.shape[-1])[:, None] - 1
    kept = torch.where(probs >= probs.sort(descending=True).values.gather(1, last), probs, 0)
    return kept / kept.sum(-1, keepdim=True)


def top_p_renorm(probs: torch.Tensor, top_ps: torch.Tensor) -> torch.Tensor:
    """The definition of FlashInfer's function: the best tokens until they hold top_p. probs: [n, V], top_ps: [n]"""
    ordered = probs.sort(descending=True)
    values = ordered.values.double()
    is_kept = values.cumsum(-1) - values < top_ps[:, None]
    kept = torch.zeros_like(probs).scatter(1, ordered.indices, torch.where(is_kept, ordered.values, 0))
    return kept / kept.sum(-1, keepdim=True)


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
