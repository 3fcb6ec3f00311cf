"""Which layers SGLang quantises, as the configuration of a checkpoint says it, and which forms are refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.awq import AWQConfig
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.server_args import prepare_server_args

from sglang_orthrus.models.orthrus import OrthrusLM, _checked
from sglang_orthrus.models.quantization import for_diffusion_view, leaving_out_diffusion_view
from sglang_orthrus.server_args import refusals
from tests.fixtures import write_checkpoint

pytestmark = pytest.mark.contract

PARTS = OrthrusLM.packed_modules_mapping
ATTENTION = "model.layers.0.self_attn."
LAYERS = {"qkv_proj": QKVParallelLinear, "o_proj": RowParallelLinear}
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False}
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None}
# As public quantisers declare a plain Qwen3 that they have quantised.
DECLARED: dict[str, tuple[Any, dict[str, Any]]] = {
    "awq": (
        AWQConfig,
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": None},
    ),
    "gptq": (
        GPTQMarlinConfig,
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    ),
    "compressed-tensors": (
        CompressedTensorsConfig,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": GROUP},
        },
    ),
    "fp8": (
        Fp8Config,
        {
            **{"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
            "modules_to_not_convert": ["lm_head", "model.layers.0.input_layernorm"],
        },
    ),
}


@pytest.fixture(autouse=True)
def _any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompressedTensorsConfig, "_check_scheme_supported", lambda *args, **kwargs: True)


def are_quantised(config: Any) -> dict[str, bool]:
    """Of a layer's attention, each in the name that Qwen3 gives it in either view."""
    found = {}
    for name, kind in LAYERS.items():
        layer = kind.__new__(kind)
        torch.nn.Module.__init__(layer)
        found[name] = not isinstance(config.get_quant_method(layer, ATTENTION + name), UnquantizedLinearMethod)
    return found


def read(method: str, change: Any = dict) -> Any:
    kind, declared = DECLARED[method]
    return kind.from_config({**change(declared), "packed_modules_mapping": PARTS})


@pytest.mark.parametrize("method", DECLARED)
def test_both_views_are_quantised_unless_the_configuration_leaves_one_out(method: str) -> None:
    config = read(method)
    assert are_quantised(config) == are_quantised(for_diffusion_view(config, PARTS)) == dict.fromkeys(LAYERS, True)


@pytest.mark.parametrize("method", DECLARED)
def test_the_diffusion_view_alone_can_be_left_out(method: str) -> None:
    config = read(method, leaving_out_diffusion_view)
    assert are_quantised(config) == dict.fromkeys(LAYERS, True)
    assert are_quantised(for_diffusion_view(config, PARTS)) == dict.fromkeys(LAYERS, False)


@pytest.mark.parametrize(
    ("method", "left_out"),
    [
        ("awq", {"modules_to_not_convert": ["q_proj_diff", "k_proj_diff", "v_proj_diff"]}),
        ("awq", {"modules_to_not_convert": [f"{ATTENTION}{name}_proj_diff" for name in "qkv"]}),
        ("gptq", {"dynamic": {r"-:.*\.[qkv]_proj_diff": {}}}),
        ("compressed-tensors", {"ignore": [f"{ATTENTION}{name}_proj_diff" for name in "qkv"]}),
        ("compressed-tensors", {"ignore": ["re:.*[qkv]_proj_diff"]}),
        ("fp8", {"modules_to_not_convert": [f"{ATTENTION}{name}_proj_diff" for name in "qkv"]}),
        ("fp8", {"ignored_layers": ["q_proj_diff", "k_proj_diff", "v_proj_diff"]}),
    ],
)
def test_lists_name_the_parts_of_the_fused_layer(method: str, left_out: dict[str, Any]) -> None:
    config = read(method, lambda declared: declared | left_out)
    assert are_quantised(config) == dict.fromkeys(LAYERS, True)
    assert are_quantised(for_diffusion_view(config, PARTS)) == {"qkv_proj": False, "o_proj": True}


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8"])
def test_a_fused_layer_is_quantised_as_a_whole(method: str) -> None:
    key, value = {
        "gptq": ("dynamic", {"-:.*k_proj_diff": {}}),
        "compressed-tensors": ("ignore", ["re:.*k_proj_diff"]),
    }.get(method, ("modules_to_not_convert", ["k_proj_diff"]))
    config = for_diffusion_view(read(method, lambda declared: declared | {key: value}), PARTS)
    with pytest.raises(ValueError, match=r"q_proj_diff, .*v_proj_diff some are quantised and some are not"):
        are_quantised(config)


def test_online_quantization_takes_both_views() -> None:
    """`--quantization fp8`: there is no list in the checkpoint."""
    config = Fp8Config()
    assert are_quantised(for_diffusion_view(config, PARTS)) == are_quantised(config) == dict.fromkeys(LAYERS, True)
    assert for_diffusion_view(None, PARTS) is None


def test_a_method_that_is_not_served_is_named() -> None:
    with pytest.raises(ValueError, match="quant_method bitsandbytes: ORTHRUS serves awq, compressed-tensors, fp8"):
        leaving_out_diffusion_view({"quant_method": "bitsandbytes"})


@pytest.mark.parametrize("is_quantised", [True, False])
def test_a_checkpoint_that_contradicts_its_configuration_is_refused(is_quantised: bool) -> None:
    """Otherwise SGLang's loader ends with a KeyError."""
    path = ATTENTION.removesuffix(".")
    held, declared = ("weight", "weight_packed")[::-1] if is_quantised else ("weight", "weight_packed")
    norms = {f"{path}.{name}_norm_diff.weight" for name in "qk"}
    parameters = {f"{path}.qkv_proj_diff.{declared}", f"{path}.o_proj_diff.{declared}", *norms}
    weights = [(f"{path}.{name}_proj_diff.{held}", torch.zeros(1)) for name in "qkvo"]
    with pytest.raises(ValueError, match=rf"q_proj_diff\.{held}: by the checkpoint's quantization_config"):
        list(_checked(weights, 1, parameters))
    fitting = {name.replace(declared, held) if "_proj" in name else name for name in parameters}
    bias = (f"{path}.q_proj_diff.bias", torch.zeros(1))
    passed = list(_checked([*weights, bias, *((name, torch.zeros(1)) for name in sorted(norms))], 1, fitting))
    assert len(passed) == 7


def test_quantization_is_refused_unless_it_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    found = SimpleNamespace(hf_config=SimpleNamespace())
    monkeypatch.setattr("sglang.srt.arg_groups.model_override_base.model_config_of", lambda args: found)
    given = {
        "quantization": ("bitsandbytes", "awq", "gguf", "w8a8_int8"),
        "load-format": ("bitsandbytes", "gguf", "pt"),
    }
    for name, values in given.items():
        for value in values:
            args = prepare_server_args(["--model-path", str(checkpoint), f"--{name}", value])
            (sentence,) = refusals.flag_refusals(args)
            assert sentence.startswith(f"--{name} {value}: it does not know the names of the *_diff layers, or")
    resolved = SimpleNamespace(device="cpu", quantization="fp8", model_path=checkpoint)
    (sentence,) = refusals._quantization_refusals(resolved)
    assert sentence.startswith("--quantization fp8: the CPU platform has no kernels for that; use a GPU")


@pytest.mark.parametrize(
    ("method", "device", "reason"),
    [
        ("awq", "cuda", None),
        ("gptq", "cuda", None),
        ("compressed-tensors", "cuda", None),
        ("bitsandbytes", "cuda", "ORTHRUS serves awq, compressed-tensors, fp8, gptq"),
        ("modelopt", "cuda", "ORTHRUS serves awq, compressed-tensors, fp8, gptq"),
        ("awq", "cpu", "the CPU platform has no kernels for that"),
    ],
)
def test_a_quantised_checkpoint_is_served_or_named(
    method: str, device: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(hf_config=SimpleNamespace(quantization_config={"quant_method": method}))
    monkeypatch.setattr("sglang.srt.arg_groups.model_override_base.model_config_of", lambda args: found)
    args = SimpleNamespace(device=device, model_path="/model", quantization=method)
    sentences = list(refusals._quantization_refusals(args))
    assert len(sentences) == (reason is not None)
    for sentence in sentences:
        assert sentence.startswith(f"--model-path /model: the checkpoint is quantised ({method}), and {reason}")
