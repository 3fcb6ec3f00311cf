"""CUDA graphs against eager passes, at captured batch sizes and between them, on every attention backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.parity import BF16_NEAR_TIE, SETUPS
from benchmarks.parity_rules import NEAR_TIE
from tests.e2e.test_graph_rounds import BATCH_SIZES, run_rounds

pytestmark = pytest.mark.gpu

CAPTURED = ("--cuda-graph-bs-decode", "1", "2", "4")
COMMON = ("--device", "cuda", "--max-total-tokens", "32768", "--mem-fraction-static", "0.3")


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
    if setup == "fa3-bf16" and width != "32":
        pytest.skip("fa3 runs blocks of one width only")
    for name, value in SETUPS[setup].env.items():
        monkeypatch.setenv(name, value)
    precision = SETUPS[setup].args[:4]  # data type and attention backend
    found = run_rounds(tmp_path, *COMMON, *CAPTURED, *precision, "--speculative-num-draft-tokens", width)
    limit = NEAR_TIE if setup == "triton-fp32" else BF16_NEAR_TIE
    for size, said in zip(BATCH_SIZES, found, strict=True):
        is_covered = size <= 4
        assert said["split path"] == ("split" if is_covered else "eager")
        assert (said["graph"] is not None) == (is_covered and width == "32")
        for way in ("split", "graph"):
            if said[way] is not None:
                assert all(gap < limit for gap in _differences(said[way], said))
