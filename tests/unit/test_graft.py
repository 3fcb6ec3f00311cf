"""A fine-tune with the diffusion view of the model that it was tuned from."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common.greedy import load_prompts
from benchmarks.common.reference import Reference
from sglang_orthrus.__main__ import main
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.models import graft as grafting
from sglang_orthrus.models.checkpoint import export_ar, tensor_names
from sglang_orthrus.models.graft import graft
from tests.unit.test_checkpoint import split_in_two

QUERY = "model.layers.2.self_attn.q_proj.weight"
DOWN = "model.layers.5.mlp.down_proj.weight"
TOKENS = 40


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's configuration."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """Nano's AR half, a little off: what a fine-tune is to the model that it comes from."""
    folder = export_ar(NANO, tmp_path / "tuned")
    weights = weights_of(folder)
    noise = torch.Generator().manual_seed(5)
    for name, tensor in weights.items():
        if name.endswith("_proj.weight"):
            own = torch.randn(tensor.shape, generator=noise) * tensor.float().std() * 0.12
            weights[name] = (tensor.float() + own).to(tensor.dtype)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors")
    (folder / "notes.txt").write_text("of the fine-tune")
    return folder


def adapter(folder: Path, rank: int = 4, **config: Any) -> Path:
    """A LoRA adapter of two matrices."""
    folder.mkdir()
    noise = torch.Generator().manual_seed(6)
    weights = weights_of(NANO)
    factors = {}
    for name in (QUERY, DOWN):
        rows, columns = weights[name].shape
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(rank, columns, generator=noise)
        factors[f"{stem}.lora_B.weight"] = torch.randn(rows, rank, generator=noise) * 1e-3
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "bias": "none", "use_dora": False} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_nano_grafted_on_its_own_half_is_nano(tmp_path: Path) -> None:
    target = graft(export_ar(NANO, tmp_path / "ar"), NANO, tmp_path / "grafted")
    assert tensor_names(target) == tensor_names(NANO)
    expected, found = weights_of(NANO), weights_of(target)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (NANO, target)]
    assert configs[0] == configs[1]
    assert (target / "tokenizer.json").read_bytes() == (NANO / "tokenizer.json").read_bytes()


def test_the_output_is_the_fine_tunes(tuned: Path, tmp_path: Path) -> None:
    """Drafts of the former model are judged by the new one; where the two agree they are accepted."""
    target = graft(tuned, NANO, tmp_path / "grafted")
    assert (target / "notes.txt").read_text() == "of the fine-tune"
    grafted, former, rounds, tokens, changed = Reference(target), Reference(NANO), 0, 0, 0
    for prompt in load_prompts(NANO, 9)[:6]:
        text = list(prompt.ids)
        for _ in range(TOKENS):
            text.append(int(grafted.ar_logits(text)[-1].argmax()))
        answer = text[len(prompt.ids) :]
        trace = grafted.generate(prompt.ids, TOKENS)
        assert trace.tokens == answer
        rounds, tokens = rounds + trace.rounds, tokens + len(trace.tokens) - 1
        changed += former.generate(prompt.ids, TOKENS).tokens != answer
    assert changed, "a fine-tune that says the same proves nothing"
    assert tokens / rounds > 2


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rslora: bool) -> None:
    monkeypatch.setattr(grafting, "SHARD_BYTES", 2**20)
    split_in_two(tuned)
    lora = adapter(tmp_path / "lora", use_rslora=rslora)
    written: list[str] = []
    target = graft(tuned, NANO, tmp_path / "grafted", lora, written.append)
    assert len(list(target.glob("model-merged-*.safetensors"))) > 3
    factors, before, after = load_file(lora / "adapter_model.safetensors"), weights_of(tuned), weights_of(target)
    assert sorted(written) == sorted(after) and tensor_names(target) == tensor_names(NANO)
    scale = 8 / math.sqrt(4) if rslora else 2.0
    for name, tensor in before.items():
        expected = tensor
        if name in (QUERY, DOWN):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            product = factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"]
            expected = (tensor.float() + scale * product).to(tensor.dtype)
            assert not torch.equal(expected, tensor)
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 7}, "num_hidden_layers 7, not 6"),
        ({"vocab_size": 4097}, "vocab_size 4097, not 4096"),
        ({"model_type": "llama"}, "model_type llama, not qwen3"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}, "rope (10000.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'factor': 4.0"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tuned: Path, tmp_path: Path, change: dict[str, Any], named: str) -> None:
    edit(tuned, lambda config: config.update(change))
    with pytest.raises(ValueError, match="does not fit the Orthrus checkpoint") as refused:
        graft(tuned, NANO, tmp_path / "grafted")
    assert named in str(refused.value)
    assert not (tmp_path / "grafted").exists()


def test_what_is_no_pair_of_models_is_refused(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the second model is no Orthrus checkpoint"):
        graft(tuned, tuned, tmp_path / "a")
    with pytest.raises(ValueError, match="has a diffusion view already"):
        graft(NANO, NANO, tmp_path / "b")
    with pytest.raises(FileExistsError, match="choose another directory"):
        graft(tuned, NANO, tuned)
    broken = shutil.copytree(NANO, tmp_path / "broken")
    weights = weights_of(broken)
    del weights["model.layers.1.self_attn.v_proj_diff.weight"]
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \(model\.layers\.1\.self_attn\.v_proj_diff\.weight\)"):
        graft(tuned, broken, tmp_path / "c")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type IA3; only LORA"),
        ({"use_dora": True}, "use_dora True cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] cannot be merged"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias all cannot be merged"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    tuned: Path, tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        graft(tuned, NANO, tmp_path / "grafted", adapter(tmp_path / "lora", **config))


def test_an_adapter_of_another_model_is_refused(tuned: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora")
    factors = load_file(lora / "adapter_model.safetensors")
    factors["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 4)
    save_file(factors, lora / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.9\.mlp\.up_proj\.lora_A\.weight belongs to no matrix"):
        graft(tuned, NANO, tmp_path / "grafted", lora)


def test_the_command_line(tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graft", str(tuned), str(NANO), str(tmp_path / "grafted")]) == 0
    assert "--speculative-algorithm ORTHRUS" in capsys.readouterr().out
    assert main(["graft", str(NANO), str(NANO), str(tmp_path / "again")]) == 1
    assert "has a diffusion view already" in capsys.readouterr().err
