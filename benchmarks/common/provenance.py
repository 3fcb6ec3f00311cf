"""What produced a result: code, versions, machine, command, date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
VERSIONS_OF = ("sglang", "torch", "flashinfer-python", "triton", "transformers", "sglang-orthrus")


def provenance() -> dict[str, Any]:
    """As JSON. A copy of the tree without its git history is told the commit by the variable GIT_COMMIT."""
    return {
        "commit": os.environ.get("GIT_COMMIT") or commit() or "unknown",
        "versions": {name: _version(name) for name in VERSIONS_OF} | {"python": platform.python_version()},
        "command": [_program(), *sys.argv[1:]],
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("ORTHRUS_")},
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The checked-out commit, marked "-dirty" if files differ from it; empty outside a repository."""
    head = _git("rev-parse", "HEAD")
    return head + ("-dirty" if head and _git("status", "--porcelain") else "")


def _program() -> str:
    """The benchmark that runs, as its name below `benchmarks`: "speed.sweep", "parity"."""
    path = Path(sys.argv[0]).resolve()
    folder = ROOT / "benchmarks"
    if not path.is_relative_to(folder):
        return path.stem
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join(part for part in parts if part != "__main__")


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if "model name" in line), "").partition(":")[2].strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
