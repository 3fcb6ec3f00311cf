"""Rounds as one graph, as two and eagerly say the same, at captured batch sizes, between them and above."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity import load_prompts
from sglang_orthrus.demo import NANO
from tests.e2e.graph_rounds import CAPTURED

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_gpu_graphs.py has the real graphs"),
]

BATCH_SIZES = (1, 2, 3, 4, 5)
CPU = ("--device", "cpu", "--dtype", "float32")


def run_rounds(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """One round of held-out prompts at every batch size."""
    prompts = iter(load_prompts(NANO, sum(BATCH_SIZES)))
    batches = [[list(next(prompts).ids) for _ in range(size)] for size in BATCH_SIZES]
    (folder / "cases.json").write_text(json.dumps(batches))
    command = [sys.executable, "-m", "tests.e2e.graph_rounds", NANO, folder / "cases.json", folder / "out.json", *flags]
    subprocess.run([str(part) for part in command], check=True, timeout=300)
    found: list[dict[str, Any]] = json.loads((folder / "out.json").read_text())
    return found


def _accepted(block: list[list[int]], predictions: list[list[int]]) -> int:
    """Drafts of all rows that agree with the AR view, up to the first of each row that does not."""
    total = 0
    for drafts, said in zip(block, predictions, strict=True):
        for draft, token in zip(drafts[1:], said, strict=False):
            if draft != token:
                break
            total += 1
    return total


def test_a_round_is_the_same_in_one_graph_in_two_and_in_none(tmp_path: Path) -> None:
    found = run_rounds(tmp_path)
    for size, said in zip(BATCH_SIZES, found, strict=True):
        is_covered = size <= max(CAPTURED)
        assert said["split path"] == ("split" if is_covered else "eager")
        assert said["eager path"] == "eager"
        assert said["graph"] == (said["eager"] if is_covered else None)
        assert said["split"] == said["eager"]
    # The mask tokens would be accepted nowhere: the graph did draft.
    assert sum(_accepted(*said["eager"]) for said in found) > sum(BATCH_SIZES)


def test_a_narrower_verify_has_graphs_of_its_own_and_drafts_whole_blocks(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole, narrow = run_rounds(tmp_path / "whole"), run_rounds(tmp_path, *CPU, "--speculative-num-draft-tokens", "12")
    for size, said, expected in zip(BATCH_SIZES, narrow, whole, strict=True):
        assert said["graph"] is None
        assert said["split path"] == ("split" if size <= max(CAPTURED) else "eager")
        assert said["split"] == said["eager"]
        assert said["eager"][0] == [row[:12] for row in expected["eager"][0]]
