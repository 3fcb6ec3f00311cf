"""A copy of the installed SGLang with one of our patches, for servers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import sglang

PATCHES = Path(__file__).parents[2] / "patches"


def patched_sglang(name: str, folder: Path) -> dict[str, str]:
    """The environment in which a server runs on SGLang with `patches/<name>.patch`; the copy is made in `folder`."""
    installed, copy = Path(sglang.__file__).parent, folder / "sglang"
    shutil.copytree(installed, copy, copy_function=os.symlink)
    patch = (PATCHES / f"{name}.patch").read_text()
    for file in re.findall(r"^\+\+\+ b/python/sglang/(\S+)$", patch, flags=re.MULTILINE):
        (copy / file).unlink()
        shutil.copyfile(installed / file, copy / file)
    subprocess.run(["git", "apply", "-p2"], cwd=folder, input=patch, text=True, check=True)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
