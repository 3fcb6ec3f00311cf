"""Quantised checkpoints: which layers of the diffusion view are quantised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.config import QUANT_METHODS

_PROJECTIONS = tuple(f"{name}_proj_diff" for name in "qkvo")
_PATTERN = ".*_proj_diff$"


@depends_on(
    "sglang.srt.layers.quantization.base_config:QuantizationConfig.get_quant_method",
    "layer",
    "prefix",
    what="asked in the diffusion view's own names for the layers of a second Qwen3Attention",
    why="Qwen3Attention names its layers itself, as those of the AR view; GPTQ and AWQ know no fused layers",
    until="Qwen3Attention takes the names of its layers, and GPTQ and AWQ heed packed_modules_mapping",
)
def for_diffusion_view(quant_config: Any, parts: Mapping[str, Sequence[str]]) -> Any:
    """SGLang's quantization configuration, as the diffusion view's layers have to ask it.

    A layer that Qwen3 calls `o_proj` asks as `o_proj_diff`, and `qkv_proj` as what it is fused of: `q_proj_diff` and
    so on. Those are the names in checkpoints, and so in the lists of layers that are left unquantised.

    Args:
        quant_config: None for a checkpoint that is not quantised.
        parts: names of the parts of fused layers (`packed_modules_mapping`).
    """
    if quant_config is None:
        return None
    result = copy(quant_config)

    def get_quant_method(layer: Any, prefix: str) -> Any:
        path, _, name = prefix.rpartition(".")
        names = [f"{path}.{part}" for part in parts.get(f"{name}_diff", [f"{name}_diff"])]
        methods = [quant_config.get_quant_method(layer, part) for part in names]
        if len({type(method) for method in methods}) > 1:
            raise ValueError(
                f"quantization_config: of {', '.join(names)} some are quantised and some are not; they are one layer "
                "in SGLang, so quantise all of them or none."
            )
        return methods[0]

    result.get_quant_method = get_quant_method
    return result


def leaving_out_diffusion_view(declared: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's `quantization_config` that says: the `*_diff` layers are not quantised.

    Raises:
        ValueError: naming a method that ORTHRUS does not serve.
    """
    method = declared.get("quant_method")
    if method == "gptq":
        return {**declared, "dynamic": {f"-:{_PATTERN}": {}, **(declared.get("dynamic") or {})}}
    if method == "compressed-tensors":
        return {**declared, "ignore": [*(declared.get("ignore") or []), f"re:{_PATTERN}"]}
    if method in QUANT_METHODS:
        key = "ignored_layers" if declared.get("ignored_layers") else "modules_to_not_convert"
        return {**declared, key: [*(declared.get(key) or []), *_PROJECTIONS]}
    raise ValueError(f"quant_method {method}: ORTHRUS serves {', '.join(QUANT_METHODS)}; quantise it with one of these")
