"""Which attention backend runs a round, and what FlashInfer's needs before SGLang makes it."""

from __future__ import annotations

from typing import Any

from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_orthrus.compat.ledger import EXTENSION_POINT, depends_on
from sglang_orthrus.passes.plan_kernel import max_split_work

# What SGLang's backend takes for plain Qwen3; it does not know that ours is one.
_MIN_WORKSPACE_BYTES = 512 * 1024 * 1024
_TILE_ROWS = 128  # the largest of FlashInfer's query tiles
_LEAST_TILE_ROWS = 16  # the smallest
_NUM_ARRAYS, _ALIGNMENT = 8, 16  # of a plan's integers, and bytes
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


def int_workspace_bytes(num_requests: int, width: int, group: int, max_work: int) -> int:
    """What the integers of a plan for `num_requests` blocks of `width` rows need at most under a CUDA graph.

    Follows `PrefillPlan` in FlashInfer's scheduler.cuh: three indices and a flag per work item, an offset per request
    and one per row, each array aligned.

    Args:
        num_requests: of the graph.
        width: rows per request.
        group: query heads per key-value head.
        max_work: work items that a split may make.
    """
    rows = num_requests * width
    work = max(max_work, -(-rows * group // _LEAST_TILE_ROWS) + num_requests)
    return 4 * (3 * work + num_requests + rows + 4) + work + _ALIGNMENT * _NUM_ARRAYS


def set_workspace_size(size: int) -> None:
    """Have SGLang's backend, which is made later in this process, take a workspace of `size` bytes.

    A size that the user has set stays.
    """
    from sglang.srt.environ import envs

    if not envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.is_set():
        envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.set(size)


@depends_on(
    "sglang.srt.layers.attention.attention_registry:register_attention_backend",
    "name",
    what='called for "flashinfer": every FlashInfer backend of this process is `OrthrusFlashInferBackend`',
    why="it is how SGLang chooses a backend's class, also for the two of unlike prefill and decode backends",
    until=EXTENSION_POINT,
)
@depends_on(
    "sglang.srt.layers.attention.attention_registry:create_flashinfer_backend",
    "runner",
    what="its constructor's arguments are passed on",
    why="the workspace of a second backend is asked for through the runner",
    until=EXTENSION_POINT,
)
def register_flashinfer() -> None:
    """Have SGLang make our FlashInfer backend wherever it makes one later in this process."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    @register_attention_backend("flashinfer")
    def make(runner: Any) -> Any:
        from sglang_orthrus.passes.flashinfer import OrthrusFlashInferBackend

        return OrthrusFlashInferBackend(runner, init_new_workspace=runner.init_new_workspace)


@depends_on(
    "sglang.srt.layers.attention.hybrid_attn_backend:HybridAttnBackend._select_backend",
    "forward_mode",
    what="called for the backend that verifies, if prefill and decode have unlike ones",
    why="rounds need to know which of them runs",
    until="an attention backend says which one runs a forward mode",
)
def verifying(backend: Any) -> Any:
    """The attention backend that runs passes over blocks: one of two if prefill and decode have unlike ones."""
    from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend

    return backend._select_backend(ForwardMode.TARGET_VERIFY) if isinstance(backend, HybridAttnBackend) else backend


def plans_in_graphs(backend: Any) -> bool:
    """Whether graphs over blocks need no lengths on the host."""
    return getattr(verifying(backend), "plans_in_graphs", False)


@depends_on(
    "sglang.srt.layers.attention.hybrid_attn_backend:HybridAttnBackend",
    "prefill_backend",
    "decode_backend",
    what="needs_cpu_seq_lens becomes what the backend that verifies says",
    why="SGLang asks the decode backend, too, which may run in no round",
    until="SGLang asks the backend that verifies",
)
def wait_only_for_verifying(backend: Any) -> None:
    """Have the overlap scheduler bring lengths to the host only if the backend that runs rounds needs them."""
    backend.needs_cpu_seq_lens = verifying(backend).needs_cpu_seq_lens
