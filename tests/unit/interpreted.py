"""What runs in the process of Triton's interpreter, which has to be switched on before Triton is imported.

The functions import what they need themselves, as the tests import this file without the interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang_orthrus.passes.plan_kernel import PlanLayout


def switch_on() -> None:
    """The first thing that the process does."""
    os.environ["TRITON_INTERPRET"] = "1"


# -- SGLang's kernels


def originals(cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """What SGLang's kernels return for every case (name, arguments)."""
    kernels: dict[str, Callable[..., Any]]
    kernels = {"assign": _assign, "murmur": _murmur, "block": _block, "accept": _accept}
    return [kernels[name](**arguments) for name, arguments in cases]


def _assign(**a: Any) -> torch.Tensor:
    import triton
    from sglang.srt.mem_cache.allocation import assign_req_to_token_pool

    table: torch.Tensor = a["req_to_token"].clone()  # the caller's, in memory that both processes share
    inputs = (a["req_pool_indices"], table, a["start_offset"], a["end_offset"], a["out_cache_loc"])
    grid = (a["batch_size"],)
    assign_req_to_token_pool[grid](*inputs, table.shape[1], triton.next_power_of_2(a["batch_size"]))
    return table


def _murmur(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    import triton
    from sglang.kernels.ops.sampling.murmur_hash import murmur_hash32_kernel

    n, m = len(seed), len(col_indices)
    out = torch.empty((n, m), dtype=torch.uint32)
    murmur_hash32_kernel[(n, triton.cdiv(m, 1024))](seed, positions, col_indices, out, n, m, BLOCK_SIZE=1024)
    return out


def _block(width: int, mask_token_id: int, anchors: torch.Tensor, **tables: torch.Tensor) -> list[torch.Tensor]:
    from sglang.kernels.ops.speculative import dflash

    outs = [torch.empty((len(anchors), width), dtype=torch.int64) for _ in range(3)]
    inputs = [tables[name] for name in ("prefix_lens", "req_pool_indices", "req_to_token")]
    dflash._prepare_dflash_draft_block_unchecked(anchors, *inputs, *outs, mask_token_id)
    return outs


def _accept(block: torch.Tensor, predictions: torch.Tensor, prefix_lens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from sglang.kernels.ops.speculative import dflash

    bs, width = block.shape
    accepted, commit = torch.empty(bs, dtype=torch.int32), torch.empty(bs, dtype=torch.int32)
    bonus, tokens = torch.empty(bs, dtype=torch.int64), torch.empty((bs, width), dtype=torch.int64)
    new_lens = torch.empty_like(prefix_lens)
    dflash._compute_dflash_accept_bonus_triton_unchecked(
        block, predictions, accepted, commit, bonus, tokens, prefix_lens, new_lens
    )
    return commit, tokens, bonus, new_lens


# -- our kernels


def placed_qkv(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases with what `place_qkv` returns ("q") and stores."""
    from sglang_orthrus.models.qkv_kernel import place_qkv

    for case in cases:
        q_norm, k_norm = (SimpleNamespace(weight=case[f"{name}_weight"], variance_epsilon=case["eps"]) for name in "qk")
        caches = case["k_cache"], case["v_cache"]
        case["q"] = place_qkv(case["qkv"], *caches, q_norm, k_norm, case["cos_sin"], case["positions"], case["slots"])
    return cases


def plans(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The plan of every case, as the attention kernel would find it."""
    return [_plan(case) for case in cases]


def _plan(case: dict[str, Any]) -> dict[str, Any]:
    from sglang_orthrus.passes.plan_kernel import write_plan

    layout: PlanLayout = case["layout"]
    prefix_lens, width = torch.tensor(case["prefix_lens"]), case["width"]
    bs = prefix_lens.shape[0]
    # An earlier plan's remains, which say that there is more work than there is.
    workspace = torch.full((layout.valid_offset + layout.num_ctas,), 1, dtype=torch.uint8)
    kv_lens, kv_indptr = torch.zeros(bs, dtype=torch.int32), torch.zeros(bs + 1, dtype=torch.int32)
    sizes = {name: case[name] for name in ("width", "group", "max_work", "min_chunk", "fine_chunk", "whole")}
    write_plan(workspace, layout, prefix_lens, kv_lens, kv_indptr, **sizes)
    found = read_plan(workspace, layout, bs, width)
    return found | {"kv_lens": kv_lens.tolist(), "kv_indptr": kv_indptr.tolist()}


def read_plan(workspace: torch.Tensor, layout: PlanLayout, bs: int, width: int) -> dict[str, Any]:
    """What the attention kernel would find in a plan for `bs` requests of `width` rows."""

    def ints(offset: int, size: int) -> list[int]:
        found: list[int] = workspace[offset : offset + 4 * size].view(torch.int32).tolist()
        return found

    valid = workspace[layout.valid_offset : layout.valid_offset + layout.num_ctas].tolist()
    count = sum(valid)
    assert valid == [1] * count + [0] * (layout.num_ctas - count)
    places = (layout.request_offset, layout.qo_tile_offset, layout.kv_tile_offset)
    return {
        "work": [list(item) for item in zip(*(ints(place, count) for place in places), strict=True)],
        "chunk": ints(layout.chunk_offset, 1)[0],
        "o_indptr": ints(layout.o_indptr_offset, bs + 1),
        "merge_indptr": ints(layout.merge_indptr_offset, bs * width + 1),
    }
