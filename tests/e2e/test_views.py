"""The served model against an independent PyTorch one: both views, over the paged pool, fp32."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common.reference import Reference
from tests.fixtures import Shape, write_checkpoint

pytestmark = pytest.mark.e2e

RELATIVE = 1e-4
# The bundled checkpoint is tied, and held to the reference by other tests.
TIED, UNTIED = Shape(block=8, layers=3), Shape(block=32, layers=2, tied=False)


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "shape", [pytest.param(TIED, id="tied", marks=pytest.mark.slow), pytest.param(UNTIED, id="untied")]
)
def test_both_views_agree_with_the_reference(shape: Shape, tmp_path: Path) -> None:
    """One batch of unequal prefixes, from one token to several hundred; blocks of random tokens."""
    model = write_checkpoint(tmp_path / "model", shape, seed=3)
    rng = random.Random(0)
    cases = [
        {
            "prefix": [rng.randrange(shape.vocab) for _ in range(length)],
            "block": [rng.randrange(shape.vocab) for _ in range(shape.block)],
        }
        for length in (1, 2, 17, 63, 64, 300)
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.e2e.view_logits", model, tmp_path / "cases.json", tmp_path / "out.pt"]
    subprocess.run([str(part) for part in command], check=True, timeout=300)
    found = torch.load(tmp_path / "out.pt")

    reference = Reference(model)
    for row, case in enumerate(cases):
        prefix, block = case["prefix"], case["block"]
        teacher = reference.ar_logits(prefix + block)
        diffusion = reference.diff_logits(prefix, block[0])
        assert _distance(found["prefill"][row], teacher[len(prefix) - 1]) < RELATIVE
        assert _distance(found["draft"][row], diffusion[:-1]) < RELATIVE
        assert _distance(found["verify"][row], teacher[len(prefix) :]) < RELATIVE
        # The two views of these random weights are far apart, so neither could pass for the other.
        assert _distance(diffusion[:-1], teacher[len(prefix) : -1]) > 100 * RELATIVE
