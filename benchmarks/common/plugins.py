"""Plugins for one server: SGLang finds them through the environment, without an installation."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from benchmarks.common.provenance import ROOT


def with_plugins(folder: Path, modules: Mapping[str, str]) -> dict[str, str]:
    """Environment in which SGLang finds these plugins.

    Args:
        folder: where their metadata are written; made if it is missing.
        modules: of this repository, by the plugin's name; each has a function `register`.
    """
    metadata = folder / "plugins_of_tests-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins-of-tests\nVersion: 1.0\n")
    lines = [f"{name} = {module}:register" for name, module in modules.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[sglang.srt.plugins]", *lines, ""]))
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH"))))}
