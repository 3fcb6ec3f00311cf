"""The dual-view model in plain PyTorch: Qwen3 with a second set of attention projections (arXiv 2605.12825).

Weight names are those of Hugging Face's Qwen3, plus `*_diff` for the diffusion view.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

View = Literal["ar", "diff"]
Mask = Tensor | BlockMask | None
# (layer, new keys, new values) -> keys and values to attend to, each [bs, kv_heads, length, head_dim].
KeyValues = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
DIFF_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


@dataclass(frozen=True, slots=True)
class NanoConfig:
    """The shape of the model; field names are those of config.json."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 4096
    block_size: int = 32
    mask_token_id: int = 4095

    def tiny(self) -> NanoConfig:
        """The same structure in the smallest widths, for tests."""
        return replace(self, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Grouped-query attention. q [bs, heads, q_len, d], k and v [bs, kv_heads, kv_len, d]; None means causal."""
    if isinstance(mask, BlockMask):
        out = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32, returned in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Rotary:
    """cos and sin of rotary embeddings for given positions [bs, length]; each [bs, 1, length, head_dim], fp32."""

    def __init__(self, positions: Tensor, config: NanoConfig) -> None:
        half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions.float()[:, None, :, None] * config.rope_theta ** (-half / config.head_dim)
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def apply(self, x: Tensor) -> Tensor:
        """Rotates x [bs, heads, length, head_dim] (halves, not pairs)."""
        first, second = x.float().chunk(2, -1)
        return (x.float() * self.cos + torch.cat((-second, first), -1) * self.sin).to(x.dtype)


class Attention(nn.Module):
    """Attention with two sets of projections and norms, one per view."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, d = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        for suffix in ("", "_diff"):
            self.add_module("q_proj" + suffix, nn.Linear(width, heads * d, bias=False))
            self.add_module("k_proj" + suffix, nn.Linear(width, kv_heads * d, bias=False))
            self.add_module("v_proj" + suffix, nn.Linear(width, kv_heads * d, bias=False))
            self.add_module("o_proj" + suffix, nn.Linear(heads * d, width, bias=False))
            self.add_module("q_norm" + suffix, RMSNorm(d, config.rms_norm_eps))
            self.add_module("k_norm" + suffix, RMSNorm(d, config.rms_norm_eps))

    def forward(self, x: Tensor, rotary: Rotary, view: View, layer: int, keys: KeyValues, mask: Mask) -> Tensor:
        """x [bs, length, hidden] -> the same shape."""
        suffix = "_diff" if view == "diff" else ""
        bs, length, _ = x.shape

        def heads(name: str) -> Tensor:
            projected: Tensor = getattr(self, name + suffix)(x)
            return projected.view(bs, length, -1, self.head_dim)

        q = getattr(self, "q_norm" + suffix)(heads("q_proj")).transpose(1, 2)
        k = getattr(self, "k_norm" + suffix)(heads("k_proj")).transpose(1, 2)
        v = heads("v_proj").transpose(1, 2)
        k, v = keys(layer, rotary.apply(k), v)
        out = attend(rotary.apply(q), k, v, mask).transpose(1, 2).reshape(bs, length, -1)
        projected: Tensor = getattr(self, "o_proj" + suffix)(out)
        return projected


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer; norms and MLP are shared by both views."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Backbone(nn.Module):
    """Embedding, layers and final norm, under the names of the checkpoint."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def own_keys(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attends to the new keys alone: a sequence without a past."""
    return k, v


class OrthrusLM(nn.Module):
    """The dual-view model with a tied head."""

    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        depth = 1 / math.sqrt(2 * config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02 if "embed" in name else 0.7 / math.sqrt(weight.shape[1])
                nn.init.normal_(weight, std=std * (depth if "o_proj" in name or "down_proj" in name else 1.0))
        self.copy_views()

    @torch.no_grad()
    def copy_views(self) -> None:
        """Starts the diffusion view from the AR view."""
        weights = dict(self.named_parameters())
        for name, weight in weights.items():
            if "_diff" in name:
                weight.copy_(weights[name.replace("_diff", "")])

    def hidden(self, ids: Tensor, positions: Tensor, view: View, keys: KeyValues, mask: Mask) -> Tensor:
        """Final hidden states [bs, length, hidden] of tokens `ids` [bs, length] at `positions` [bs, length]."""
        x = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rotary = Rotary(positions, self.config)
        for i, layer in enumerate(self.model.layers):
            assert isinstance(layer, Layer)
            x = x + layer.self_attn(layer.input_layernorm(x), rotary, view, i, keys, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary [..., vocab]."""
        return F.linear(hidden, self.model.embed_tokens.weight)
