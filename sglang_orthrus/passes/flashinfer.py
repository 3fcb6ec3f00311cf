"""FlashInfer under CUDA graphs that hold several passes over the same blocks.

A plan is the host's schedule of a kernel's work, kept in its wrapper. It depends on the lengths, not on causality, so
draft and verify passes of one width run on the same plan.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.passes.plan_kernel import max_split_work, plan_in_graphs

# What SGLang's backend takes for plain Qwen3; it does not know that ours is one.
_MIN_WORKSPACE_BYTES = 512 * 1024 * 1024
_TILE_ROWS = 128  # the largest of FlashInfer's query tiles
_MAX_SMS = 160
_MARGIN = 1.1


def workspace_bytes(num_requests: int, width: int, num_q_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """What a plan for `num_requests` blocks of `width` rows needs under a CUDA graph, where KV is always split.

    Follows `PrefillPlan` in FlashInfer's scheduler.cuh: an fp32 partial result of every query row, head and chunk. A
    tile holds the rows of all query heads of a key-value head.
    """
    group = num_q_heads // num_kv_heads
    tiles = -(-num_requests * width * group // _TILE_ROWS) + num_requests - 1
    tiles = max(tiles, max_split_work(_MAX_SMS, num_kv_heads))
    partial_results = num_q_heads * -(-tiles * _TILE_ROWS // group) * (head_dim + 1) * 4
    return max(_MIN_WORKSPACE_BYTES, int(_MARGIN * partial_results))


def set_workspace_size(size: int) -> None:
    """Have SGLang's backend, which is made later in this process, take a workspace of `size` bytes.

    A size that the user has set stays.
    """
    from sglang.srt.environ import envs

    if not envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.is_set():
        envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.set(size)


@depends_on(
    "sglang.srt.layers.attention.hybrid_attn_backend:HybridAttnBackend",
    "prefill_backend",
    "decode_backend",
    what="its two backends are read; needs_cpu_seq_lens becomes what the one that verifies says",
    why="it also asks the backend that runs in no round, and before the backends are fitted",
    until="an attention backend says which one runs a forward mode",
)
def fit(backend: Any) -> None:
    """Fit an attention backend of SGLang's to rounds, if FlashInfer verifies there. Needs to be done before capture."""
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

    ours = verifying(backend)
    for child in {id(part): part for part in (ours, *_parts(backend))}.values():
        if isinstance(child, FlashInferAttnBackend):
            bound_indices(child)
    if isinstance(ours, FlashInferAttnBackend):
        share_plans(ours)
        if ours.enable_deterministic:
            keep_blocks_whole(ours)
        plan_in_graphs(ours)
    # With unlike backends for prefill and decode SGLang asks both, also one that never runs in a round.
    backend.needs_cpu_seq_lens = ours.needs_cpu_seq_lens


@depends_on(
    "sglang.srt.layers.attention.hybrid_attn_backend:HybridAttnBackend._select_backend",
    "forward_mode",
    what="called for the backend that verifies, if prefill and decode have unlike ones",
    why="rounds need the FlashInfer backend that runs them",
    until="an attention backend says which one runs a forward mode",
)
def verifying(backend: Any) -> Any:
    """The attention backend that runs passes over blocks: one of two if prefill and decode have unlike ones."""
    return backend._select_backend(ForwardMode.TARGET_VERIFY) if _parts(backend) else backend


def _parts(backend: Any) -> tuple[Any, ...]:
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    return (backend.prefill_backend, backend.decode_backend) if isinstance(backend, HybridAttnBackend) else ()


@depends_on(
    "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper.plan",
    "disable_split_kv",
    what="called with disable_split_kv for passes over blocks under deterministic inference",
    why="SGLang leaves the splits of verify passes to FlashInfer, which decides by the whole batch",
    until="SGLang fixes them as it does for prefill and decode",
)
def keep_blocks_whole(backend: Any) -> None:
    """Have passes over blocks that no graph covers attend to each request in one go, as `plan_in_graphs` does it.

    Split as the batch allows, a request's sums would depend on its neighbours.
    """
    for wrapper in backend.prefill_wrappers_verify:
        wrapper.begin_forward = partial(wrapper.begin_forward, disable_split_kv=True)


@depends_on(
    "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend._prepare_cuda_graph_metadata",
    "bs",
    "num_tokens",
    "forward_mode",
    "spec_info",
    what="replaced on the instance: the graphs of a batch size share wrappers",
    why="a second capture takes the first one's plan away",
    until="SGLang keeps wrappers per graph",
)
@depends_on(
    "sglang.srt.layers.attention.flashinfer_backend:PrefillMetadata",
    "prefill_wrappers",
    "use_ragged",
    "extend_no_prefix",
    what="constructed for wrappers that are used again",
    why="it is how the backend hands wrappers to its layers",
    until="SGLang keeps wrappers per graph",
)
def share_plans(backend: Any) -> None:
    """Let all graphs of a batch size use one set of wrappers, so that one plan serves them all.

    SGLang's backend makes new wrappers for every capture and plans for the newest alone: of two graphs of one size,
    the first would replay with the plan it was captured with. backend: SGLang's `FlashInferAttnBackend`.
    """
    from sglang.srt.layers.attention.flashinfer_backend import PrefillMetadata

    stock = backend._prepare_cuda_graph_metadata

    def prepare(bs: int, num_tokens: int, forward_mode: Any, spec_info: Any) -> None:
        wrappers = backend.prefill_cuda_graph_metadata.get(bs) if forward_mode.is_target_verify() else None
        if wrappers is None:
            stock(bs, num_tokens, forward_mode, spec_info)
            if forward_mode.is_target_verify():
                for wrapper in backend.prefill_cuda_graph_metadata[bs]:
                    _leave_output_empty(wrapper)
        else:
            backend.forward_metadata = PrefillMetadata(wrappers, False, False)

    backend._prepare_cuda_graph_metadata = prepare


@depends_on(
    "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper.run",
    "q",
    "out",
    what="wrapped on the instance; _cached_o_data_type is set, and an output that is not zeroed is passed",
    why="FlashInfer zeroes its own outputs, a fill kernel per layer and pass, and refuses others without that type",
    until="SGLang passes an output",
)
def _leave_output_empty(wrapper: Any) -> None:
    """Have FlashInfer not zero an output that a plan covers row by row: a fill kernel per layer and pass."""
    stock = wrapper.run

    def run(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        wrapper._cached_o_data_type = q.dtype  # SGLang plans without a type, and then no output is welcome
        return stock(q, *args, out=torch.empty_like(q), **kwargs)

    wrapper.run = run


@depends_on(
    "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.init_cuda_graph_state",
    "max_bs",
    "max_num_tokens",
    "kv_indices_buf",
    what="replaced on the instance: it allocates indices per request and no mask",
    why="it allocates a context's worth of indices and mask for every token of every block",
    until="SGLang sizes them by request",
)
def bound_indices(backend: Any) -> None:
    """Allocate page indices for the requests that a graph can hold, and no mask.

    SGLang's backend allocates for every token of every block a context's worth of indices and of mask: at 128 requests
    with blocks of 32 and a context of 40k, 0.8 GB.
    """
    stock = backend.init_cuda_graph_state

    def init_cuda_graph_state(max_bs: int, max_num_tokens: int, kv_indices_buf: torch.Tensor | None = None) -> None:
        if kv_indices_buf is None:
            columns = backend.req_to_token_pool.req_to_token.shape[1]
            # The planner asks for room for each block twice.
            size = max_bs * columns + 2 * max_num_tokens
            kv_indices_buf = torch.zeros(size, dtype=torch.int32, device=backend.workspace_buffer.device)
        stock(max_bs, 0, kv_indices_buf)

    backend.init_cuda_graph_state = init_cuda_graph_state
