"""The doctor: what each check says of good and bad installations, and the command as users run it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sglang_orthrus.cli import doctor
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.cli.doctor import Check, Status
from sglang_orthrus.cli.server import plain_env
from tests.fixtures import write_checkpoint


def _doctor(*flags: str, **environment: str) -> tuple[int, str]:
    run = subprocess.run(
        [sys.executable, "-m", "sglang_orthrus", "doctor", *flags],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in run.stdout + run.stderr
    assert all(len(line) <= 100 for line in run.stdout.splitlines()[1:])
    return run.returncode, " ".join(run.stdout.split())


RUNS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "sound": (("--max-running-requests", "4"), {}),
    "swallowed exception": ((), {"SGLANG_EXTERNAL_MODEL_PACKAGE": "no_such_package"}),
    "plugin filter": ((), plain_env()),
    "unknown platform": ((), {"SGLANG_PLATFORM": "no_such_platform"}),
}
Reports = dict[str, Future[tuple[int, str]]]


@pytest.fixture(scope="module")
def reports() -> Iterator[Reports]:
    """Status and text of the command, run as users do. Each run imports SGLang: two at a time, beside other tests."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(_doctor, *flags, **environment) for name, (flags, environment) in RUNS.items()}


def _examined(*flags: str) -> dict[str, list[Check]]:
    found: dict[str, list[Check]] = {}
    for check in doctor.examine(flags):
        found.setdefault(check.subject, []).append(check)
    return found


def _failures(*flags: str) -> list[str]:
    return [check.finding for checks in _examined(*flags).values() for check in checks if check.status is Status.FAIL]


def test_a_sound_installation_passes_with_every_line_ok(reports: Reports) -> None:
    status, text = reports["sound"].result()
    assert status == 0
    assert "FAIL" not in text and "warn" not in text
    for found in (
        "ok sglang 0.5.23",
        "ok libraries torch",
        "ok device",
        "ok plugin --speculative-algorithm ORTHRUS is registered",
        "block_size 32, mask_token_id 4095, 36 *_diff tensors",
        "ok attention",
        "ok flags none refused: --max-running-requests 4",
    ):
        assert found in text


def test_an_exception_that_sglang_swallows_is_shown(reports: Reports) -> None:
    status, text = reports["swallowed exception"].result()
    assert status == 1
    assert "FAIL plugin" in text and "ModuleNotFoundError: No module named 'no_such_package'" in text


def test_a_plugin_filter_without_ours_is_named(reports: Reports) -> None:
    status, text = reports["plugin filter"].result()
    assert status == 1
    assert "FAIL plugin SGLANG_PLUGINS=__none__ leaves orthrus out; add orthrus to it or unset it." in text


def test_a_platform_that_is_not_installed_is_named(reports: Reports) -> None:
    status, text = reports["unknown platform"].result()
    assert status == 1
    assert "FAIL device RuntimeError: SGLANG_PLATFORM='no_such_platform' not found" in text
    assert "1 problem." in text


def test_every_refused_flag_is_listed() -> None:
    flags = "--pp-size 2 --enable-lora --attention-backend fa4 --speculative-num-draft-tokens 33"
    found = _failures(*flags.split())
    for flag in ("--pp-size 2:", "--enable-lora:", "--attention-backend fa4:", "--speculative-num-draft-tokens 33:"):
        assert sum(finding.startswith(flag) for finding in found) == 1, found
    assert len(found) == 4


def test_a_flag_that_sglang_refuses_first_is_named_all_the_same() -> None:
    """SGLang's own check is an assertion without a message."""
    found = _failures("--attn-dp-size", "2")
    assert found[0].startswith("--attn-dp-size 2: ORTHRUS")
    assert found[1].startswith("AssertionError: assert cfg.tp_size % cfg.attn_dp_size == 0 (parallel_hook.py:")


def test_what_sglang_checks_after_the_resolution_is_listed() -> None:
    (found,) = _failures("--gpu-id-step", "0")
    assert found == "AssertionError: gpu_id_step must be positive"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--no-such-flag", "3"), "unrecognized arguments: --no-such-flag 3"),
        (("--tp-size", "two"), "invalid int value: 'two'"),
        (("--model-path", "/no/such/place"), "--model-path /no/such/place: no such directory"),
        (("--config", "/no/such/file.yaml"), "/no/such/file.yaml"),
        (("--json-model-override-args", "{"), "JSONDecodeError"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_bad_input_gives_a_finding(flags: tuple[str, ...], complaint: str) -> None:
    (found,) = _failures(*flags)
    assert complaint in found


def test_a_checkpoint_without_some_diff_tensors_fails(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj_diff.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (found,) = _failures("--model-path", str(folder))
    assert "1 missing (model.layers.1.self_attn.q_proj_diff.weight)" in found


def test_a_damaged_checkpoint_fails(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    assert [check.status for check in _examined("--model-path", str(folder))["checkpoint"]] == [Status.FAIL]
    (folder / "model.safetensors").unlink()
    (found,) = _failures("--model-path", str(folder))
    assert f"no .safetensors file in {folder}" in found
    assert not _failures("--model-path", str(folder), "--load-format", "dummy")


def test_a_plain_checkpoint_fails_once(tmp_path: Path) -> None:
    from sglang_orthrus.models.checkpoint import export_ar

    (found,) = _failures("--model-path", str(export_ar(NANO, tmp_path / "plain")))
    assert "Qwen3ForCausalLM" in found and "use an Orthrus checkpoint" in found


def test_where_a_checkpoint_ends_the_resolution_nothing_is_said_of_flags(tmp_path: Path) -> None:
    """Not all of them were looked at, and no attention backend was chosen. Ours are, before the resolution."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"')
    found = _examined("--model-path", str(tmp_path))
    assert [check.status for check in found.pop("checkpoint")] == [Status.FAIL]
    assert "flags" not in found and "attention" not in found
    assert "--pp-size 2:" in " ".join(_failures("--model-path", str(tmp_path), "--pp-size", "2"))


def test_a_configuration_file_is_read(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "model")
    config = tmp_path / "server.yaml"
    config.write_text(f"model-path: {tmp_path / 'model'}\nspeculative-algorithm: ORTHRUS\npp-size: 2\n")
    found = _examined("--config", str(config))
    assert found["checkpoint"][0].finding.startswith(str(tmp_path / "model"))
    assert [check.finding for check in found["flags"]] == ["--pp-size 2: ORTHRUS does not support it; use --pp-size 1."]


def test_another_algorithm_is_only_mentioned() -> None:
    (check,) = _examined("--speculative-algorithm", "NGRAM")["flags"]
    assert (check.status, check.finding) == (Status.WARN, "--speculative-algorithm is NGRAM, not ORTHRUS")


def test_another_sglang_fails_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_orthrus.compat import versions

    monkeypatch.setattr(versions, "version", lambda name: "0.5.22")
    (check,) = doctor.examine(())
    assert check.status is Status.FAIL
    assert "0.5.22 is installed: pip install sglang==0.5.23" in check.finding


def test_a_missing_sglang_fails_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    (check,) = doctor.examine(())
    assert (check.status, check.finding) == (Status.FAIL, "not installed here: pip install sglang==0.5.23")


def test_libraries_are_compared_with_what_sglang_asks_for() -> None:
    wanted = [
        "torch==2.14.1",
        "torch==2.9; extra == 'other'",
        "xgrammar==0.2.7; python_version > '3'",
        "flashinfer_python[cu13]==0.7.2",
    ]
    good = {"torch": "2.14.1+cpu", "xgrammar": "0.2.7", "flashinfer-python": "0.7.2"}
    assert doctor.libraries_check(good, wanted).status is Status.OK
    check = doctor.libraries_check({"torch": "2.13.0", "flashinfer-python": None}, wanted)
    assert check.status is Status.WARN
    assert check.finding.startswith(
        "torch 2.13.0 (sglang wants ==2.14.1), flashinfer-python missing (sglang wants ==0.7.2)"
    )


def test_a_gpu_is_named_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (130 * 2**30, 140 * 2**30))
    check = doctor.device_check()
    assert check.status is Status.OK
    assert check.finding.startswith("NVIDIA H200, 130 of 140 GiB free; platform ")


def _record(message: str, *arguments: str, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = (type(error), error, None) if error else None
    return logging.LogRecord("sglang.srt.plugins", logging.INFO, "", 0, message, arguments, exc_info)


@pytest.mark.parametrize(
    ("environment", "records", "reason"),
    [
        ({"SGLANG_USE_CPU_ENGINE": "1"}, [], "SGLANG_USE_CPU_ENGINE=1"),
        ({"SGLANG_PLATFORM": "other"}, [], "SGLANG_PLATFORM=other selects another; set it to orthrus_cpu."),
        (
            {},
            [_record("Failed to activate platform plugin: %s", "orthrus_cpu", error=ImportError("no mixin"))],
            "ImportError: no mixin",
        ),
        ({}, [_record("Skipping plugin %s (not in SGLANG_PLUGINS)", "orthrus_cpu")], "leaves orthrus_cpu out"),
        (
            {},
            [_record("Loaded plugin %s from group %s", "other", "group")],
            "Other is active; set SGLANG_PLATFORM=orthrus_cpu.",
        ),
    ],
)
def test_why_the_cpu_platform_is_off(
    environment: dict[str, str], records: list[logging.LogRecord], reason: str
) -> None:
    assert reason in doctor.why_no_cpu_platform(environment, records, "Other")


def test_the_platform_of_another_package_leaves_the_plugin_out() -> None:
    record = _record("Skipping plugin %s (dist %s excluded by SGLANG_PLATFORM)", "orthrus", "sglang-orthrus")
    assert (doctor.swallowed([record], "orthrus") or "").startswith("SGLANG_PLATFORM=")
    assert doctor.swallowed([record], "orthrus_cpu") is None
