"""Our patches, applied to copies of files of the installed SGLang, or to a whole copy of it for servers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

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


def patched_sglang(name: str, folder: Path) -> dict[str, str]:
    """The environment in which a server runs on SGLang with `patches/<name>.patch`; the copy is made in `folder`."""
    apply(PATCHES / f"{name}.patch", folder)

    def link(source: str, target: str) -> None:
        if not Path(target).exists():  # else it is patched
            Path(target).symlink_to(source)

    shutil.copytree(installed_sglang(), folder / "sglang", copy_function=link, dirs_exist_ok=True)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
