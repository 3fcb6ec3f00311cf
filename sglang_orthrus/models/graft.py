"""Give a fine-tuned model the diffusion view of the model that it was tuned from.

The result is a dual-view checkpoint whose autoregressive (AR) view is the fine-tune, so its output is the fine-tune's,
whatever the drafts are worth. They are worth as much as the two models agree.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sglang_orthrus.config import DualViewConfig, is_orthrus
from sglang_orthrus.models.checkpoint import (
    INDEX,
    check_tensors,
    is_model_file,
    link_or_copy,
    names_in,
    weight_files,
    write_json,
)
from sglang_orthrus.models.quantization import leaving_out_diffusion_view

# Of files that are written here. One is in memory at a time.
SHARD_BYTES = 2 * 2**30
# What both models must have in common, so that the diffusion view's tensors mean the same in either.
_SHAPES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "rms_norm_eps"),
)
_ADAPTER_WEIGHTS, _ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_READS_INPUT_NORM = tuple(f"{name}_proj_diff.weight" for name in "qkv")
_PEFT_PREFIX = "base_model.model."
# Settings of PEFT that change more than a product added to a matrix, and the value that means "no".
_UNMERGEABLE = {
    **{"use_dora": False, "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}},
    **{"bias": "none", "lora_bias": False},
}

Progress = Callable[[str], None]


def graft(
    base: str | Path,
    orthrus: str | Path,
    target: str | Path,
    adapter: str | Path | None = None,
    progress: Progress = lambda name: None,
) -> Path:
    """Write a dual-view checkpoint, and return its directory.

    Tensors are streamed: at most one file of `SHARD_BYTES` is in memory. Without an adapter the weight files of the
    base are hard-linked where the file system allows it. The base may be quantised; the diffusion view is not then.

    Args:
        base: directory of the model whose output counts: a Qwen3 of the Orthrus checkpoint's shape.
        orthrus: directory of the Orthrus checkpoint.
        target: directory to write.
        adapter: directory of a PEFT LoRA adapter of the base, to be merged into it.
        progress: told of every tensor that is written.

    Raises:
        FileNotFoundError: a directory is no checkpoint.
        FileExistsError: the target holds a configuration already.
        ValueError: the two models do not fit, or the adapter cannot be merged; it names what is wrong.
    """
    base, orthrus, target = Path(base), Path(orthrus), Path(target)
    config = merged_config(_json(base / "config.json"), _json(orthrus / "config.json"))
    if (target / "config.json").exists():
        raise FileExistsError(f"{target} already holds a checkpoint; choose another directory")
    own = {name: file for file in weight_files(base) for name in names_in(file)}
    if any("_diff." in name for name in own):
        raise ValueError(f"{base} has a diffusion view already")
    views = {name: file for file in weight_files(orthrus) for name in names_in(file) if "_diff." in name}
    check_tensors(views, config["num_hidden_layers"])
    view = _stream(views)
    if config.get("quantization_config"):
        view = _behind_other_norms(view, own, orthrus)
    merge = _lora(Path(adapter), own) if adapter is not None else None

    target.mkdir(parents=True, exist_ok=True)
    if merge is None:
        weight_map = {name: file.name for name, file in own.items()}
        for file in weight_files(base):
            link_or_copy(file, target / file.name)
    else:
        merged = ((name, merge(name, tensor)) for name, tensor in _stream(own))
        weight_map = _write_shards(merged, target, "model-merged", progress)
    weight_map |= _write_shards(view, target, "model-diffusion", progress)
    write_json(target / INDEX, {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))})
    write_json(target / "config.json", config)
    for file in base.iterdir():
        if file.is_file() and not is_model_file(file):
            shutil.copyfile(file, target / file.name)
    return target


def merged_config(base: Mapping[str, Any], orthrus: Mapping[str, Any]) -> dict[str, Any]:
    """The base's configuration with the Orthrus checkpoint's diffusion view.

    Raises:
        ValueError: naming every value that differs and must not.
    """
    if not is_orthrus(_Attributes(orthrus)):
        raise ValueError(f"architectures {orthrus.get('architectures')}: the second model is no Orthrus checkpoint")
    view = DualViewConfig.from_hf(_Attributes(orthrus))
    problems = [
        f"{key} {base.get(key)}, not {orthrus.get(key)}" for key in _SHAPES if base.get(key) != orthrus.get(key)
    ]
    if _rope(base) != _rope(orthrus):
        problems.append(f"rope {_rope(base)}, not {_rope(orthrus)}")
    if base.get("model_type") != "qwen3":
        problems.append(f"model_type {base.get('model_type')}, not qwen3")
    if problems:
        raise ValueError(f"the base model does not fit the Orthrus checkpoint: it has {'; '.join(problems)}")
    if orthrus.get("quantization_config"):
        raise ValueError("the Orthrus checkpoint is quantised: take the diffusion view of one that is not")
    merged = {**base, "block_size": view.block_size, "mask_token_id": view.mask_token_id}
    if base.get("quantization_config"):
        merged["quantization_config"] = leaving_out_diffusion_view(base["quantization_config"])
    return {**merged, "architectures": orthrus["architectures"]}


class _Attributes:
    """A configuration whose keys are attributes, as those of Transformers are."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        vars(self).update(config)


def _rope(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Base frequency and scaling, where either version of Transformers writes them."""
    parameters = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = parameters.pop("rope_theta", config.get("rope_theta"))
    scaling = {key: value for key, value in parameters.items() if (key, value) != ("rope_type", "default")}
    return theta, scaling


def _lora(folder: Path, own: Mapping[str, Path]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Adds a LoRA adapter's products to the matrices that it names. own: the base's tensors."""
    config = _json(folder / _ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type {config.get('peft_type')}; only LORA adapters can be merged")
    for key, none in _UNMERGEABLE.items():
        if config.get(key, none) not in (none, None, False, {}, []):
            raise ValueError(f"{folder}: {key} {config[key]} cannot be merged; merge it with PEFT first")
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    file = folder / _ADAPTER_WEIGHTS
    with safe_open(file, framework="pt") as tensors:
        factors = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in factors:
        stem, _, kind = name.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        if kind == "B.weight":
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        if kind != "A.weight" or other not in factors or f"{stem}.weight" not in own:
            raise ValueError(f"{file}: {name} belongs to no matrix of the base model")
        pairs[f"{stem}.weight"] = (factors[name], factors[other])

    def merge(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in pairs:
            return tensor
        down, up = pairs[name]
        return (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)

    return merge


def _behind_other_norms(
    view: Iterator[tuple[str, torch.Tensor]], own: Mapping[str, Path], orthrus: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """The view's tensors for a quantised base, whose norms may not be those that they were trained behind.

    AWQ divides a norm's weight by scales, and multiplies the columns of the matrices that read it by them. Both views
    read the norm before attention.

    Args:
        own: the base's tensors.
        orthrus: the checkpoint that the view is of.
    """
    norms = {name: file for name, file in own.items() if name.endswith(".input_layernorm.weight")}
    former = dict(_stream({name: file for file in weight_files(orthrus) for name in names_in(file) if name in norms}))
    scales = {}
    for name, norm in _stream(norms):
        now, then = norm.float(), former[name].float()
        scales[name] = torch.where(now == then, 1.0, then / now)  # widened checkpoints have zeros
    for name, tensor in view:
        if name.endswith(_READS_INPUT_NORM):
            layer = name.partition("self_attn.")[0]
            tensor = (tensor.float() * scales[f"{layer}input_layernorm.weight"]).to(tensor.dtype)
        yield name, tensor


def _stream(where: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors by name, one at a time, file by file."""
    for file in sorted(set(where.values())):
        with safe_open(file, framework="pt") as tensors:
            for name in sorted(name for name, holder in where.items() if holder == file):
                yield name, tensors.get_tensor(name)


def _write_shards(
    tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, stem: str, progress: Progress
) -> dict[str, str]:
    """Write tensors to files of at most `SHARD_BYTES`, or of one tensor; returns the file of each."""
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number, size = 1, 0

    def flush() -> None:
        nonlocal number, size
        if shard:
            save_file(shard, folder / f"{stem}-{number:05}.safetensors", metadata={"format": "pt"})
        shard.clear()
        number, size = number + 1, 0

    for name, tensor in tensors:
        if size + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        weight_map[name] = f"{stem}-{number:05}.safetensors"
        progress(name)
    flush()
    return weight_map


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
