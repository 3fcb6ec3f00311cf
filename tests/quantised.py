"""Quantised checkpoints made on the spot, by compressed-tensors, which SGLang brings: rounded to nearest, 4 bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

from tests.fixtures import write_json

FORMAT = "pack-quantized"


def write_w4a16(source: Path, target: Path) -> Path:
    """Quantise every projection of a checkpoint, those of the diffusion view included, and return its directory."""
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*", "README.md"))
    for file in source.glob("*.safetensors"):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            layer, _, parameter = name.rpartition(".")
            is_projection = "_proj" in layer and parameter == "weight"
            parts = _compressed(tensor, scheme) if is_projection else {parameter: tensor}
            tensors |= {f"{layer}.{part}": value.contiguous() for part, value in parts.items()}
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    declared = QuantizationConfig(
        config_groups={"group_0": scheme}, format=FORMAT, quantization_status="compressed", ignore=["lm_head"]
    )
    write_json(target / "config.json", {**config, "quantization_config": declared.model_dump(mode="json")})
    return target


def _compressed(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
    """[rows, columns] -> its packed parts."""
    arguments = scheme.weights
    assert arguments is not None and arguments.group_size is not None
    groups = weight.unflatten(1, (-1, arguments.group_size))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype), "weight_zero_point": zero_point}
    packed: dict[str, torch.Tensor] = BaseCompressor.get_value_from_registry(FORMAT).compress(state, scheme)
    return packed
