"""The diffusion view beside a quantised model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.common.greedy import load_prompts
from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.models.checkpoint import check_tensors, export_ar, tensor_names
from sglang_orthrus.models.graft import graft
from tests.quantised import write_w4a16
from tests.unit.test_graft import edit, weights_of


def declare(folder: Path, **declared: Any) -> Path:
    edit(folder, lambda config: config.update(quantization_config=declared))
    return folder


def declared_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def test_the_view_stays_as_it_is_and_the_configuration_says_so(tmp_path: Path) -> None:
    base = write_w4a16(export_ar(NANO, tmp_path / "ar"), tmp_path / "base")
    target = graft(base, NANO, tmp_path / "grafted")
    before, after = weights_of(NANO), weights_of(target)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in after
    for name, tensor in before.items():
        if "_diff." in name:
            assert torch.equal(after[name], tensor), name
    assert declared_in(target)["ignore"] == ["lm_head", "re:.*_proj_diff$"]


@pytest.mark.parametrize(
    ("declared", "key", "left_out"),
    [
        ({"quant_method": "gptq"}, "dynamic", {"-:.*_proj_diff$": {}}),
        ({"quant_method": "gptq", "dynamic": {"+:.*down": {"bits": 8}}}, "dynamic", ["-:.*_proj_diff$", "+:.*down"]),
        ({"quant_method": "awq", "modules_to_not_convert": None}, "modules_to_not_convert", ["q_proj_diff"]),
        ({"quant_method": "fp8", "ignored_layers": ["lm_head"]}, "ignored_layers", ["lm_head", "q_proj_diff"]),
    ],
)
def test_each_method_has_its_own_list(tmp_path: Path, declared: dict[str, Any], key: str, left_out: Any) -> None:
    base = declare(export_ar(NANO, tmp_path / "ar"), **declared)
    found = declared_in(graft(base, NANO, tmp_path / "grafted"))[key]
    assert list(found)[: len(left_out)] == list(left_out)


def test_the_view_reads_norms_that_awq_has_scaled(tmp_path: Path) -> None:
    """AWQ divides the norm before attention by scales, and multiplies the matrices behind it."""
    base = declare(export_ar(NANO, tmp_path / "ar"), quant_method="awq")
    weights = {name: tensor.float() for name, tensor in weights_of(base).items()}
    noise = torch.Generator().manual_seed(3)
    for layer in range(6):
        prefix = f"model.layers.{layer}."
        scales = torch.rand(256, generator=noise) + 0.5
        scales[7] = 1.0
        weights[f"{prefix}input_layernorm.weight"] /= scales
        for name in "qkv":
            weights[f"{prefix}self_attn.{name}_proj.weight"] *= scales
    save_file(weights, base / "model.safetensors")
    prompt = load_prompts(NANO, 9)[0].ids
    logits = [
        Reference(folder).diff_logits(prompt[:-1], prompt[-1]) for folder in (NANO, graft(base, NANO, tmp_path / "g"))
    ]
    unfitted = weights_of(NANO) | weights
    save_file({name: tensor.contiguous() for name, tensor in unfitted.items()}, tmp_path / "g" / "model.safetensors")
    (tmp_path / "g" / "model-diffusion-00001.safetensors").unlink()
    logits.append(Reference(tmp_path / "g").diff_logits(prompt[:-1], prompt[-1]))
    fitted, as_it_was = ((logits[0] - other).abs().mean() for other in logits[1:])
    assert fitted < 0.05 < 0.5 < as_it_was, "the columns are rounded to bf16 again, no more"


def test_what_cannot_be_grafted_is_refused(tmp_path: Path) -> None:
    base = declare(export_ar(NANO, tmp_path / "ar"), quant_method="bitsandbytes")
    with pytest.raises(ValueError, match="quant_method bitsandbytes: ORTHRUS serves awq, compressed-tensors, fp8"):
        graft(base, NANO, tmp_path / "a")
    with pytest.raises(ValueError, match="the Orthrus checkpoint is quantised"):
        graft(export_ar(NANO, tmp_path / "plain"), write_w4a16(NANO, tmp_path / "both"), tmp_path / "b")


def test_a_quantised_view_is_whole_or_refused(tmp_path: Path) -> None:
    names = tensor_names(write_w4a16(NANO, tmp_path / "both"))
    assert "model.layers.0.self_attn.q_proj_diff.weight_packed" in names
    check_tensors(names, 6)
    with pytest.raises(ValueError, match=r"1 missing \(model\.layers\.3\.self_attn\.k_proj_diff\.weight\)"):
        check_tensors({name for name in names if ".3.self_attn.k_proj_diff." not in name}, 6)
    with pytest.raises(ValueError, match=r"1 unexpected \(model\.layers\.0\.self_attn\.q_norm_diff\.scales\)"):
        check_tensors({*names, "model.layers.0.self_attn.q_norm_diff.scales"}, 6)
