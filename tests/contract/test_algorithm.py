"""The algorithm as SGLang finds, resolves and refuses it: real entry point, real ServerArgs, no server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_orthrus.compat import versions
from sglang_orthrus.cpu import platform
from sglang_orthrus.plugin import register
from sglang_orthrus.server_args import refusals
from sglang_orthrus.server_args.algorithm import ATTENTION_BACKENDS, OrthrusAlgorithm, Refused
from tests.fixtures import Shape, write_checkpoint

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), Shape(block=8))


def _resolve(model: Path, *flags: str) -> ServerArgs:
    load_plugins()
    argv = ["--model-path", str(model), "--speculative-algorithm", "orthrus", "--device", "cpu", *flags]
    args = prepare_server_args(argv)
    args.resolve_once()
    return args


def _resolved(args: ServerArgs, field: str) -> Any:
    from sglang.srt.arg_groups.overrides import resolution_result

    return resolution_result(args, field)


def test_nothing_that_the_builtin_algorithms_offer_is_missing() -> None:
    offered = {name for name, value in vars(SpeculativeAlgorithm).items() if callable(value) and name[0] != "_"}
    missing = offered - set(dir(OrthrusAlgorithm)) - {"from_string", "register"}
    assert not missing


def test_the_entry_point_registers_the_algorithm_once() -> None:
    load_plugins()
    algorithm = SpeculativeAlgorithm.from_string("ORTHRUS")
    assert isinstance(algorithm, OrthrusAlgorithm)
    register()
    assert SpeculativeAlgorithm.from_string("orthrus") is algorithm
    assert algorithm.supports_overlap and algorithm.supports_grammar_overlap()


def test_without_the_plugin_sglang_does_not_know_the_name() -> None:
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins()\n"
        "import os; assert 'SGLANG_EXTERNAL_MODEL_PACKAGE' not in os.environ\n"
        "from sglang.srt.speculative.spec_info import SpeculativeAlgorithm\n"
        "SpeculativeAlgorithm.from_string('ORTHRUS')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "SGLANG_EXTERNAL_MODEL_PACKAGE"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"SGLANG_PLUGINS": "__none__"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "Unknown speculative algorithm name: ORTHRUS" in run.stderr


def test_the_checkpoint_decides_the_widths(checkpoint: Path) -> None:
    args = _resolve(checkpoint)
    assert _resolved(args, "speculative_num_draft_tokens") == 8
    # What SGLang reserves per decode is twice the larger of these two.
    assert _resolved(args, "speculative_num_steps") == 8
    assert not _resolved(args, "disable_overlap_schedule")


def test_as_many_requests_run_as_in_plain_sglang(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own speculative algorithms allow 48, and so does the CPU platform to any server."""
    monkeypatch.setattr(platform, "DEFAULT_MAX_RUNNING_REQUESTS", None)
    assert _resolved(_resolve(checkpoint), "max_running_requests") is None
    assert _resolved(_resolve(checkpoint, "--max-running-requests", "7"), "max_running_requests") == 7


def test_a_narrower_width_still_reserves_a_whole_block(checkpoint: Path) -> None:
    args = _resolve(checkpoint, "--speculative-num-draft-tokens", "4")
    assert _resolved(args, "speculative_num_draft_tokens") == 4
    assert _resolved(args, "speculative_num_steps") == 8


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ("--device xpu", "use cuda or cpu"),
        ("--pp-size 2", "use --pp-size 1"),
        ("--dcp-size 2", "use --dcp-size 1"),
        ("--tokenizer-worker-num 2", "use --tokenizer-worker-num 1"),
        ("--disaggregation-mode prefill", "remove the flag"),
        ("--disaggregation-mode decode", "remove the flag"),
        ("--enable-two-batch-overlap", "remove the flag"),
        ("--enable-pdmux", "remove the flag"),
        ("--enable-torch-compile", "remove the flag"),
        ("--hicache-io-backend direct", "remove the flag"),
        ("--hicache-mem-layout page_first_direct", "remove the flag"),
        ("--enable-lora", "merge the adapter"),
        ("--lora-paths adapter=/nowhere", "merge the adapter"),
        ("--grammar-backend outlines", "use xgrammar or llguidance"),
        ("--rl-on-policy-target fsdp", "remove the flag"),
        ("--model-impl transformers", "use --model-impl sglang"),
        ("--speculative-num-draft-tokens 9", "leave the flag out"),
        ("--speculative-num-draft-tokens 1", "leave the flag out"),
        ("--speculative-num-steps 3", "leave it out, or set --speculative-num-draft-tokens"),
        ("--speculative-eagle-topk 4", "leave it out"),
        ("--speculative-adaptive", "remove the flag"),
        ("--speculative-draft-attention-backend triton", "use --attention-backend"),
        ("--speculative-draft-window-size 4", "remove the flag"),
        ("--speculative-token-map tokens.pt", "remove the flag"),
        ("--speculative-accept-threshold-single 0.5", "remove the flag"),
        ("--speculative-accept-threshold-acc 0.5", "remove the flag"),
        ("--speculative-use-rejection-sampling", "remove the flag"),
        ("--attention-backend triton", "use --attention-backend torch_native"),
        ("--prefill-attention-backend triton", "use --attention-backend torch_native"),
        ("--decode-attention-backend fa3", "use --attention-backend torch_native"),
    ],
)
def test_an_unsupported_flag_is_named_with_its_value_and_what_to_do(checkpoint: Path, flags: str, advice: str) -> None:
    with pytest.raises(Refused) as refused:
        _resolve(checkpoint, *flags.split())
    (sentence,) = refused.value.sentences
    assert sentence.startswith(f"{flags}: ") and sentence.endswith(".")
    assert advice in sentence
    assert str(refused.value) == sentence


UNTRIED = (
    "--attn-cp-size 2",
    "--nnodes 2",
    "--enable-prefill-cp",
    "--enable-layernorm-sp",
    "--enable-kv-cache-sharding",
    "--enable-attn-tp-input-scattered",
    "--radix-cache-backend other",
    "--enable-session-radix-cache",
    "--hicache-storage-backend file",
    "--hicache-io-backend kernel_ascend",
    "--hicache-mem-layout page_head",
    "--enable-unified-memory",
    "--enable-page-major-kv-layout",
    "--enable-unified-cache-external-linker",
    "--enable-hisparse",
    "--enable-lmcache",
    "--enable-flexkv",
    "--prefill-only-disable-kv-cache",
    "--cpu-offload-gb 1",
    "--offload-group-size 2",
    "--enable-memory-saver",
    "--enable-weights-cpu-backup",
    "--enable-single-batch-overlap",
    "--enable-lean-attention",
    "--enable-fp32-lm-head",
    "--dllm-algorithm LowConfidence",
    "--is-embedding",
    "--decoupled-spec-role drafter",
    "--speculative-draft-sink-size 4",
    "--speculative-draft-model-revision main",
    "--speculative-draft-load-format auto",
    "--speculative-draft-kv-cache-dtype auto",
    "--speculative-adaptive-config widths.json",
    "--speculative-use-block-verification",
    "--speculative-dflash-block-size 8",
    "--speculative-dspark-block-size 8",
    "--speculative-ngram-external-corpus-path corpus.jsonl",
    "--uno-lora-path /nowhere",
    "--enable-multi-layer-eagle",
)


@pytest.mark.parametrize("flags", UNTRIED)
def test_what_nobody_tried_is_refused(checkpoint: Path, flags: str) -> None:
    """Before SGLang resolves the arguments: it has complaints of its own about some of them."""
    load_plugins()
    argv = ["--model-path", str(checkpoint), "--speculative-algorithm", "orthrus", *flags.split()]
    (sentence,) = refusals.flag_refusals(prepare_server_args(argv))
    assert sentence.startswith(f"{flags}: ") and sentence.endswith(".")


def test_attention_dp_is_refused(checkpoint: Path) -> None:
    """Under its own name and the deprecated one; SGLang demands tensor parallelism with it."""
    for flags in ("--attn-dp-size 2 --tp-size 2", "--enable-dp-attention --dp-size 2 --tp-size 2"):
        with pytest.raises(Refused) as refused:
            _resolve(checkpoint, *flags.split())
        assert "--attn-dp-size 2: ORTHRUS does not support it; use --attn-dp-size 1." in refused.value.sentences


def test_a_draft_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(Refused, match=f"--speculative-draft-model-path {checkpoint}: .* remove the flag"):
        _resolve(checkpoint, "--speculative-draft-model-path", str(checkpoint))


@pytest.mark.parametrize(
    ("variable", "value"), [("SGLANG_ENABLE_METADATA_GLUE_GRAPH", "1"), ("SGLANG_RAGGED_VERIFY_MODE", "compact")]
)
def test_an_unsupported_environment_variable_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(Refused, match=f"{variable}={value}: .* unset the environment variable"):
        _resolve(checkpoint)


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("ORTHRUS_GRAMMAR_DRAFT=on", "use one of repair, off"),
        ("ORTHRUS_SLOW_MASK_MS=-1", "use milliseconds, 0 or more"),
        ("ORTHRUS_SPEED_FLOOR=80", "use a share from 0, for none, to 1"),
    ],
)
def test_a_setting_that_does_not_exist_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, setting: str, fix: str
) -> None:
    monkeypatch.setenv(*setting.split("="))
    with pytest.raises(Refused, match=f"{setting}: {fix}"):
        _resolve(checkpoint)


def test_a_gpu_has_other_attention_backends(checkpoint: Path) -> None:
    for backend in ATTENTION_BACKENDS:
        _resolve(checkpoint, "--device", "cuda", "--attention-backend", backend)
    for flag in ("--attention-backend", "--decode-attention-backend"):
        with pytest.raises(Refused) as refused:
            _resolve(checkpoint, "--device", "cuda", "--attention-backend", "flashinfer", flag, "torch_native")
        assert refused.value.sentences == (
            f"{flag} torch_native: with --device cuda ORTHRUS runs on flashinfer or fa3 or triton; "
            "use --attention-backend flashinfer.",
        )


@pytest.mark.parametrize(
    "flags",
    [
        "--quantization fp8",
        "--quantization awq",
        "--quantization bitsandbytes",
        "--quantization fp8 --tp-size 2",
        "--device cuda --quantization fp8",
        "--device cuda --kv-cache-dtype fp8_e4m3",
        "--device cuda --kv-cache-dtype fp8_e5m2 --attention-backend fa3",
        "--device cuda --kv-cache-dtype fp8_e4m3 --attention-backend triton",
        "--device cuda --enable-deterministic-inference",
        "--device cuda --prefill-attention-backend flashinfer --decode-attention-backend triton",
        "--device cuda --decode-attention-backend flashinfer --attention-backend fa3 "
        "--speculative-attention-mode decode",
        "--enable-dp-attention --dp-size 2 --tp-size 2",
        "--lora-paths adapter=/nowhere",
        "--dtype float16 --kv-cache-dtype fp8_e5m2 --enable-metrics --schedule-policy fcfs --chunked-prefill-size -1 "
        "--page-size 64 --enable-deterministic-inference --disable-cuda-graph --load-format dummy",
    ],
)
def test_no_refusal_comes_from_what_sglang_derived(checkpoint: Path, flags: str) -> None:
    """Each names a flag that the user gave, or its former name."""
    former = {"--attn-dp-size": "--enable-dp-attention"}
    try:
        _resolve(checkpoint, *flags.split())
    except Refused as refused:
        for sentence in refused.sentences:
            named = [word for word in sentence.split(": ")[0].split() if word.startswith("--")]
            assert named and all(name in flags or former.get(name, name) in flags for name in named), sentence
    except ValueError as error:
        assert "ORTHRUS" not in str(error)  # SGLang's own


def test_quantization_of_the_served_model_is_not_that_of_a_draft_model(checkpoint: Path) -> None:
    _resolve(checkpoint, "--device", "cuda", "--quantization", "fp8")
    with pytest.raises(Refused, match=r"--speculative-draft-model-quantization fp8: .* remove the flag"):
        _resolve(checkpoint, "--speculative-draft-model-quantization", "fp8")


def test_a_backend_that_sglang_chose_gives_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Blackwell, where SGLang's default is `trtllm_mha`."""
    from sglang.srt.arg_groups import overrides

    monkeypatch.setattr(overrides, "get_default_attn_backend", lambda *args: "flex_attention2")
    args = _resolve(checkpoint, "--device", "cuda")
    assert _resolved(args, "attention_backend") == "flashinfer"


def test_a_block_and_its_prefix_have_the_same_precision(checkpoint: Path, tmp_path: Path) -> None:
    """Triton attends to a block's own K and V before they are rounded to the pool's type."""
    on_triton = ("--device", "cuda", "--attention-backend", "triton")
    for dtype in ("fp8_e4m3", "fp8_e5m2"):
        with pytest.raises(Refused, match=rf"--kv-cache-dtype {dtype}: on triton .*use --attention-backend flashinfer"):
            _resolve(checkpoint, *on_triton, "--kv-cache-dtype", dtype)
    _resolve(checkpoint, "--device", "cuda", "--attention-backend", "flashinfer", "--kv-cache-dtype", "fp8_e4m3")
    args = SimpleNamespace(kv_cache_dtype="auto", model_path=checkpoint)
    found = SimpleNamespace(hf_config=SimpleNamespace(quantization_config=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sglang.srt.arg_groups.model_override_base.model_config_of", lambda args: found)
        assert not list(refusals._triton_refusals(args))
        for declared in (
            {"quant_method": "compressed-tensors", "kv_cache_scheme": {"type": "float", "num_bits": 8}},
            {"kv_cache_quant_algo": "FP8"},
            {"quantization": {"kv_cache_quant_algo": "FP8"}},
        ):
            found.hf_config.quantization_config = declared
            (sentence,) = refusals._triton_refusals(args)
            assert sentence.startswith(f"--model-path {checkpoint}: the checkpoint asks for an fp8 KV cache")


@pytest.mark.parametrize(
    "flags",
    [
        "--prefill-attention-backend flashinfer --decode-attention-backend fa3",
        "--attention-backend flashinfer --decode-attention-backend triton",
        "--attention-backend fa3 --decode-attention-backend flashinfer --speculative-attention-mode decode",
        "--prefill-attention-backend fa3 --decode-attention-backend triton",
    ],
)
def test_unlike_attention_backends_are_served(checkpoint: Path, flags: str) -> None:
    """`tests/gpu/test_gpu_backends.py` compares their answers."""
    _resolve(checkpoint, "--device", "cuda", *flags.split())


def test_widths_end_with_the_largest(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHRUS_WIDTHS", "1,4")
    _resolve(checkpoint, "--speculative-num-draft-tokens", "4")
    with pytest.raises(Refused, match=r"ORTHRUS_WIDTHS=1,4: the largest width is 8, .* set that flag to 4, or add 8"):
        _resolve(checkpoint)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ranks_share_key_value_heads_out_evenly(checkpoint: Path, device: str) -> None:
    _resolve(checkpoint, "--device", device, "--tp-size", "2")
    with pytest.raises(Refused, match=r"--tp-size 4: the checkpoint's 2 key-value heads .*; use --tp-size 1 or 2"):
        _resolve(checkpoint, "--device", device, "--tp-size", "4")


def test_partial_sums_are_reduced_as_in_qwen3(checkpoint: Path, tmp_path: Path) -> None:
    """SGLang tells Qwen3 by its model type, and an Orthrus checkpoint may have one of its own."""
    renamed = tmp_path / "renamed"
    shutil.copytree(checkpoint, renamed)
    config = json.loads((checkpoint / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps(config | {"model_type": "orthrus"}))
    for model in (checkpoint, renamed):
        assert _resolved(_resolve(model), "boundary_reduction") == "ar"
    assert _resolved(_resolve(renamed, "--boundary-reduction", "rs"), "boundary_reduction") == "rs"


def test_every_refusal_is_kept_and_the_first_is_raised(checkpoint: Path) -> None:
    with pytest.raises(Refused) as refused:
        _resolve(checkpoint, "--pp-size", "2", "--enable-pdmux", "--speculative-num-draft-tokens", "9")
    assert [sentence.split(":")[0] for sentence in refused.value.sentences] == [
        "--speculative-num-draft-tokens 9",
        "--pp-size 2",
        "--enable-pdmux",
    ]
    assert str(refused.value) == refused.value.sentences[0]


def test_another_sglang_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: "0.5.22")
    with pytest.raises(Refused, match=r"needs sglang 0\.5\.23, but 0\.5\.22 is installed: pip install"):
        _resolve(checkpoint)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--speculative-use-block-verification", "--speculative-use-block-verification only supports EAGLE"),
        ("--attention-backend flex_attention", "Speculative decoding .* not supported with Flex Attention"),
    ],
)
def test_sglang_refuses_some_flags_before_us(checkpoint: Path, flags: str, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError, AssertionError), match=message):
        _resolve(checkpoint, *flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--speculative-eagle-topk 1",
        "--dp-size 2",
        "--enable-deterministic-inference",
        "--kv-cache-dtype fp8_e4m3",
        "--disable-radix-cache",
        "--page-size 16",
        "--disable-overlap-schedule",
        "--grammar-backend llguidance",
        "--detokenizer-worker-num 2",
    ],
)
def test_what_works_is_not_refused(checkpoint: Path, flags: str) -> None:
    _resolve(checkpoint, *flags.split())


def test_an_overridden_block_size_counts(checkpoint: Path) -> None:
    override = ("--json-model-override-args", '{"block_size": 4}')
    assert _resolved(_resolve(checkpoint, *override), "speculative_num_draft_tokens") == 4
    with pytest.raises(Refused, match="--speculative-num-draft-tokens 5: ORTHRUS drafts and verifies 2 to 4 tokens"):
        _resolve(checkpoint, *override, "--speculative-num-draft-tokens", "5")


def test_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    from sglang_orthrus.models.checkpoint import export_ar

    plain = export_ar(write_checkpoint(tmp_path / "dual"), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM.*Orthrus checkpoint"):
        _resolve(plain)


@pytest.mark.parametrize("key", ["block_size", "mask_token_id"])
def test_a_checkpoint_without_the_dual_view_keys_is_refused(tmp_path: Path, key: str) -> None:
    folder = write_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"no {key}"):
        _resolve(folder)
