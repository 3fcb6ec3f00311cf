"""Norm, RoPE and store in one kernel against the three of SGLang's that plain Qwen3 takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_orthrus.models.qkv_kernel import place_qkv

pytestmark = pytest.mark.gpu

EPS = 1e-6
SLOTS = 8192


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (16, 8), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 32, 992, 4096])
def test_it_does_what_sglangs_kernels_do(tokens: int, q_heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """All but few elements of q and k are the same, and those differ by a rounding; v is copied."""
    from sglang.kernels.ops.attention.rope import apply_rope_with_cos_sin_cache_inplace
    from sglang.kernels.ops.layernorm.norm import fused_inplace_qknorm

    size = 128
    generator = torch.Generator("cuda").manual_seed(tokens)

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device="cuda").to(dtype)

    qkv = 3 * noise(tokens, (q_heads + 2 * kv_heads) * size)
    q_norm, k_norm = norms = [SimpleNamespace(weight=noise(size), variance_epsilon=EPS) for _ in "qk"]
    inverse = 1e6 ** -(torch.arange(0, size, 2, device="cuda") / size)
    angles = torch.arange(40_960, device="cuda")[:, None] * inverse
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(40_960, (tokens,), generator=generator, device="cuda")
    slots = torch.randperm(SLOTS, generator=generator, device="cuda")[:tokens]
    k_cache, v_cache = caches = [torch.zeros(SLOTS, kv_heads, size, dtype=dtype, device="cuda") for _ in "kv"]

    wanted = qkv.clone()
    q, k, v = wanted.view(tokens, -1, size).split([q_heads, kv_heads, kv_heads], dim=1)
    fused_inplace_qknorm(q, k, *(norm.weight for norm in norms), eps=EPS, head_dim=size)
    apply_rope_with_cos_sin_cache_inplace(positions=positions, q=q, k=k, cos_sin_cache=cos_sin, is_neox=True)

    ours = place_qkv(qkv, k_cache, v_cache, q_norm, k_norm, cos_sin, positions, slots).view_as(q)
    in_place = qkv.view(tokens, -1, size)[:, q_heads : q_heads + kv_heads]
    assert torch.equal(in_place, caches[0][slots])
    assert torch.equal(v, caches[1][slots])
    step = 16 * torch.finfo(dtype).eps  # between neighbours at the largest values
    for mine, theirs in ((ours, q), (caches[0][slots], k)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=step)
        assert (mine != theirs).float().mean() < 3e-3
    assert all(int((cache != 0).any(dim=(1, 2)).sum()) == tokens for cache in caches)
