"""Scales of K and V: what SGLang loads for the AR view holds for the diffusion view, whose K/V share the cache."""

from __future__ import annotations

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_orthrus.models.orthrus import DiffusionAttention


def test_both_views_have_the_scales_that_sglang_set_last() -> None:
    """A block's K/V would be stored and read with other scales than the text's before it."""
    ar = RadixAttention(16, 128, 128**-0.5, num_kv_heads=8, layer_id=3, prefix="model.layers.3.self_attn.attn")
    diffusion = DiffusionAttention(ar)
    assert diffusion.k_scale is None and diffusion.v_scale_float is None
    # As `Qwen2Model.load_kv_cache_scales` does.
    ar.k_scale = ar.v_scale = 0.5
    assert diffusion.k_scale == diffusion.v_scale == 0.5
    # As `BaseKVCacheMethod` does.
    ar.k_scale = scale = torch.nn.Parameter(torch.tensor(0.25), requires_grad=False)
    ar.k_scale_float = 0.25
    assert diffusion.k_scale is ar.k_scale and diffusion.k_scale_float == 0.25
    scale.data.fill_(0.75)
    assert float(diffusion.k_scale) == 0.75
    assert list(diffusion.named_parameters()) == [], "nothing to load twice"


def test_the_diffusion_view_attends_as_the_ar_view_but_for_the_causal_mask() -> None:
    ar = RadixAttention(16, 128, 128**-0.5, num_kv_heads=8, layer_id=3, prefix="attn")
    ours, theirs = vars(DiffusionAttention(ar)), vars(ar)
    unlike = {name for name, value in theirs.items() if not name.startswith("_") and ours.get(name) != value}
    assert unlike == {"attn_type"}
    assert ours["attn_type"] is AttentionType.ENCODER_ONLY
