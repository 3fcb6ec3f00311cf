"""Which rows of a batch choose their tokens alike, and how many of them are worked on at a time; host work only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sglang.srt.sampling.sampling_params import TOP_K_ALL

from sglang_orthrus.compat.ledger import SHARED_BY_SAMPLERS, depends_on
from sglang_orthrus.core import HEAD_ROWS, rows_index

# Requests of one group have at most `HEAD_ROWS` rows, or so many, but at least one request. Sampling needs some copies
# of their logits, sorted ones among them; options that change logits and log probabilities need two or three.
SAMPLED_ROWS = 128


class SamplingKind(NamedTuple):
    """How a request that is alone in its batch chooses a token from its logits.

    Attributes:
        is_greedy: the largest logit.
        is_filtered: drawn from what top-k, top-p and min-p leave.
        has_top_k: whether top-k leaves a part of the vocabulary only.
        has_min_p: whether min-p is among the filters.
    """

    is_greedy: bool
    is_filtered: bool = False
    has_top_k: bool = False
    has_min_p: bool = False


GREEDY = SamplingKind(is_greedy=True)


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """Requests that choose alike, worked on together.

    Attributes:
        kind: how they choose.
        requests: their rows in the batch, on the host.
        index: the same, to index device tensors of the batch with.
        max_top_k: the largest top_k among them; None if top-k is not among the filters.
        is_costly: whether their logits are copied on top of how they choose.
    """

    kind: SamplingKind
    requests: tuple[int, ...]
    index: torch.Tensor | slice
    max_top_k: int | None
    is_costly: bool = False


@depends_on(
    "sglang.srt.sampling.sampling_params:TOP_K_ALL",
    what="compared with top_k",
    why="it is how a request says that it has none",
    until=SHARED_BY_SAMPLERS,
)
def kind_of(params: Any) -> SamplingKind:
    """params: a request's normalised `SamplingParams`; temperature 0 is top_k 1 there."""
    if params.top_k <= 1:
        return GREEDY
    has_top_k = params.top_k != TOP_K_ALL
    has_min_p = params.min_p > 0
    return SamplingKind(False, has_top_k or has_min_p or params.top_p != 1.0, has_top_k, has_min_p)


def request_groups(
    params: Sequence[Any], width: int, device: torch.device | str, costly: Container[int] = ()
) -> Iterator[RequestGroup]:
    """Split a batch into groups of rows.

    Args:
        params: the `SamplingParams` of its requests.
        width: rows of each.
        device: of the batch.
        costly: requests whose logits are copied whatever they choose by: small groups of their own.
    """
    groups: dict[tuple[SamplingKind, bool], list[int]] = defaultdict(list)
    for request, parameters in enumerate(params):
        groups[kind_of(parameters), request in costly].append(request)
    for (kind, is_costly), members in groups.items():
        step = max(1, (HEAD_ROWS if kind.is_greedy and not is_costly else SAMPLED_ROWS) // width)
        for start in range(0, len(members), step):
            requests = tuple(members[start : start + step])
            max_top_k = max(params[request].top_k for request in requests) if kind.has_top_k else None
            yield RequestGroup(kind, requests, rows_index(requests, device), max_top_k, is_costly)


def greedy_groups(num_requests: int, width: int, device: torch.device | str) -> Iterator[RequestGroup]:
    """The same for a batch of greedy requests none of which is costly, without a look at each."""
    step = max(1, HEAD_ROWS // width)
    for start in range(0, num_requests, step):
        requests = tuple(range(start, min(start + step, num_requests)))
        yield RequestGroup(GREEDY, requests, rows_index(requests, device), None)
