"""Norm, RoPE and store in one kernel, by Triton's interpreter, against the same steps in PyTorch."""

from __future__ import annotations

from concurrent.futures import Executor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from sglang_orthrus.models import qkv_kernel
from tests.unit.interpreted import placed_qkv

EPS = 1e-6
SLOTS = 40
SHAPES = ((4, 2, 64), (8, 8, 16), (6, 2, 32))  # q heads, key-value heads, elements of a head
TOKENS = 5


def make_case(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Any]:
    q_heads, kv_heads, size = shape
    generator = torch.Generator().manual_seed(q_heads)

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(dtype)

    angles = torch.rand(100, size // 2, generator=generator) * 6
    caches = {name: torch.full((SLOTS, kv_heads, size), 7.0, dtype=dtype) for name in ("k_cache", "v_cache")}
    return {
        "shape": shape,
        "eps": EPS,
        "qkv": noise(TOKENS, (q_heads + 2 * kv_heads) * size),
        "q_weight": noise(size),
        "k_weight": noise(size),
        "cos_sin": torch.cat((angles.cos(), angles.sin()), dim=-1),
        "positions": torch.randint(100, (TOKENS,), generator=generator),
        "slots": torch.randperm(SLOTS, generator=generator)[:TOKENS],
        **caches,
    }


def in_steps(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, [tokens, heads, size] each, rounded after the norm and after the rotation."""
    q_heads, kv_heads, size = case["shape"]
    heads = case["qkv"].view(TOKENS, -1, size)
    q, k, v = heads.split([q_heads, kv_heads, kv_heads], dim=1)
    cos, sin = case["cos_sin"][case["positions"]][:, None, :].chunk(2, dim=-1)

    def placed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.float()
        low, high = normed.to(x.dtype).float().chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)

    return placed(q, case["q_weight"]), placed(k, case["k_weight"]), v


def make_cases() -> list[dict[str, Any]]:
    # Triton's interpreter has no proper bf16.
    return [make_case(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.float16)]


def test_one_kernel_does_what_the_steps_do(interpreter: Executor) -> None:
    for case, done in zip(make_cases(), interpreter.submit(placed_qkv, make_cases()).result(), strict=True):
        q, k, v = in_steps(case)
        # One rounding of q's or k's norm may fall to the other side, and the rotation adds two of them.
        atol, rtol = (1e-6, 1e-5) if q.dtype is torch.float32 else (2**-9, 2**-10)
        kv_heads, size = case["shape"][1:]
        torch.testing.assert_close(done["q"].view_as(q), q, atol=atol, rtol=rtol)
        torch.testing.assert_close(done["k_cache"][case["slots"]], k, atol=atol, rtol=rtol)
        assert torch.equal(done["v_cache"][case["slots"]], v)
        others = [slot for slot in range(SLOTS) if slot not in case["slots"].tolist()]
        assert all((done[name][others] == 7).all() for name in ("k_cache", "v_cache"))
        in_place = done["qkv"].view(TOKENS, -1, size)[:, -2 * kv_heads : -kv_heads]
        assert torch.equal(in_place, done["k_cache"][case["slots"]])


class Rope(RotaryEmbedding):
    """A kind of RoPE that the kernel knows nothing of."""


def attention_of(rope: type[RotaryEmbedding] = RotaryEmbedding, **changed: Any) -> Any:
    made = object.__new__(rope)
    torch.nn.Module.__init__(made)
    made.is_neox_style, made.rotary_dim = changed.get("is_neox_style", True), changed.get("rotary_dim", 64)
    made.cos_sin_cache = torch.zeros(4, 64)
    return SimpleNamespace(rotary_emb=made, head_dim=64, num_kv_heads=2, attn=SimpleNamespace(layer_id=0))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Any:
    cache = torch.zeros(SLOTS, 2, 64, dtype=torch.bfloat16)
    found = SimpleNamespace(requires_physical_write_loc=False, buffers=[cache, cache.clone()])
    found.get_kv_buffer = lambda layer_id: tuple(found.buffers)
    monkeypatch.setattr(qkv_kernel, "get_token_to_kv_pool", lambda: found)
    flags = SimpleNamespace(enable_deterministic_inference=False)
    found.flags = flags
    monkeypatch.setattr(qkv_kernel, "get_exec", lambda: SimpleNamespace(deterministic=flags))
    return found


ON_GPU: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)


def test_it_stores_into_a_plain_pool(pool: Any) -> None:
    found = qkv_kernel.caches_of(attention_of(), ON_GPU)
    assert found is not None and all(map(torch.equal, found, pool.buffers))


def test_sglangs_kernels_do_the_rest(pool: Any) -> None:
    """Whatever this one cannot do, or not with the same digits."""
    assert qkv_kernel.caches_of(attention_of(), torch.zeros(1, dtype=torch.bfloat16)) is None, "on a CPU"
    for attention in (attention_of(Rope), attention_of(is_neox_style=False), attention_of(rotary_dim=32)):
        assert qkv_kernel.caches_of(attention, ON_GPU) is None
    pool.flags.enable_deterministic_inference = True
    assert qkv_kernel.caches_of(attention_of(), ON_GPU) is None
    pool.flags.enable_deterministic_inference = False
    pool.requires_physical_write_loc = True
    assert qkv_kernel.caches_of(attention_of(), ON_GPU) is None
    pool.requires_physical_write_loc = False
    for k_cache in (
        pool.buffers[0].to(torch.float8_e4m3fn),
        pool.buffers[0].view(SLOTS // 4, 4, 2, 64),
        pool.buffers[0].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        pool.buffers[0] = k_cache
        assert qkv_kernel.caches_of(attention_of(), ON_GPU) is None
