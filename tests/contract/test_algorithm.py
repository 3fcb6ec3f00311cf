"""The algorithm as SGLang finds, resolves and refuses it: real entry point, real ServerArgs, no server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_orthrus.algorithm import OrthrusAlgorithm
from sglang_orthrus.plugin import register
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
    assert _resolved(args, "max_running_requests") == 48


def test_a_narrower_verify_width_still_reserves_a_whole_block(checkpoint: Path) -> None:
    args = _resolve(checkpoint, "--speculative-num-draft-tokens", "4")
    assert _resolved(args, "speculative_num_draft_tokens") == 4
    assert _resolved(args, "speculative_num_steps") == 8


@pytest.mark.parametrize(
    "flags",
    [
        ("--speculative-num-draft-tokens", "9"),
        ("--speculative-num-draft-tokens", "1"),
        ("--tokenizer-worker-num", "2"),
        ("--pp-size", "2"),
        ("--tp-size", "2"),
        ("--grammar-backend", "outlines"),
        ("--enable-mixed-chunk",),
        ("--enable-two-batch-overlap",),
        ("--attention-backend", "triton"),
    ],
    ids=" ".join,
)
def test_an_unsupported_flag_is_named_with_its_value(checkpoint: Path, flags: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=" ".join(flags)) as refused:
        _resolve(checkpoint, *flags)
    assert "ORTHRUS" in str(refused.value)


def test_a_plain_checkpoint_is_refused(tmp_path: Path) -> None:
    from sglang_orthrus.checkpoint import export_ar

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
