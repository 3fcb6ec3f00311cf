"""The upstream-ready diffs in patches/ apply to the installed SGLang and do what they say."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

pytestmark = pytest.mark.contract

PATCHES = Path(__file__).resolve().parents[2] / "patches"
CUSTOM_SPEC_ALGO = PATCHES / "0001-custom-spec-algo-scheduler-methods.patch"


def installed_sglang() -> Path:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def apply(patch: Path, folder: Path) -> list[Path]:
    """Apply `patch` to copies of the installed files it touches, under `folder`; return them."""
    names = re.findall(r"^\+\+\+ b/python/sglang/(\S+)$", patch.read_text(), flags=re.MULTILINE)
    copies = [folder / "sglang" / name for name in names]
    for name, copy in zip(names, copies, strict=True):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(installed_sglang() / name, copy)
    done = subprocess.run(["git", "apply", "-p2", str(patch)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copies


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("patch", sorted(PATCHES.glob("*.patch")), ids=lambda patch: patch.stem)
def test_patch_applies_to_the_installed_sglang_and_is_listed(patch: Path, tmp_path: Path) -> None:
    copies = apply(patch, tmp_path)
    assert copies, "the patch touches no file"
    for copy in copies:
        assert copy.read_bytes() != (installed_sglang() / copy.relative_to(tmp_path / "sglang")).read_bytes()
    assert patch.name in (PATCHES / "README.md").read_text()


def test_custom_algorithms_get_what_the_scheduler_calls(tmp_path: Path) -> None:
    from sglang.srt.speculative import spec_registry
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    called = {name for name, member in vars(SpeculativeAlgorithm).items() if isinstance(member, FunctionType)}
    called = {name for name in called if not name.startswith("_")}
    assert called - set(dir(spec_registry.CustomSpecAlgo)), "SGLang has closed the gap: drop the patch"

    patched = load("patched_spec_registry", apply(CUSTOM_SPEC_ALGO, tmp_path)[0])
    assert called <= set(dir(patched.CustomSpecAlgo))
    patched._assert_custom_spec_algo_conforms(patched.CustomSpecAlgo)
    with pytest.raises(TypeError, match=r"create_future_map.*need_topk"):
        patched._assert_custom_spec_algo_conforms(spec_registry.CustomSpecAlgo)

    algorithm = patched.CustomSpecAlgo("ANY", lambda server_args: object)
    assert algorithm.carries_draft_hidden_states() is False
    assert algorithm.need_topk() is False
    assert algorithm.get_platform_worker_cls() is None
