"""Which rows of a batch choose their tokens alike, and how many of them are worked on at a time; host work only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sglang.srt.sampling.sampling_params import TOP_K_ALL
from sglang.srt.utils.common import async_h2d

from sglang_orthrus.compat.ledger import SHARED_BY_SAMPLERS, depends_on

# Requests of one piece have at most so many rows, but at least one request: of a vocabulary of 151,936, 512 rows of
# logits take 0.3 GB. Sampling needs some copies of them, sorted ones among them; options that change logits and log
# probabilities need two or three.
HEAD_ROWS = 512
SAMPLED_ROWS = 128


class Way(NamedTuple):
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


GREEDY = Way(is_greedy=True)


@dataclass(frozen=True, slots=True)
class Piece:
    """Requests that choose alike, worked on together.

    Attributes:
        way: how they choose.
        requests: their rows in the batch, on the host.
        index: the same, to index device tensors of the batch with.
        max_top_k: the largest top_k among them; None if top-k is not among the filters.
        is_costly: whether their logits are copied on top of how they choose.
    """

    way: Way
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
def way_of(params: Any) -> Way:
    """params: a request's normalised `SamplingParams`; temperature 0 is top_k 1 there."""
    if params.top_k <= 1:
        return GREEDY
    has_top_k = params.top_k != TOP_K_ALL
    has_min_p = params.min_p > 0
    return Way(False, has_top_k or has_min_p or params.top_p != 1.0, has_top_k, has_min_p)


def pieces(
    params: Sequence[Any], width: int, device: torch.device | str, costly: Container[int] = ()
) -> Iterator[Piece]:
    """Split a batch into groups of rows.

    Args:
        params: the `SamplingParams` of its requests.
        width: rows of each.
        device: of the batch.
        costly: requests whose logits are copied whatever they choose by: small groups of their own.
    """
    groups: dict[tuple[Way, bool], list[int]] = defaultdict(list)
    for request, parameters in enumerate(params):
        groups[way_of(parameters), request in costly].append(request)
    for (way, is_costly), members in groups.items():
        step = max(1, (HEAD_ROWS if way.is_greedy and not is_costly else SAMPLED_ROWS) // width)
        for start in range(0, len(members), step):
            requests = tuple(members[start : start + step])
            max_top_k = max(params[request].top_k for request in requests) if way.has_top_k else None
            yield Piece(way, requests, rows_index(requests, device), max_top_k, is_costly)


@depends_on(
    "sglang.srt.utils.common:async_h2d",
    "args",
    "dtype",
    "device",
    what="called for copies to the device",
    why="a plain copy waits for the device",
    until=SHARED_BY_SAMPLERS,
)
def rows_index(rows: Sequence[int], device: torch.device | str) -> torch.Tensor | slice:
    """Ascending row numbers to index device tensors with: a slice if it can be one, as that copies nothing."""
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return slice(first, last + 1)
    return async_h2d(list(rows), dtype=torch.int64, device=device)
