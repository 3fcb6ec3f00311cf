"""When two seeded generations count as equal. Pure: no server, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sglang_orthrus.cpu.kernels import murmur_hash32


def noise(seed: int, position: int, columns: int) -> Tensor:
    """The Gumbel noise of every column, as SGLang's `multinomial_with_seed` makes it: [columns] fp64."""
    hashed = murmur_hash32(torch.tensor([seed]), torch.tensor([position]), torch.arange(columns))[0]
    uniform = hashed.to(torch.float64) / torch.iinfo(torch.uint32).max
    log = uniform.log().clamp(min=torch.finfo(torch.float64).min, max=-(2.0**-32))
    return -(-log).log()


def margin(logits: Tensor, options: Mapping[str, Any], position: int, tokens: Sequence[int]) -> float:
    """How far logits are from a choice between two tokens that either server may have made.

    Without filters that is the difference of the two perturbed log probabilities. With filters noise goes by rank, so
    that a change of places changes the choice: the smallest distance of either token from its neighbours in rank, or
    from the cut of top-p, counts, too.

    Args:
        logits: [V], of the autoregressive view.
        options: sampling parameters: temperature, sampling_seed and filters.
        position: of the input token.
        tokens: the two that were chosen.
    """
    logprobs = torch.log_softmax(logits.double() / options["temperature"], dim=-1)
    first, second = tokens
    if not {"top_k", "top_p"} & set(options):
        perturbed = logprobs + noise(options["sampling_seed"], position, len(logprobs))
        return abs(float(perturbed[first] - perturbed[second]))
    ordered = logprobs.sort(descending=True)
    rank = {int(token): index for index, token in enumerate(ordered.indices.tolist())}
    perturbed = ordered.values + noise(options["sampling_seed"], position, len(logprobs))
    found = [abs(float(perturbed[rank[first]] - perturbed[rank[second]]))]
    before = ordered.values.exp().cumsum(dim=0) - ordered.values.exp()
    for token in tokens:
        place = rank[token]
        for neighbour in (place - 1, place + 1):
            if 0 <= neighbour < len(logprobs):
                found.append(abs(float(ordered.values[place] - ordered.values[neighbour])))
        if "top_p" in options:
            found.append(abs(float(before[place]) - options["top_p"]))
    return min(found)
