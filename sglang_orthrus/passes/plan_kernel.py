"""FlashInfer's schedule of a round's attention, made on the GPU as the first nodes of every graph.

FlashInfer plans on the host, so SGLang's backend has to wait until the lengths that the last round committed are there.
Blocks have one width, which leaves little to plan: this kernel does it from the lengths where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# FlashInfer's own, for pages of one token.
MIN_CHUNK = 128
_CTAS_PER_SM = 2
# A chunk that no request is longer than: nothing is split.
UNSPLIT = 1 << 30
# Smaller chunks take less time wherever FlashInfer's bound on work items leaves room for them. A request that is not
# split saves as much time in merging as attending to so many tokens takes. Measured on an H100, 70 batches of 1 to 32
# requests of 180 to 4,100 tokens: none takes longer than with FlashInfer's plan, 16 of 512 take 43 us instead of 70.
FINE_CHUNK = 64
WHOLE = 35


class PlanLayout(NamedTuple):
    """FlashInfer's `PrefillPlanInfo` as `plan` returns it: byte offsets into the wrapper's integer workspace."""

    num_ctas: int  # of the captured grid, per key-value head
    total_rows: int
    total_rows_offset: int
    tile_rows: int  # query rows times query heads per key-value head that one CTA takes
    request_offset: int
    qo_tile_offset: int
    kv_tile_offset: int
    merge_indptr_offset: int
    o_indptr_offset: int
    chunk_offset: int
    partial_values_offset: int
    partial_sums_offset: int
    valid_offset: int
    is_for_graphs: int
    is_split: int


@triton.jit
def _chunk_of(lens, num_requests, num_tiles, max_work, min_chunk, whole, fine_chunk):  # type: ignore[no-untyped-def]
    """Tokens of a chunk: the smallest that make no more than `max_work` work items, or the longest request."""
    longest = tl.max(lens, 0)
    low = min_chunk + 0
    high = longest
    while low < high:
        middle = (low + high) // 2
        is_too_much = tl.sum((lens + middle - 1) // middle, 0) * num_tiles > max_work
        low = tl.where(is_too_much, middle + 1, low)
        high = tl.where(is_too_much, high, middle)
    is_fine = tl.sum((lens + fine_chunk - 1) // fine_chunk, 0) * num_tiles <= max_work
    split = tl.where(is_fine, fine_chunk, low)
    low = tl.where(longest - low <= whole * num_requests, tl.maximum(low, longest), split)
    return low


@triton.jit
def plan_kernel(  # type: ignore[no-untyped-def]
    prefix_lens,  # [num_requests] committed lengths
    kv_lens,  # [num_requests] int32 out, block included
    kv_indptr,  # [num_requests + 1] int32 out
    request,  # [num_ctas] int32 out, as the next two
    qo_tile,
    kv_tile,
    valid,  # [num_ctas] uint8 out
    o_indptr,  # [num_requests + 1] int32 out
    merge_indptr,  # [num_requests * width + 1] int32 out
    chunk_size,  # [1] int32 out
    num_requests,
    width,
    num_tiles,  # of a block
    num_ctas,
    max_work,  # how many tiles times chunks a split may make
    min_chunk,
    whole,  # nothing is split if that makes the longest work item no more than so many tokens per request longer
    fine_chunk,  # else taken if it makes no more than that
    REQUESTS: tl.constexpr,
    WIDTH: tl.constexpr,
    CTAS: tl.constexpr,
):
    """`PrefillSplitQOKVIndptr` of FlashInfer's scheduler.cuh for CUDA graphs, one block width and pages of one token.

    Only `fine_chunk` and `whole` are not FlashInfer's. One program.
    REQUESTS, WIDTH and CTAS are the powers of two that cover the sizes in small letters.
    """
    row = tl.arange(0, REQUESTS)
    is_request = row < num_requests
    lens = tl.load(prefix_lens + row, mask=is_request, other=0).to(tl.int32) + width
    lens = tl.where(is_request, lens, 0)
    tl.store(kv_lens + row, lens, mask=is_request)
    tl.store(kv_indptr + row, tl.cumsum(lens, 0) - lens, mask=is_request)
    tl.store(kv_indptr + num_requests, tl.sum(lens, 0))

    chunk = _chunk_of(lens, num_requests, num_tiles, max_work, min_chunk, whole, fine_chunk)
    tl.store(chunk_size, chunk)

    chunks = (lens + chunk - 1) // chunk
    before = tl.cumsum(chunks, 0) - chunks
    total = tl.sum(chunks, 0)
    tl.store(o_indptr + row, before * width, mask=is_request)
    tl.store(o_indptr + num_requests, total * width)
    offset = tl.arange(0, WIDTH)[None, :]
    merge = before[:, None] * width + offset * chunks[:, None]
    tl.store(merge_indptr + row[:, None] * width + offset, merge, mask=is_request[:, None] & (offset < width))
    tl.store(merge_indptr + num_requests * width, total * width)

    cta = tl.arange(0, CTAS)
    tl.store(valid + cta, (cta < total * num_tiles).to(tl.uint8), mask=cta < num_ctas)
    for tile in range(num_tiles):
        for part in range(tl.max(chunks, 0)):
            slot = before * num_tiles + tile * chunks + part
            is_work = part < chunks
            tl.store(request + slot, row, mask=is_work)
            tl.store(qo_tile + slot, tl.zeros_like(row) + tile, mask=is_work)
            tl.store(kv_tile + slot, tl.zeros_like(row) + part, mask=is_work)


def max_split_work(num_sms: int, num_kv_heads: int) -> int:
    """How many work items per key-value head FlashInfer splits up to."""
    return _CTAS_PER_SM * num_sms // num_kv_heads


def write_plan(
    workspace: torch.Tensor,
    layout: PlanLayout,
    prefix_lens: torch.Tensor,
    kv_lens: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    width: int,
    group: int,
    max_work: int,
    min_chunk: int = MIN_CHUNK,
    fine_chunk: int = FINE_CHUNK,
    whole: int = WHOLE,
) -> None:
    """Plan blocks of `width` rows behind prefixes, and write it where the captured kernels look.

    Args:
        workspace: the wrapper's integer workspace, bytes.
        layout: of a plan that FlashInfer made for the same number of requests.
        prefix_lens: [bs] committed lengths.
        kv_lens: [bs] int32, becomes the lengths with the block.
        kv_indptr: [bs + 1] int32, becomes where each request's page indices begin.
        width: F.
        group: query heads per key-value head.
        max_work: see `max_split_work`; with more tiles than that, no request is split.
        min_chunk: tokens of a chunk at least, fine ones apart; `UNSPLIT` keeps every request whole.
        fine_chunk: tokens of a chunk where that makes few; `MIN_CHUNK` plans as FlashInfer does.
        whole: see `WHOLE`; 0 plans as FlashInfer does.
    """
    bs = prefix_lens.shape[0]

    def int32(offset: int, size: int) -> torch.Tensor:
        return workspace[offset : offset + 4 * size].view(torch.int32)

    plan_kernel[(1,)](
        prefix_lens,
        kv_lens,
        kv_indptr,
        int32(layout.request_offset, layout.num_ctas),
        int32(layout.qo_tile_offset, layout.num_ctas),
        int32(layout.kv_tile_offset, layout.num_ctas),
        workspace[layout.valid_offset : layout.valid_offset + layout.num_ctas],
        int32(layout.o_indptr_offset, bs + 1),
        int32(layout.merge_indptr_offset, bs * width + 1),
        int32(layout.chunk_offset, 1),
        bs,
        width,
        -(-width * group // layout.tile_rows),
        layout.num_ctas,
        max_work,
        min_chunk,
        whole,
        fine_chunk,
        REQUESTS=triton.next_power_of_2(bs),
        WIDTH=triton.next_power_of_2(width),
        CTAS=triton.next_power_of_2(layout.num_ctas),
    )
