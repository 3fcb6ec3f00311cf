"""Plans by Triton's interpreter, which has to be switched on before Triton is imported.

python -m tests.unit.interpreted_plans, with TRITON_INTERPRET=1: cases as JSON on stdin, plans on stdout.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from sglang_orthrus.passes.plan_kernel import PlanLayout, write_plan


def read_plan(workspace: torch.Tensor, layout: PlanLayout, bs: int, width: int) -> dict[str, Any]:
    """What the attention kernel would find."""

    def ints(offset: int, size: int) -> list[int]:
        found: list[int] = workspace[offset : offset + 4 * size].view(torch.int32).tolist()
        return found

    valid = workspace[layout.valid_offset : layout.valid_offset + layout.num_ctas].tolist()
    count = sum(valid)
    assert valid == [1] * count + [0] * (layout.num_ctas - count)
    places = (layout.request_offset, layout.qo_tile_offset, layout.kv_tile_offset)
    return {
        "work": [list(piece) for piece in zip(*(ints(place, count) for place in places), strict=True)],
        "chunk": ints(layout.chunk_offset, 1)[0],
        "o_indptr": ints(layout.o_indptr_offset, bs + 1),
        "merge_indptr": ints(layout.merge_indptr_offset, bs * width + 1),
    }


def plan(case: dict[str, Any]) -> dict[str, Any]:
    """The plan of one case."""
    layout = PlanLayout(*case["layout"])
    prefix_lens, width = torch.tensor(case["prefix_lens"]), case["width"]
    bs = prefix_lens.shape[0]
    # An earlier plan's remains, which say that there is more work than there is.
    workspace = torch.full((layout.valid_offset + layout.num_ctas,), 1, dtype=torch.uint8)
    kv_lens, kv_indptr = torch.zeros(bs, dtype=torch.int32), torch.zeros(bs + 1, dtype=torch.int32)
    sizes = {name: case[name] for name in ("width", "group", "max_work", "min_chunk", "fine_chunk", "whole")}
    write_plan(workspace, layout, prefix_lens, kv_lens, kv_indptr, **sizes)
    found = read_plan(workspace, layout, bs, width)
    return found | {"kv_lens": kv_lens.tolist(), "kv_indptr": kv_indptr.tolist()}


if __name__ == "__main__":
    print(json.dumps([plan(case) for case in json.load(sys.stdin)]))
