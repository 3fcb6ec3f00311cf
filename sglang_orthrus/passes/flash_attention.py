"""FA3 over blocks: the schedule of its kernel's work is made once a pass, and not in every layer.

SGLang does the same for decode steps. In every layer it takes a kernel of 3 microseconds: in the 8B shape a fortieth of
a pass over the blocks of one request.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.radix_attention import AttentionType

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.core import OrthrusBlockInput

_FIRST_LAYER = 0
_FOR_BLOCKS = "SGLang makes a schedule for verify passes, too"


@depends_on(
    "sglang.srt.layers.attention.flashattention_backend:FlashAttentionBackend._mxfp8_sf_kwargs",
    "layer",
    "forward_batch",
    "q_descale",
    what="replaced on a backend: for blocks, what it returns has `scheduler_metadata`, too",
    why="forward_extend passes to the kernel what this returns, and no schedule",
    until=_FOR_BLOCKS,
)
@depends_on(
    "sglang.srt.layers.attention.flashattention_backend:FlashAttentionBackend",
    what="_get_scheduler_metadata and _disable_scheduler_metadata_precompute are read",
    why="they tell whether a backend's kernel takes a schedule",
    until=_FOR_BLOCKS,
)
def schedule_once_a_pass(backend: Any) -> None:
    """Have SGLang's FA3 backend make its kernel's schedule in the first layer of a pass over blocks.

    Under a CUDA graph that is a part of the graph, so every replay makes it from the lengths where they are. Backends
    whose kernels take no schedule stay as they are.
    """
    if getattr(backend, "_get_scheduler_metadata", None) is None or backend._disable_scheduler_metadata_precompute:
        return
    others = backend._mxfp8_sf_kwargs
    schedule = None

    def further_arguments(layer: Any, forward_batch: Any, q_descale: Any = None) -> dict[str, Any]:
        nonlocal schedule
        found: dict[str, Any] = others(layer, forward_batch, q_descale)
        if not isinstance(forward_batch.spec_info, OrthrusBlockInput):
            return found
        if layer.layer_id == _FIRST_LAYER:
            schedule = _schedule(backend, is_causal=layer.attn_type is not AttentionType.ENCODER_ONLY)
        return found | {"scheduler_metadata": schedule}

    backend._mxfp8_sf_kwargs = further_arguments


@depends_on(
    "sgl_kernel.flash_attn:get_scheduler_metadata",
    "batch_size",
    "max_seqlen_q",
    "max_seqlen_k",
    "num_heads",
    "num_heads_k",
    "headdim",
    "cache_seqlens",
    "qkv_dtype",
    "cu_seqlens_q",
    "page_size",
    "causal",
    "has_softcap",
    "num_splits",
    what="called with what the kernel itself would make a schedule of",
    why="SGLang's own call is for decode steps",
    until=_FOR_BLOCKS,
)
def _schedule(backend: Any, is_causal: bool) -> Any:
    """Of the pass that runs. Its longest context is the page table's, as the kernel assumes it, so both split alike."""
    metadata = backend.forward_metadata
    return backend._get_scheduler_metadata(
        batch_size=metadata.cache_seqlens_int32.shape[0],
        max_seqlen_q=metadata.max_seq_len_q,
        max_seqlen_k=metadata.page_table.shape[1] * backend.page_size,
        num_heads=backend.num_attention_heads,
        num_heads_k=backend.num_kv_heads,
        headdim=backend.head_dim,
        cache_seqlens=metadata.cache_seqlens_int32,
        qkv_dtype=backend.kv_cache_dtype,
        cu_seqlens_q=metadata.cu_seqlens_q,
        page_size=backend.page_size,
        causal=is_causal,
        has_softcap=backend.has_softcap,
        num_splits=backend.num_splits,
    )
