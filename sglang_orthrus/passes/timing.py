"""What rounds cost on this machine: timed at start-up, before there are requests."""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache import allocation
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_orthrus import ranks
from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.core import OrthrusState
from sglang_orthrus.passes.runner import DualViewRunner

# Tokens of every request's context, and of longer ones, which tell what a token of context takes.
_CONTEXT = 512
_LONG_CONTEXT = 2048
# The most requests that have them.
_LONG_BATCH = 32
# Rounds are timed in a row for so long, since the host is ahead of a GPU only after the first.
_SECONDS_IN_A_ROW = 0.02
_LEAST_IN_A_ROW = 2
# Of short rounds the best of so many rows counts. Long ones vary less.
_REPEATS = 2
# All are timed so often, while there is time, and the shortest time counts: a busy machine may be slow for a second.
_SWEEPS = 2


class RoundTimes(NamedTuple):
    """What greedy rounds took.

    Attributes:
        seconds: width -> batch size -> seconds of a round behind a context of `context` tokens per request.
        context: these tokens.
        context_seconds: width -> seconds that one more token of context takes; empty if the KV pool is too small.
    """

    seconds: Mapping[int, Mapping[int, float]]
    context: int
    context_seconds: Mapping[int, float]


def batch_sizes(largest: int) -> list[int]:
    """Powers of two, and the largest."""
    sizes = [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent < largest]
    return [*sizes, largest]


def time_rounds(
    passes: DualViewRunner, model_runner: Any, sizes: Mapping[int, Sequence[int]], seconds: float
) -> RoundTimes:
    """Time a greedy round by width and batch size, small batches first, twice or until `seconds` are over.

    Needs an empty KV pool, whose content it overwrites, with room for a block of the smallest size. All tensor-parallel
    ranks time the same rounds.

    Args:
        passes: whose graphs are captured, if they are.
        model_runner: SGLang's.
        sizes: width -> ascending batch sizes, the smallest of which all have in common.
        seconds: time to take, about.
    """
    found: dict[int, dict[int, float]] = {width: {} for width in sizes}
    widest = max(sizes)
    end = time.monotonic() + seconds
    fitting = [
        size for size in sorted(set().union(*sizes.values())) if _longest_context(model_runner, size, widest) > 0
    ]
    # The largest batch has it, too.
    context = min(_CONTEXT, _longest_context(model_runner, fitting[-1], widest))
    for number, size in enumerate(fitting * _SWEEPS):
        if number and _first_rank_says(time.monotonic() > end):
            break
        batch = _batch(model_runner, size, context, widest)
        for width in (width for width in sizes if size in sizes[width]):
            known = found[width].get(size, math.inf)
            found[width][size] = min(known, _time(passes, model_runner, batch, width))
    size = max(size for size in found[widest] if size <= max(_LONG_BATCH, fitting[0]))
    longer = min(_LONG_CONTEXT, _longest_context(model_runner, size, widest))
    if longer < 2 * context or _has_one_page(model_runner):
        return RoundTimes(found, context, {})
    batch = _batch(model_runner, size, longer, widest)
    slopes = {
        width: (_time(passes, model_runner, batch, width) - found[width][size]) / (size * (longer - context))
        for width in sizes
        if size in found[width]
    }
    return RoundTimes(found, context, slopes)


def _time(passes: DualViewRunner, model_runner: Any, batch: ScheduleBatch, width: int) -> float:
    """The shortest of a few times, of rounds in a row: a host prepares one while a GPU runs another."""
    best_tokens = model_runner.model.best_tokens

    def run() -> None:
        round_batch = passes.lay_out(batch, width)
        if passes.fused(round_batch) is not None:
            return
        block, draft = round_batch.blocks.ids, None
        if width > 1:
            draft = passes.draft(round_batch)
            block = torch.cat((block[:, :1], best_tokens(draft.hidden_states[:, :-1])), dim=1)
        best_tokens(passes.verify(passes.prepare_verify(round_batch, draft), block).hidden_states)

    def seconds_of(rounds: int) -> float:
        started = time.perf_counter()
        for _ in range(rounds):
            run()
        if batch.seq_lens.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / rounds

    seconds_of(1)
    [rounds] = ranks.numbers_from_first([max(_LEAST_IN_A_ROW, round(_SECONDS_IN_A_ROW / seconds_of(1)))])
    repeats = _REPEATS if rounds > _LEAST_IN_A_ROW else 1
    return min(seconds_of(rounds) for _ in range(repeats))


def _first_rank_says(answer: bool) -> bool:
    [said] = ranks.numbers_from_first([int(answer)])
    return bool(said)


def _has_one_page(model_runner: Any) -> bool:
    """Whether the KV pool's memory is its first page: SGLang sizes the pool after capture, and so after this."""
    return bool(getattr(model_runner.token_to_kv_pool, "post_capture_active", False))


def _longest_context(model_runner: Any, size: int, width: int) -> int:
    """Tokens of context that so many requests may have; not positive if there are too many."""
    rows, columns = model_runner.req_to_token_pool.req_to_token.shape
    if size >= rows:
        return 0
    return int(min(columns - width, model_runner.max_total_num_tokens // size - width))


def _slots(size: int, length: int, device: torch.device, all_first: bool) -> torch.Tensor:
    """Of every token of every request: [size, length]; all_first: there is no other one."""
    slots = torch.arange(size * length, device=device).view(size, length)
    return torch.zeros_like(slots) if all_first else slots


@depends_on(
    "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func",
    "req_pool_indices",
    "req_to_token",
    "start_offset",
    "end_offset",
    "out_cache_loc",
    "batch_size",
    what="called for batches that are timed at start-up, with the dtypes that eagle_prepare_for_decode gives it",
    why="it is compiled twice for every power of two of requests, which would hold up the first rounds of so many",
    until="SGLang compiles it at start-up",
)
def _write_slots(req_pool_indices: torch.Tensor, req_to_token: torch.Tensor, slots: torch.Tensor) -> None:
    """Into the requests' rows, from their first column on. slots: [size, length] int64."""
    size, length = slots.shape
    starts = torch.zeros(size, dtype=torch.int32, device=slots.device)
    # Triton compiles for addresses that 16 divides, and for others. Slots that are allocated have either.
    for first in (0, 1):
        own = torch.cat((slots.new_zeros(first), slots.flatten()))[first:]
        allocation.assign_req_to_token_pool_func(req_pool_indices, req_to_token, starts, starts + length, own, size)


@depends_on(
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
    "post_capture_active",
    what="read before rounds are timed: whether only the first page has memory yet",
    why="other slots must not be touched before SGLang has sized the pool",
    until="SGLang times passes of plugins' algorithms",
)
@depends_on(
    "sglang.srt.managers.schedule_batch:ScheduleBatch.init_new",
    "reqs",
    "req_to_token_pool",
    "token_to_kv_pool_allocator",
    "tree_cache",
    "model_config",
    "enable_overlap",
    "spec_algorithm",
    what="called for batches that are timed at start-up; their rows and slots are written, not allocated",
    why="passes take SGLang's batches",
    until="SGLang times passes of plugins' algorithms",
)
def _batch(model_runner: Any, size: int, context: int, width: int) -> ScheduleBatch:
    """A decode batch of greedy requests with some context, on slots that nobody owns yet."""
    pool = model_runner.req_to_token_pool
    params = SamplingParams(temperature=0.0, max_new_tokens=1)
    params.normalize(None)
    reqs = [Req(str(number), "", array("q", [0]), params) for number in range(size)]
    batch = ScheduleBatch.init_new(
        reqs=reqs,
        req_to_token_pool=pool,
        token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
        tree_cache=None,
        model_config=model_runner.model_config,
        enable_overlap=False,
        spec_algorithm=model_runner.spec_algorithm,
    )
    device = pool.req_to_token.device
    slots = _slots(size, context + width, device, all_first=_has_one_page(model_runner))
    batch.req_pool_indices = torch.arange(1, size + 1, device=device)
    _write_slots(batch.req_pool_indices, pool.req_to_token, slots)
    batch.seq_lens_cpu = torch.full((size,), context)
    batch.seq_lens = batch.seq_lens_cpu.to(device)
    batch.seq_lens_sum = size * context
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, model_runner.model_config.vocab_size)
    batch.spec_info = OrthrusState(torch.zeros(size, dtype=torch.int64, device=device), batch.seq_lens)
    return batch
