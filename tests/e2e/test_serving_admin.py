"""Routes for operators: weight updates, memory, pauses, profiles and information, as in plain SGLang."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common.reference import Reference
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.server import Server
from sglang_orthrus.models.checkpoint import export_ar
from tests.e2e.helpers import Reply, assert_same_output, both, generate, prompt_of, tokens_per_cycle

pytestmark = pytest.mark.e2e

IDS = prompt_of("json")
STORY = prompt_of("prose", 1)
STORY_TOKENS = 150


# -- weights


def perturbed(folder: Path, is_changed: Callable[[str], bool], scale: float) -> Path:
    """A copy of the bundled checkpoint with noise, relative to their spread, on the matrices that are to change."""
    shutil.copytree(NANO, folder)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if is_changed(name):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * scale
            weights[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def updated(server: Server, checkpoint: Path) -> Iterator[None]:
    """Another checkpoint's weights in a shared server, for the duration."""
    original = server.get("/model_info").json()["model_path"]
    try:
        assert server.post("/update_weights_from_disk", {"model_path": str(checkpoint)})["success"]
        yield
    finally:
        server.post("/update_weights_from_disk", {"model_path": original})


def checksums(server: Server) -> dict[str, str]:
    (rank,) = server.post("/weights_checker", {"action": "checksum"})["ranks"]
    found: dict[str, str] = rank["checksums"]
    return found


def test_new_drafting_weights_change_the_speed_alone(orthrus: Server, tmp_path: Path) -> None:
    before, sums = generate(orthrus, IDS), checksums(orthrus)
    other = perturbed(tmp_path / "other", lambda name: "q_proj_diff" in name, 1.0)
    with updated(orthrus, other):
        slower, changed = generate(orthrus, IDS), checksums(orthrus)
        assert orthrus.get("/model_info").json()["model_path"] == str(other)
    assert slower["output_ids"] == before["output_ids"]
    assert tokens_per_cycle(slower) < tokens_per_cycle(before) / 2
    assert {name.rpartition(".self_attn.")[2] for name in sums if sums[name] != changed[name]} == {
        "qkv_proj_diff.weight"
    }

    after = generate(orthrus, IDS)
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["spec_verify_ct"] == before["meta_info"]["spec_verify_ct"]
    assert checksums(orthrus) == sums


def test_new_autoregressive_weights_give_their_own_answers(orthrus: Server, plain: Server, tmp_path: Path) -> None:
    """Also of what the radix cache held before."""
    other = perturbed(tmp_path / "other", lambda name: "_proj.weight" in name, 1.0)
    before = generate(orthrus, IDS)
    with updated(orthrus, other), updated(plain, export_ar(other, tmp_path / "other-ar")):
        changed, expected = both(generate, (orthrus, plain), IDS)
    assert_same_output(Reference(other), IDS, expected, changed)
    assert changed["output_ids"] != before["output_ids"]

    assert generate(orthrus, IDS)["output_ids"] == before["output_ids"]
    assert generate(plain, IDS)["output_ids"] == before["output_ids"]


@pytest.mark.parametrize("missing", ["weights", "the diffusion view"])
def test_a_folder_that_lacks_something_is_refused(orthrus: Server, tmp_path: Path, missing: str) -> None:
    before = generate(orthrus, IDS)
    folder = export_ar(NANO, tmp_path / "ar") if missing == "the diffusion view" else tmp_path
    body = {"model_path": str(folder)}
    response = requests.post(f"{orthrus.url}/update_weights_from_disk", json=body, timeout=120)
    assert response.status_code == 400
    assert ("36 missing" if missing == "the diffusion view" else str(tmp_path)) in response.json()["message"]
    after = generate(orthrus, IDS)
    assert after["output_ids"] == before["output_ids"]
    assert after["meta_info"]["spec_verify_ct"] == before["meta_info"]["spec_verify_ct"]


@pytest.mark.parametrize("is_paused", [False, True], ids=["running", "paused"])
def test_updates_at_once_get_their_own_answers(orthrus: Server, tmp_path: Path, is_paused: bool) -> None:
    """Plain SGLang ends if it is paused: the second answer finds nobody who waits (patches/0018)."""
    before = generate(orthrus, IDS)
    folders = [str(NANO), str(tmp_path)] * 2

    def update(folder: str) -> requests.Response:
        return requests.post(f"{orthrus.url}/update_weights_from_disk", json={"model_path": folder}, timeout=120)

    if is_paused:
        orthrus.post("/pause_generation", {"mode": "retract"})
    try:
        with ThreadPoolExecutor(len(folders)) as pool:
            answers = list(pool.map(update, folders))
    finally:
        if is_paused:
            orthrus.post("/continue_generation", {})
    assert [answer.status_code for answer in answers] == [200, 400] * 2
    assert all(str(tmp_path) in answer.json()["message"] for answer in answers[1::2])
    assert generate(orthrus, IDS)["output_ids"] == before["output_ids"]


# -- memory


@pytest.mark.parametrize("tags", [None, ["kv_cache"], ["weights"]], ids=["all", "kv_cache", "weights"])
def test_memory_is_released_and_resumed(orthrus: Server, plain: Server, tags: list[str] | None) -> None:
    """Without --enable-memory-saver, which needs a GPU, both routes keep the memory and flush the cache."""
    before = generate(orthrus, IDS)
    for server in (orthrus, plain):
        for route in ("/release_memory_occupation", "/resume_memory_occupation"):
            assert server.post(route, {"tags": tags}) is None
        after = generate(server, IDS)
        assert after["output_ids"] == before["output_ids"]
    assert generate(orthrus, IDS)["meta_info"]["spec_verify_ct"] == before["meta_info"]["spec_verify_ct"]


# -- pauses


@contextmanager
def slowed(server: Server) -> Iterator[None]:
    """Time between two steps to reach a request in its middle."""
    server.post("/slow_down", {"forward_sleep_time": 0.05})
    try:
        yield
    finally:
        server.post("/slow_down", {"forward_sleep_time": None})


def paused_story(server: Server, mode: str, flush_status: int) -> Reply:
    """The last chunk of a streamed story, with a pause after the second chunk and an attempt to flush the cache."""
    sampling = {"temperature": 0, "max_new_tokens": STORY_TOKENS, "ignore_eos": True}
    body = {"input_ids": list(STORY), "sampling_params": sampling, "stream": True}
    with slowed(server):
        response = requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120)
        lines = (line for line in response.iter_lines() if line.startswith(b"data: {"))
        next(lines), next(lines)
        server.post("/pause_generation", {"mode": mode})
    with response:  # the rest of the story need not be slow
        try:
            flushed = requests.post(f"{server.url}/flush_cache", timeout=60)
            assert flushed.status_code == flush_status
        finally:
            server.post("/continue_generation", {})
        chunk = list(lines)[-1]
    last: Reply = json.loads(chunk.removeprefix(b"data: "))
    return last


@pytest.mark.parametrize(
    ("mode", "flush_status", "retractions"),
    [
        pytest.param("in_place", 400, 0, id="in_place", marks=pytest.mark.slow),
        pytest.param("retract", 200, 1, id="retract"),
    ],
)
def test_a_paused_request_continues_where_it_was(
    orthrus: Server, plain: Server, reference: Reference, mode: str, flush_status: int, retractions: int
) -> None:
    expected = generate(plain, STORY, STORY_TOKENS, ignore_eos=True)
    for reply in both(paused_story, (orthrus, plain), mode, flush_status):
        assert reply["meta_info"]["num_retractions"] == retractions
        assert_same_output(reference, STORY, expected, reply)


def test_a_pause_can_abort_what_runs(orthrus: Server, plain: Server) -> None:
    expected = generate(plain, STORY, STORY_TOKENS, ignore_eos=True)
    for reply in both(paused_story, (orthrus, plain), "abort", 200):
        assert reply["meta_info"]["finish_reason"]["type"] == "abort"
        assert expected["text"].startswith(reply["text"])
    for reply in both(generate, (orthrus, plain), STORY, STORY_TOKENS, ignore_eos=True):
        assert reply["text"] == expected["text"]


def test_a_pause_of_another_kind_is_refused(orthrus: Server) -> None:
    response = requests.post(f"{orthrus.url}/pause_generation", json={"mode": "sideways"}, timeout=60)
    assert 400 <= response.status_code < 500
    assert generate(orthrus, IDS, 8)["meta_info"]["completion_tokens"] == 8


# -- profiles


@pytest.mark.parametrize("activities", [None, ["CPU"]], ids=["default", "CPU"])
def test_a_profile_is_written(orthrus: Server, tmp_path: Path, activities: list[str] | None) -> None:
    body = {"output_dir": str(tmp_path), "activities": activities, "with_stack": False}
    requests.post(f"{orthrus.url}/start_profile", json=body, timeout=120).raise_for_status()
    reply = generate(orthrus, IDS, 16)
    requests.post(f"{orthrus.url}/stop_profile", timeout=120).raise_for_status()
    (trace,) = tmp_path.glob("*.trace.json.gz")
    assert trace.stat().st_size > 0
    assert generate(orthrus, IDS, 16)["output_ids"] == reply["output_ids"]


# -- information


def test_the_server_tells_its_algorithm_and_accept_length(orthrus: Server) -> None:
    generate(orthrus, IDS)
    for path in ("/get_server_info", "/server_info"):
        info = orthrus.get(path).json()
        assert info["speculative_algorithm"] == "ORTHRUS"
        assert info["speculative_num_draft_tokens"] == 32
        (state,) = info["internal_states"]
        assert 1 < state["avg_spec_accept_length"] <= 33


def test_the_server_tells_its_model(orthrus: Server) -> None:
    for path in ("/get_model_info", "/model_info"):
        info = orthrus.get(path).json()
        assert info["model_path"] == str(NANO)
        assert info["architectures"] == ["OrthrusLM"]
        assert info["is_generation"] is True
    (model,) = orthrus.get("/v1/models").json()["data"]
    assert model["max_model_len"] == 2048
    assert orthrus.get(f"/v1/models/{model['id']}").json()["id"] == model["id"]


def test_loads_count_what_the_server_does(orthrus: Server, plain: Server) -> None:
    ours, theirs = both(lambda server: server.get("/v1/loads").json()["loads"][0], (orthrus, plain))
    assert ours["num_running_reqs"] == ours["num_waiting_reqs"] == 0
    assert ours["max_total_num_tokens"] == theirs["max_total_num_tokens"]
    assert ours["max_running_requests"] == theirs["max_running_requests"]


# Left out: /start_expert_distribution_record and its two companions, which end a plain server of a model without
# experts; /slow_down, /weights_checker and /flush_cache, used above.
ROUTES: dict[str, tuple[str, dict[str, Any] | None]] = {
    f"{path} {json.dumps(body)}" if body else path: (method, body)
    for method, path, body in (
        ("GET", "/", None),
        ("GET", "/ready", None),
        ("GET", "/ping", None),
        ("GET", "/health", None),
        ("GET", "/health_generate", None),
        ("GET", "/metrics", None),
        ("GET", "/v1/models/unknown", None),
        ("GET", "/get_load", None),
        ("GET", "/api/tags", None),
        ("POST", "/api/show", {"model": "default"}),
        ("POST", "/v1/tokenize", {"model": "default", "prompt": "Hello"}),
        ("POST", "/v1/detokenize", {"model": "default", "tokens": [5, 6]}),
        ("POST", "/v1/messages/count_tokens", {"model": "d", "messages": [{"role": "user", "content": "Hello"}]}),
        ("POST", "/separate_reasoning", {"text": "<think>a</think>b", "reasoning_parser": "qwen3"}),
        ("POST", "/configure_logging", {"log_requests": False}),
        ("GET", "/set_trace_level?level=0", None),
        ("GET", "/freeze_gc", None),
        ("POST", "/set_internal_state", {"server_args": {"pp_max_micro_batch_size": 48}}),
        ("POST", "/set_internal_state", {"server_args": {"speculative_accept_threshold_single": 1.0}}),
        ("POST", "/set_internal_state", {"server_args": {"speculative_num_steps": 4}}),
        ("POST", "/update_weight_version", {"new_version": "default"}),
        ("POST", "/get_weights_by_name", {"name": "model.norm.weight"}),
        ("POST", "/get_weights_by_name", {"name": "model.layers.0.self_attn.q_proj_diff.weight"}),
        ("POST", "/begin_weight_update", {}),
        ("POST", "/end_weight_update", {}),
        ("POST", "/destroy_weights_update_group", {"group_name": "none"}),
        ("POST", "/load_lora_adapter", {"lora_name": "x", "lora_path": "/nowhere"}),
        ("POST", "/unload_lora_adapter", {"lora_name": "x"}),
        ("POST", "/pd_role_switch", {"target_role": "decode"}),
        ("POST", "/add_external_corpus", {"corpus_id": "x", "documents": ["a"]}),
        ("POST", "/remove_external_corpus", {"corpus_id": "x"}),
        ("GET", "/list_external_corpora", None),
        ("POST", "/hicache/storage-backend/clear", None),
        ("GET", "/hicache/storage-backend", None),
        ("GET", "/get_hicache_l3_cache_layout", None),
        ("GET", "/remote_instance_transfer_engine_info?rank=0", None),
        ("POST", "/abort_request", {"rid": "unknown"}),
        ("POST", "/close_session", {"session_id": "unknown"}),
    )
}


@pytest.mark.parametrize("route", ROUTES)
def test_no_route_answers_differently_or_ends_the_server(orthrus: Server, plain: Server, route: str) -> None:
    method, body = ROUTES[route]
    path = route.partition(" ")[0]
    ours, theirs = both(
        lambda server: requests.request(method, server.url + path, json=body, timeout=60), (orthrus, plain)
    )
    assert ours.status_code == theirs.status_code < 500
    assert generate(orthrus, IDS, 8)["output_ids"] == generate(plain, IDS, 8)["output_ids"]
