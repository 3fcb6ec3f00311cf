"""CUDA graphs against eager passes, at captured batch sizes and between them, on every attention backend."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.equality import NEAR_TIE
from benchmarks.common.greedy import load_prompts
from benchmarks.common.setups import BF16_NEAR_TIE, SETUPS
from sglang_orthrus.cli.demo import NANO

pytestmark = pytest.mark.gpu

BATCH_SIZES = (1, 2, 3, 4, 5)
CAPTURED = ("--cuda-graph-bs-decode", "1", "2", "4")
COMMON = ("--device", "cuda", "--max-total-tokens", "32768", "--mem-fraction-static", "0.8")


def _run_rounds(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """One round of held-out prompts at every batch size."""
    prompts = iter(load_prompts(NANO, sum(BATCH_SIZES)))
    batches = [[list(next(prompts).ids) for _ in range(size)] for size in BATCH_SIZES]
    (folder / "cases.json").write_text(json.dumps(batches))
    command = [sys.executable, "-m", "tests.e2e.graph_rounds", NANO, folder / "cases.json", folder / "out.json", *flags]
    subprocess.run([str(part) for part in command], check=True, timeout=300)
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


def _differences(way: list[Any], said: dict[str, Any]) -> list[float]:
    """How undecided the eager pass was, at the first place of every request where a graph chose another token."""
    gaps = []
    for request, (draft, verify) in enumerate(zip(said["draft gaps"], said["gaps"], strict=True)):
        (block, predictions), (eager_block, eager_predictions) = (
            [part[request] for part in parts] for parts in (way, said["eager"])
        )
        drafted = [place for place, (ours, theirs) in enumerate(zip(block, eager_block, strict=True)) if ours != theirs]
        same = drafted[0] if drafted else len(block)
        # Every draft is a guess of its own; what is verified rests on the drafts before it.
        gaps += [draft[place - 1] for place in drafted]
        gaps += [verify[row] for row in range(same) if predictions[row] != eager_predictions[row]][:1]
    return gaps


@pytest.mark.parametrize("width", ["32", "12"])
@pytest.mark.parametrize("setup", ["triton-fp32", "flashinfer-bf16", "fa3-bf16"])
def test_graphs_say_what_eager_passes_say(
    setup: str, width: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 exactly, but for gaps of 1e-4; in bf16 but for near ties."""
    for name, value in SETUPS[setup].env.items():
        monkeypatch.setenv(name, value)
    precision = SETUPS[setup].args[:4]  # data type and attention backend
    found = _run_rounds(tmp_path, *COMMON, *CAPTURED, *precision, "--speculative-num-draft-tokens", width)
    limit = NEAR_TIE if setup == "triton-fp32" else BF16_NEAR_TIE
    for size, said in zip(BATCH_SIZES, found, strict=True):
        is_covered = size <= 4
        assert said["split path"] == ("split" if is_covered else "eager")
        assert (said["graph"] is not None) == is_covered
        for way in ("split", "graph"):
            if said[way] is not None:
                assert all(gap < limit for gap in _differences(said[way], said))
