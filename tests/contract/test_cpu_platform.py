"""What the CPU platform relies on in the installed SGLang, and what SGLang makes of the platform."""

from __future__ import annotations

import json
import pkgutil
from typing import Any

import pytest
import torch

from sglang_orthrus.compat.ledger import all_entries
from sglang_orthrus.cpu.platform import OrthrusCpuPlatform, activate
from sglang_orthrus.cpu.replacements import REPLACEMENTS
from tests.contract.processes import output_of

pytestmark = pytest.mark.contract

without_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="the CPU platform steps aside on a machine with an accelerator"
)
LAUNCHES = {
    "plain": "",
    "device": "--device cpu",
    "explicit": "--device cpu --dtype bfloat16 --max-total-tokens 4096 --max-running-requests 3",
    "seeded": "--device cpu --enable-deterministic-inference",
}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the configuration of a small float32 Qwen3 and nothing else."""
    folder = tmp_path_factory.mktemp("qwen3")
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module", params=["found", pytest.param("named", marks=pytest.mark.slow)])
def resolved(request: pytest.FixtureRequest, qwen3: str) -> dict[str, dict[str, Any]]:
    """What SGLang makes of `LAUNCHES` where it finds the platform by itself, and where the platform is named."""
    launches = [["--model-path", qwen3, "--skip-tokenizer-init", *flags.split()] for flags in LAUNCHES.values()]
    selection = {"SGLANG_PLATFORM": "orthrus_cpu"} if request.param == "named" else {}
    found = output_of("tests.contract.resolving", json.dumps(launches), **selection)
    assert found["platform"] == "OrthrusCpuPlatform"
    assert found["dynamo"] == "1"
    return dict(zip(LAUNCHES, found["args"], strict=True))


def test_replacements_are_in_the_ledger() -> None:
    recorded = {(entry.target, entry.dependent) for entry in all_entries() if entry.what.startswith("replaced")}
    assert set(REPLACEMENTS.items()) <= recorded


def test_the_platform_is_named_only_where_no_accelerator_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    name = activate()
    assert name is not None and pkgutil.resolve_name(name) is OrthrusCpuPlatform
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert activate() is None


def test_sglang_s_own_cpu_engine_has_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


@without_accelerator
@pytest.mark.parametrize("launch", ["plain", "device"])
def test_a_plain_launch_resolves_to_the_cpu(resolved: dict[str, dict[str, Any]], launch: str) -> None:
    assert resolved[launch] == {
        "device": "cpu",
        "dtype": "float32",
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "max_total_tokens": 65536,
        "max_running_requests": 48,
        "sleep_on_idle": True,
        "disable_overlap_schedule": False,
    }


@without_accelerator
def test_flags_that_the_user_gave_stay(resolved: dict[str, dict[str, Any]]) -> None:
    explicit, seeded = resolved["explicit"], resolved["seeded"]
    assert (explicit["dtype"], explicit["max_total_tokens"], explicit["max_running_requests"]) == ("bfloat16", 4096, 3)
    assert seeded["attention_backend"] == "torch_native"
