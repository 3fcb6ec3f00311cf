"""Small checkpoints made on the spot: random dual-view ones, and folders shaped like the released ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)
MASK_TOKEN = "<|mask|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A tiny Orthrus model. `vocab` leaves room above the 264 tokenizer entries."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 96
    vocab: int = 320
    block: int = 8
    tied: bool = True
    max_positions: int = 4096


def write_checkpoint(
    folder: Path, shape: Shape = Shape(), *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random dual-view checkpoint with a byte-level tokenizer, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(folder)
    config = {
        "architectures": ["OrthrusLM"],
        "model_type": "qwen3",
        "block_size": shape.block,
        "mask_token_id": tokenizer.token_to_id(MASK_TOKEN),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", config)
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(shape, seed).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_weights(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Gaussian weights, scaled so that the logits of either view have a standard deviation of about four."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 1.5) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * gain / columns**0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.2 * torch.randn(size, generator=generator)

    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = {
        "model.embed_tokens.weight": matrix(shape.vocab, shape.hidden, gain=4.0),
        "model.norm.weight": norm(shape.hidden),
    }
    if not shape.tied:
        weights["lm_head.weight"] = matrix(shape.vocab, shape.hidden, gain=4.0)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = norm(shape.hidden)
        weights[prefix + "post_attention_layernorm.weight"] = norm(shape.hidden)
        weights[prefix + "mlp.gate_proj.weight"] = matrix(shape.intermediate, shape.hidden)
        weights[prefix + "mlp.up_proj.weight"] = matrix(shape.intermediate, shape.hidden)
        weights[prefix + "mlp.down_proj.weight"] = matrix(shape.hidden, shape.intermediate)
        for view in ("", "_diff"):
            weights[f"{prefix}self_attn.q_proj{view}.weight"] = matrix(q_size, shape.hidden)
            weights[f"{prefix}self_attn.k_proj{view}.weight"] = matrix(kv_size, shape.hidden)
            weights[f"{prefix}self_attn.v_proj{view}.weight"] = matrix(kv_size, shape.hidden)
            weights[f"{prefix}self_attn.o_proj{view}.weight"] = matrix(shape.hidden, q_size)
            weights[f"{prefix}self_attn.q_norm{view}.weight"] = norm(shape.head_dim)
            weights[f"{prefix}self_attn.k_norm{view}.weight"] = norm(shape.head_dim)
    return weights


@dataclass(frozen=True)
class Released:
    """What distinguishes the sizes of the released checkpoints."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    tied: bool


RELEASED = {
    "1.7B": Released(hidden=2048, intermediate=6144, layers=28, heads=16, tied=True),
    "8B": Released(hidden=4096, intermediate=12288, layers=36, heads=32, tied=False),
}


def write_released_shaped(folder: Path, size: str, layers: int = 2) -> Path:
    """Write config and tokenizer files in the released shape of `size`, cut to `layers` layers, no weights.

    For `--load-format dummy`. The tokenizer is the tiny byte-level one, in files of the released shape.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    released = RELEASED[size]
    config = {
        "architectures": ["OrthrusLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_orthrus.OrthrusConfig",
            "AutoModelForCausalLM": "modeling_orthrus.OrthrusLM",
        },
        "block_size": 32,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": released.hidden,
        "initializer_range": 0.02,
        "intermediate_size": released.intermediate,
        "layer_types": ["full_attention"] * layers,
        "lora_alpha": 32,
        "mask_token_id": 151669,
        "max_position_embeddings": 40960,
        "max_window_layers": released.layers,
        "model_type": "qwen3",
        "num_attention_heads": released.heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": 8,
        "pad_token_id": None,
        "r": 16,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": released.tied,
        "transformers_version": "5.8.1",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    write_json(folder / "config.json", config)
    return folder


def write_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer (256 bytes, Qwen3's special tokens, a mask token), laid out as released."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, MASK_TOKEN])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "backend": "tokenizers",
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "extra_special_tokens": [*SPECIAL_TOKENS],
            "is_local": False,
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return tokenizer


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
