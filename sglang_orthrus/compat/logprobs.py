"""Log probabilities of prompts and first tokens: no request pays for another one's `top_logprobs_num`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.wrapping import wrap_once

# Up to this number, requests share one selection over all rows, which reads each row once.
SHARED_TOP_K = 64

_LARGEST_FOR_ALL = "the largest number of a prefill batch selects from all its rows, and becomes Python lists of all"
_EACH_ITS_OWN = "each request pays for its own number (patches/0020)"

_Table = tuple[list[Any], list[Any]]  # values and token ids of each request


@depends_on(
    "sglang.srt.layers.logprob_processor:get_top_logprobs_chunk",
    "logprobs",
    "top_k_nums",
    "pruned_lens",
    "top_logprobs_val",
    "top_logprobs_idx",
    "split_pruned_len",
    "log_normalizer",
    what="wrapped: a large number is selected from the rows of its own request",
    why=_LARGEST_FOR_ALL,
    until=_EACH_ITS_OWN,
)
@depends_on(
    "sglang.srt.layers.logprob_processor:get_top_logprobs",
    "logprobs",
    "top_logprobs_nums",
    what="wrapped: a large number is selected from the row of its own request",
    why=_LARGEST_FOR_ALL,
    until=_EACH_ITS_OWN,
)
def select_top_logprobs_per_request() -> None:
    """Have prefill select large numbers of log probabilities for each request by itself."""
    from sglang.srt.layers import logprob_processor

    wrap_once(logprob_processor, "get_top_logprobs_chunk", _chunk)
    wrap_once(logprob_processor, "get_top_logprobs", _rows)


def _chunk(stock: Callable[..., int]) -> Callable[..., int]:
    """For rows of prompts; those of the chunk's first request may have begun in the chunk before."""

    @wraps(stock)
    def get_top_logprobs_chunk(
        logprobs: torch.Tensor,
        top_k_nums: Sequence[int],
        pruned_lens: Sequence[int],
        top_logprobs_val: list[Any],
        top_logprobs_idx: list[Any],
        split_pruned_len: int,
        log_normalizer: Any = None,
        **options: Any,
    ) -> int:
        shared = _shared(top_k_nums)
        first = len(top_logprobs_val) - (split_pruned_len > 0)
        tables = top_logprobs_val, top_logprobs_idx
        # SGLang's kernel has selected for all rows only if all numbers are small.
        following = stock(logprobs, shared, pruned_lens, *tables, split_pruned_len, log_normalizer, **options)
        start = 0
        for number, (k, length) in enumerate(zip(top_k_nums, pruned_lens, strict=True)):
            stop = start + max(length - (0 if number else split_pruned_len), 0)
            rows = slice(start, min(stop, len(logprobs)))
            if k > SHARED_TOP_K and rows.start < rows.stop:
                norm = None if log_normalizer is None else tuple(part[rows] for part in log_normalizer)
                own: _Table = ([], [])
                k = min(k, logprobs.shape[-1])
                stock(logprobs[rows], [k], [rows.stop - rows.start], *own, 0, norm, **options)
                for table, (entries,) in zip(tables, own, strict=True):
                    # They take the place of as many empty ones.
                    table[first + number][-len(entries) :] = entries
            start = stop
        return following

    return get_top_logprobs_chunk


def _rows(stock: Callable[..., _Table]) -> Callable[..., _Table]:
    """For one row of each request."""

    @wraps(stock)
    def get_top_logprobs(logprobs: torch.Tensor, top_logprobs_nums: Sequence[int], **options: Any) -> _Table:
        found = stock(logprobs, _shared(top_logprobs_nums), **options)
        for row, k in enumerate(top_logprobs_nums):
            if k > SHARED_TOP_K:
                own = stock(logprobs[row : row + 1], [min(k, logprobs.shape[-1])], **options)
                for table, (entry,) in zip(found, own, strict=True):
                    table[row] = entry
        return found

    return get_top_logprobs


def _shared(nums: Sequence[int]) -> list[int]:
    return [k if k <= SHARED_TOP_K else 0 for k in nums]
