"""FlashInfer's schedule of a round's attention, made on the GPU as the first nodes of every graph.

FlashInfer plans on the host, so SGLang's backend has to wait until the lengths that the last round committed are there.
Blocks have one width, which leaves little to plan: this kernel does it from the lengths where they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sglang_orthrus.compat.ledger import depends_on

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


@depends_on(
    "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.init_forward_metadata_out_graph",
    "forward_batch",
    "in_capture",
    what="replaced on the instance: it plans at capture only",
    why="its plan needs the lengths on the host, so that every round would wait for them",
    until="SGLang plans on the device",
)
@depends_on(
    "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.init_forward_metadata_in_graph",
    "forward_batch",
    what="replaced on the instance: the first nodes of a graph write its plan",
    why="its plan needs the lengths on the host, so that every round would wait for them",
    until="SGLang plans on the device",
)
@depends_on(
    "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend",
    "model_runner",
    what="prefill_cuda_graph_metadata, indices_updater_prefill, kv_last_page_len, workspace_buffer, "
    "kv_index_translator and enable_deterministic are read",
    why="they hold the wrappers, shapes and buffers of the plans",
    until="SGLang plans on the device",
)
@depends_on(
    "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper",
    "float_workspace_buffer",
    what="_plan_info is read and set; _int_workspace_buffer, _float_workspace_buffer, _paged_kv_indptr_buf and "
    "_paged_kv_indices_buf are written to by the graph's own plan",
    why="FlashInfer plans on the host",
    until="FlashInfer plans on the device",
)
@depends_on(
    "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator.pack_read_stream",
    "plan",
    "req_pool_indices",
    "seq_lens",
    "indptr",
    "out",
    "num_token_blocks",
    what="called inside the graph for the page indices of its plan",
    why="SGLang's backend packs them outside",
    until="SGLang plans on the device",
)
class GraphPlanner:
    """Plans the verify graphs of SGLang's FlashInfer backend from within.

    The backend's own plan at capture lays out the workspace and uploads what never changes; replays need no host.

    Args:
        backend: SGLang's `FlashInferAttnBackend`, with one wrapper per batch size (`flashinfer.share_plans`).
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._plan_out_of_graph = backend.init_forward_metadata_out_graph
        updater = backend.indices_updater_prefill
        self._group = updater.num_qo_heads // updater.num_kv_heads
        device = backend.workspace_buffer.device
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._max_work = max_split_work(num_sms, updater.num_kv_heads)
        self._kv_lens = torch.zeros_like(backend.kv_last_page_len)
        self._is_deterministic = backend.enable_deterministic

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Replaces the backend's: nothing is left to do before a replay."""
        if in_capture or not forward_batch.forward_mode.is_target_verify():
            self._plan_out_of_graph(forward_batch, in_capture)
            if self._is_deterministic and forward_batch.forward_mode.is_target_verify():
                self._fix_tiles(forward_batch)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Replaces the backend's: the first nodes of a graph."""
        if not forward_batch.forward_mode.is_target_verify():
            return
        bs = forward_batch.batch_size
        wrapper = self._backend.prefill_cuda_graph_metadata[bs][0]
        kv_lens, kv_indptr = self._kv_lens[:bs], wrapper._paged_kv_indptr_buf
        write_plan(
            wrapper._int_workspace_buffer,
            PlanLayout(*wrapper._plan_info),
            forward_batch.seq_lens[:bs],
            kv_lens,
            kv_indptr,
            width=forward_batch.spec_info.draft_token_num,
            group=self._group,
            max_work=self._max_work,
            min_chunk=UNSPLIT if self._is_deterministic else MIN_CHUNK,
        )
        self._backend.kv_index_translator.pack_read_stream(
            forward_batch.kv_loc_plan,
            req_pool_indices=forward_batch.req_pool_indices[:bs],
            seq_lens=kv_lens,
            indptr=kv_indptr,
            out=wrapper._paged_kv_indices_buf,
            num_token_blocks=None,
        )

    @depends_on(
        "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper.plan",
        what="the call of _cached_module with _pin_memory_int_workspace_buffer is made here, with uniform_q_len",
        why="the wrapper has no argument for uniform_q_len, and without it the batch decides the tiles",
        until="FlashInfer's wrapper takes uniform_q_len",
    )
    def _fix_tiles(self, forward_batch: Any) -> None:
        """Lay the workspace out anew, for tiles that fit one block whatever the batch, as in passes without a graph.

        FlashInfer takes the tile for the most rows that one of the requests could have, unless it is told that all have
        as many: with two query heads per key-value head blocks of 32 get tiles of 64 rows alone and of 128 otherwise,
        and the tile decides the order of the sums.
        """
        bs, width = forward_batch.batch_size, forward_batch.spec_info.draft_token_num
        wrapper = self._backend.prefill_cuda_graph_metadata[bs][0]
        rows = torch.arange(0, (bs + 1) * width, width, dtype=torch.int32)
        lens = torch.full((bs,), width, dtype=torch.int32)
        updater = self._backend.indices_updater_prefill
        wrapper._plan_info = wrapper._cached_module.plan(
            wrapper._float_workspace_buffer,
            wrapper._int_workspace_buffer,
            wrapper._pin_memory_int_workspace_buffer,
            rows,
            rows,
            lens,
            bs * width,
            bs,
            updater.num_qo_heads,
            updater.num_kv_heads,
            1,  # page size
            True,  # is_cuda_graph_enabled
            updater.head_dim,
            updater.head_dim,
            False,  # causal, which plans ignore
            -1,  # window_left
            -1,  # fixed_split_size
            False,  # disable_split_kv
            0,  # num_colocated_ctas
            width,  # uniform_q_len
        )


def plan_in_graphs(backend: Any) -> None:
    """Have the verify graphs of SGLang's `FlashInferAttnBackend` plan themselves; no round waits for lengths then."""
    planner = GraphPlanner(backend)
    # Read by SGLang's `decide_needs_cpu_seq_lens`; with it the overlap scheduler waits before it prepares a round.
    backend.needs_cpu_seq_lens = False
    backend.init_forward_metadata_out_graph = planner.init_forward_metadata_out_graph
    backend.init_forward_metadata_in_graph = planner.init_forward_metadata_in_graph


def plans_in_graphs(backend: Any) -> bool:
    """Whether an attention backend's graphs need no lengths on the host."""
    return isinstance(getattr(backend.init_forward_metadata_in_graph, "__self__", None), GraphPlanner)
