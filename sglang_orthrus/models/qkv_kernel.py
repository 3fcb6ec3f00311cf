"""What lies between a block's projections and its attention, in one kernel: q/k norm, RoPE, and the store of K and V.

SGLang's Qwen3 launches four for it, the last a copy of q, and a round of 36 layers goes through them 72 times: at small
batches their launches cost more than their work.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from sglang.kernels.jit.utils import is_arch_support_pdl
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.runtime_context import get_exec

from sglang_orthrus.compat.ledger import depends_on

_MAX_HEADS = 8  # of one program


@triton.jit
def place_kernel(  # type: ignore[no-untyped-def]
    qkv,  # [tokens, (q heads + 2 kv heads) * 2 HALF]; k is normalised and rotated in place
    q_out,  # [tokens, q heads, 2 HALF] out
    k_cache,  # [slots, kv heads, 2 HALF] out
    v_cache,
    q_weight,  # [2 HALF]
    k_weight,
    cos_sin,  # [positions, 2 HALF] fp32, cosines first
    positions,  # [tokens]
    slots,  # [tokens]
    q_eps,
    k_eps,
    qkv_stride,
    cache_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,  # of a head's elements; RoPE rotates the halves into each other
    HEADS: tl.constexpr,  # of one program
    USE_PDL: tl.constexpr,
):
    """One program per token and group of heads, which are all q's, k's or v's."""
    if USE_PDL:  # programmatic dependent launch: start while the projection ends, let attention start likewise
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    head = tl.arange(0, HEADS)[:, None]
    element = tl.arange(0, HALF)[None, :]
    source = qkv + token * qkv_stride + (first + head) * (2 * HALF) + element
    low = tl.load(source)
    high = tl.load(source + HALF)
    slot = tl.load(slots + token).to(tl.int64)
    if first >= Q_HEADS + KV_HEADS:
        target = v_cache + slot * cache_stride + (first - Q_HEADS - KV_HEADS + head) * (2 * HALF) + element
        tl.store(target, low)
        tl.store(target + HALF, high)
    else:
        is_query = first < Q_HEADS
        weight = q_weight if is_query else k_weight
        eps = q_eps if is_query else k_eps
        x, y = low.to(tl.float32), high.to(tl.float32)
        squares = tl.sum(x * x + y * y, axis=1)[:, None]
        factor = tl.rsqrt(squares / (2 * HALF) + eps)
        # Rounded in between, as by SGLang's kernels.
        x = (x * factor * tl.load(weight + element).to(tl.float32)).to(low.dtype).to(tl.float32)
        y = (y * factor * tl.load(weight + HALF + element).to(tl.float32)).to(low.dtype).to(tl.float32)
        angle = cos_sin + tl.load(positions + token).to(tl.int64) * (2 * HALF) + element
        cos, sin = tl.load(angle), tl.load(angle + HALF)
        new_low, new_high = (x * cos - y * sin).to(low.dtype), (y * cos + x * sin).to(low.dtype)
        if is_query:
            address = q_out + (token * Q_HEADS + first + head) * (2 * HALF) + element
            tl.store(address, new_low)
            tl.store(address + HALF, new_high)
        else:
            # Triton's attention reads the block's own K and V from here.
            tl.store(source, new_low)
            tl.store(source + HALF, new_high)
            address = k_cache + slot * cache_stride + (first - Q_HEADS + head) * (2 * HALF) + element
            tl.store(address, new_low)
            tl.store(address + HALF, new_high)


def place_qkv(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: Any,
    k_norm: Any,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Normalise q and k, rotate them, and store k and v: what `apply_qk_norm`, `RotaryEmbedding` and the pool do.

    Args:
        qkv: [tokens, q, k and v of all heads], contiguous; k becomes what is stored.
        k_cache, v_cache: [slots, kv heads, head], contiguous, in qkv's dtype.
        q_norm, k_norm: SGLang's `RMSNorm` of one head.
        cos_sin: [positions, head] fp32, `RotaryEmbedding.cos_sin_cache`.
        positions, slots: [tokens].

    Returns:
        q, [tokens, q heads * head].
    """
    tokens, width = qkv.shape
    _, kv_heads, size = k_cache.shape
    q_heads = width // size - 2 * kv_heads
    heads = gcd(q_heads, kv_heads, _MAX_HEADS)
    q = qkv.new_empty(tokens, q_heads * size)
    pdl = {"USE_PDL": True, "launch_pdl": True} if qkv.is_cuda and is_arch_support_pdl() else {"USE_PDL": False}
    place_kernel[(tokens, width // size // heads)](
        qkv,
        q,
        k_cache,
        v_cache,
        q_norm.weight,
        k_norm.weight,
        cos_sin,
        positions,
        slots,
        q_norm.variance_epsilon,
        k_norm.variance_epsilon,
        qkv.stride(0),
        k_cache.stride(0),
        Q_HEADS=q_heads,
        KV_HEADS=kv_heads,
        HALF=size // 2,
        HEADS=heads,
        **pdl,
    )
    return q


@depends_on(
    "sglang.srt.model_executor.forward_context:get_token_to_kv_pool",
    what="called for the buffers that the kernel stores to",
    why="an attention layer does not know its pool (Qwen3's fused path on ROCm calls it, too)",
    until="Qwen3 fuses norm, RoPE and store on CUDA",
)
def caches_of(attention: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Where `place_qkv` may store a layer's K and V; None if SGLang's own kernels have to do it.

    They do on a CPU, with scaled RoPE, with a KV cache of another data type or layout, and under deterministic
    inference, which is to have the very arithmetic of plain SGLang. attention: a `Qwen3Attention`.
    """
    rope, size = attention.rotary_emb, attention.head_dim
    if not hidden_states.is_cuda or get_exec().deterministic.enable_deterministic_inference:
        return None
    is_stock = type(rope) is RotaryEmbedding and rope.is_neox_style and rope.rotary_dim == size
    if not is_stock or size & (size - 1) or rope.cos_sin_cache.dtype != torch.float32:
        return None
    pool = get_token_to_kv_pool()
    if pool.requires_physical_write_loc:
        return None
    k_cache, v_cache = pool.get_kv_buffer(attention.attn.layer_id)
    layouts = {(cache.dim(), cache.dtype, cache.is_contiguous(), cache.shape) for cache in (k_cache, v_cache)}
    wanted = (3, hidden_states.dtype, True, (k_cache.shape[0], attention.num_kv_heads, size))
    return (k_cache, v_cache) if layouts == {wanted} else None
