"""SGLang's Qwen3 layers and its sampler, with classes of ours in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang_orthrus.compat.ledger import depends_on


@depends_on(
    "sglang.srt.models.qwen3:Qwen3Attention",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "layer_id",
    "prefix",
    what="replaced while an Orthrus model is constructed",
    why="Qwen3DecoderLayer takes the class from its module",
    until="Qwen3DecoderLayer accepts an attention class",
)
@contextmanager
def qwen3_attention_class(attention: type) -> Iterator[None]:
    """Build Qwen3 layers with `attention` in place of `Qwen3Attention` for the duration."""
    from sglang.srt.models import qwen3

    stock = qwen3.Qwen3Attention
    qwen3.Qwen3Attention = attention
    try:
        yield
    finally:
        qwen3.Qwen3Attention = stock


@depends_on(
    "sglang.srt.layers.sampler:create_sampler",
    what="the sampler that it made is replaced on the model runner",
    why="the server argument that chooses a sampler also decides about its filters",
    until="SGLang's sampler chooses its path row by row",
)
def replace_sampler(model_runner: Any, sampler: Any) -> None:
    """Have prefill choose first tokens with `sampler`."""
    model_runner.sampler = sampler
