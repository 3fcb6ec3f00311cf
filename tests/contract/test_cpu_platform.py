"""What the CPU platform relies on in the installed SGLang, and what SGLang makes of the platform."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_orthrus.compat.ledger import all_entries
from sglang_orthrus.cpu.platform import OrthrusCpuPlatform, activate
from sglang_orthrus.cpu.replacements import REPLACEMENTS

pytestmark = pytest.mark.contract

without_accelerator = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="the CPU platform steps aside on a machine with an accelerator"
)

# A fresh process, since this one may have replaced SGLang's functions already.
REPLACING = """
import inspect, json, pkgutil
from sglang.srt.mem_cache import allocation
from sglang.srt.speculative import spec_utils
from sglang_orthrus.cpu.replacements import REPLACEMENTS, install_cpu_kernels

def parameters(function):
    return [[p.name, str(p.kind), repr(p.default)] for p in inspect.signature(function).parameters.values()]

stock = {target: parameters(pkgutil.resolve_name(target)) for target in REPLACEMENTS}
ours = {target: parameters(function) for target, function in REPLACEMENTS.items()}
assert spec_utils.assign_req_to_token_pool_func is allocation.assign_req_to_token_pool_func
for _ in range(2):
    install_cpu_kernels()
installed = all(pkgutil.resolve_name(target) is function for target, function in REPLACEMENTS.items())
by_name = spec_utils.assign_req_to_token_pool_func is allocation.assign_req_to_token_pool_func
print(json.dumps({"stock": stock, "ours": ours, "installed": installed, "by_name": by_name}))
"""

RESOLVING = """
import json, os, sys
from sglang.srt.platforms import current_platform
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.server_args import prepare_server_args

FIELDS = ["device", "dtype", "attention_backend", "sampling_backend", "max_total_tokens", "max_running_requests",
    "sleep_on_idle", "disable_overlap_schedule"]
results = []
for flags in json.loads(sys.argv[1]):
    args = prepare_server_args(flags)
    args.resolve_once()
    view = resolved_view(args)
    results.append({name: getattr(view, name) for name in FIELDS})
print(json.dumps({"platform": type(current_platform).__name__, "dynamo": os.environ.get("TORCHDYNAMO_DISABLE"),
    "args": results}))
"""


def _python(code: str, *arguments: str, **environment: str) -> Any:
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.fixture
def qwen3(tmp_path: Path) -> str:
    """A folder with the configuration of a small float32 Qwen3 and nothing else."""
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
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(tmp_path)


def test_replacements_are_in_the_ledger() -> None:
    recorded = {(entry.target, entry.dependent) for entry in all_entries() if entry.what.startswith("replaced")}
    assert set(REPLACEMENTS.items()) <= recorded


def test_replacements_have_the_originals_signatures_and_reach_imports_by_name() -> None:
    found = _python(REPLACING)
    assert found["stock"] == found["ours"]
    assert found["installed"] and found["by_name"]


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
def test_a_plain_launch_resolves_to_the_cpu(qwen3: str) -> None:
    """With and without --device, and with the platform selected by name."""
    base = ["--model-path", qwen3, "--skip-tokenizer-init"]
    launches = json.dumps([base, [*base, "--device", "cpu"]])
    for selection in ({}, {"SGLANG_PLATFORM": "orthrus_cpu"}):
        found = _python(RESOLVING, launches, **selection)
        assert found["platform"] == "OrthrusCpuPlatform"
        assert found["dynamo"] == "1"
        for args in found["args"]:
            assert args == {
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
def test_flags_that_the_user_gave_stay(qwen3: str) -> None:
    flags = "--device cpu --dtype bfloat16 --max-total-tokens 4096 --max-running-requests 3"
    deterministic = "--device cpu --enable-deterministic-inference"
    base = ["--model-path", qwen3, "--skip-tokenizer-init"]
    explicit, seeded = _python(RESOLVING, json.dumps([base + flags.split(), base + deterministic.split()]))["args"]
    assert (explicit["dtype"], explicit["max_total_tokens"], explicit["max_running_requests"]) == ("bfloat16", 4096, 3)
    assert seeded["attention_backend"] == "torch_native"
