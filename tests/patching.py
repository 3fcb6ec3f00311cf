"""Our patches, applied to copies of files of the installed SGLang, or to a whole copy of it for servers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATCHES = Path(__file__).resolve().parents[1] / "patches"


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
    """The module in a file, imported under this name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def patched_module(number: str, folder: Path, file: str) -> ModuleType:
    """The module `file` of the installed SGLang under the patch of this number; the copy is made in `folder`."""
    copies = {copy.stem: copy for copy in apply(next(PATCHES.glob(f"{number}-*.patch")), folder)}
    return load(f"patched_{number}_{file}", copies[file])


def patched_sglang(name: str, folder: Path) -> dict[str, str]:
    """The environment in which a server runs on SGLang with `patches/<name>.patch`; the copy is made in `folder`."""
    apply(PATCHES / f"{name}.patch", folder)

    def link(source: str, target: str) -> None:
        if not Path(target).exists():  # else it is patched
            Path(target).symlink_to(source)

    shutil.copytree(installed_sglang(), folder / "sglang", copy_function=link, dirs_exist_ok=True)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def as_shipped(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Take our wrapper off a function of SGLang's for one test, whichever test of this process has put it on."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, function.__wrapped__ if getattr(function, "_sglang_orthrus", False) else function)
