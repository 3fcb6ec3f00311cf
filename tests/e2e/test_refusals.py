"""What ORTHRUS can't answer exactly is refused by name, and refusing harms nobody else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests
from safetensors.torch import load_file, save_file

from sglang_orthrus.cli.demo import ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, ServerError
from tests.e2e.helpers import generate, prompt_of
from tests.fixtures import write_checkpoint

pytestmark = pytest.mark.e2e

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What the message must name: sampling parameters, top-level parameters.
    "return_routed_experts": ({}, {"return_routed_experts": True}),
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_is_not_exact_is_refused_by_name(orthrus: Server, option: str) -> None:
    sampling, top_level = REFUSED[option]
    body = {
        "input_ids": list(prompt_of("chat")),
        "sampling_params": {"temperature": 0, "max_new_tokens": 8} | sampling,
    } | top_level
    response = requests.post(f"{orthrus.url}/generate", json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert option in response.text
    assert "ORTHRUS" in response.text


def test_chat_options_are_refused_by_name(orthrus: Server) -> None:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "Hello"}],
        "return_routed_experts": True,
        "temperature": 0.5,
    }
    response = requests.post(f"{orthrus.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert "return_routed_experts" in response.text and "temperature" not in response.text


def test_the_server_lives_on_after_refusals(orthrus: Server) -> None:
    ids = prompt_of("arith")
    before = generate(orthrus, ids)
    for sampling, top_level in REFUSED.values():
        body = {"input_ids": list(ids), "sampling_params": {"temperature": 0} | sampling} | top_level
        requests.post(f"{orthrus.url}/generate", json=body, timeout=60)
    assert generate(orthrus, ids)["output_ids"] == before["output_ids"]
    assert orthrus.is_running


@pytest.mark.slow
def test_a_checkpoint_without_some_diff_tensors_is_refused_with_their_names(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.self_attn.v_proj_diff.weight"]
    save_file(weights, model / "model.safetensors")
    with pytest.raises(ServerError, match=r"model\.layers\.1\.self_attn\.v_proj_diff\.weight"):
        Server(model, *ORTHRUS_ARGS).start()


def test_a_configuration_without_block_size_is_refused(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    del config["block_size"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ServerError, match="block_size"):
        Server(model, *ORTHRUS_ARGS).start()
