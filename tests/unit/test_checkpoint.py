"""Tensor-name checks and the AR-only export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_orthrus.models.checkpoint import check_tensors, diff_tensor_names, export_ar, folder_problem, tensor_names
from tests.fixtures import Shape, write_checkpoint, write_released_shaped


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source")


def split_in_two(folder: Path) -> None:
    """Rewrite the single weight file as two files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_six_diff_tensors_per_layer() -> None:
    names = diff_tensor_names(28)
    assert len(names) == 168
    assert "model.layers.27.self_attn.o_proj_diff.weight" in names
    assert "model.layers.0.self_attn.k_norm_diff.weight" in names


@pytest.mark.parametrize("sharded", [False, True])
def test_names_come_from_headers_or_index(source: Path, sharded: bool) -> None:
    expected = set(load_file(source / "model.safetensors"))
    if sharded:
        split_in_two(source)
    assert tensor_names(source) == expected
    check_tensors(expected, num_layers=Shape().layers)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        tensor_names(write_released_shaped(tmp_path, "8B"))


def test_missing_tensors_are_named_and_counted(source: Path) -> None:
    names = tensor_names(source) - {"model.layers.1.self_attn.v_proj_diff.weight"}
    with pytest.raises(ValueError, match=r"1 missing \(model\.layers\.1\.self_attn\.v_proj_diff\.weight\)"):
        check_tensors(names, num_layers=2)
    with pytest.raises(ValueError, match=r"12 missing .*layers\.0.*, \.\.\.\)"):
        check_tensors([name for name in names if "_diff" not in name], num_layers=2)


def test_unexpected_tensors_are_named(source: Path) -> None:
    names = tensor_names(source) | {"model.layers.0.mlp.up_proj_diff.weight"}
    with pytest.raises(ValueError, match=r"1 unexpected \(model\.layers\.0\.mlp\.up_proj_diff\.weight\)"):
        check_tensors(names, num_layers=2)
    with pytest.raises(ValueError, match=r"6 unexpected \(model\.layers\.1\."):
        check_tensors(tensor_names(source), num_layers=1)


@pytest.mark.parametrize("sharded", [False, True])
def test_export_holds_the_ar_view_and_nothing_else(source: Path, tmp_path: Path, sharded: bool) -> None:
    before = load_file(source / "model.safetensors")
    if sharded:
        split_in_two(source)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_orthrus.OrthrusLM"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_orthrus.py").write_text("")
    target = export_ar(source, tmp_path / "target")

    after = {name: tensor for file in target.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert after.keys() == {name for name in before if "_diff" not in name} == tensor_names(target)
    assert all(torch.equal(after[name], before[name]) for name in after)

    exported = json.loads((target / "config.json").read_text())
    assert exported["architectures"] == ["Qwen3ForCausalLM"]
    assert not exported.keys() & {"block_size", "mask_token_id", "auto_map"}
    assert exported["rope_parameters"] == config["rope_parameters"]
    assert not (target / "modeling_orthrus.py").exists()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()


def test_export_does_not_overwrite(source: Path) -> None:
    with pytest.raises(FileExistsError, match="already holds a checkpoint"):
        export_ar(source, source)


def test_a_folder_is_looked_at_before_it_replaces_weights(source: Path, tmp_path: Path) -> None:
    assert folder_problem(source, Shape().layers) is None
    assert folder_problem("chiennv/Orthrus-Qwen3-8B", Shape().layers) is None
    assert "12 missing" in str(folder_problem(export_ar(source, tmp_path / "ar"), Shape().layers))
    assert "no .safetensors file" in str(folder_problem(tmp_path, Shape().layers))
