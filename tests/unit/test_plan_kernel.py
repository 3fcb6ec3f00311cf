"""The plan that is made on the GPU, by Triton's interpreter, against FlashInfer's rules in plain Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

from sglang_orthrus.passes.plan_kernel import UNSPLIT, PlanLayout, max_split_work
from tests.unit.interpreted import plans

SHAPES = ((4, 8, 300), (4, 1, 600), (2, 2, 5000), (1, 16, 41_000), (8, 8, 20))  # group, key-value heads, longest prefix
WIDTHS = (12, 32)
BATCH_SIZES = (1, 3, 40)


def layout_for(bs: int, width: int, group: int, max_work: int, *, is_uniform: bool = False) -> PlanLayout:
    """A workspace as `PrefillPlan` divides it, arrays behind each other; is_uniform: `uniform_q_len` is `width`."""
    tile_rows = 128 if (width if is_uniform else bs * width - bs + 1) * group > 64 else 64
    num_tiles = bs * -(-width * group // tile_rows) if is_uniform else -(-bs * width * group // tile_rows) + bs - 1
    num_ctas = max(max_work, num_tiles)
    sizes = [num_ctas, num_ctas, num_ctas, bs * width + 1, bs + 1, 1]
    ends = [16 * (sum(-(-4 * size // 16) for size in sizes[: place + 1])) for place in range(len(sizes))]
    request, qo_tile, kv_tile, merge, o_indptr, chunk = [0, *ends[:-1]]
    valid = ends[-1]
    return PlanLayout(
        num_ctas, bs * width, 0, tile_rows, request, qo_tile, kv_tile, merge, o_indptr, chunk, 0, 0, valid, 1, 1
    )


def flashinfer_plan(
    kv_lens: Sequence[int],
    width: int,
    group: int,
    tile_rows: int,
    max_work: int,
    fine_chunk: int = 128,
    whole: int = 0,
    min_chunk: int = 128,
) -> dict[str, Any]:
    """`PrefillSplitQOKVIndptr`, step by step, but for finer chunks where they make little work, and whole requests."""
    tiles = -(-width * group // tile_rows)

    def count(chunk: int) -> int:
        return sum(-(-length // chunk) for length in kv_lens)

    low, high = min_chunk, max(kv_lens)
    while low < high:
        middle = (low + high) // 2
        if tiles * count(middle) > max_work:
            low = middle + 1
        else:
            high = middle
    if max(kv_lens) - low <= whole * len(kv_lens):
        low = max(low, *kv_lens)
    elif tiles * count(fine_chunk) <= max_work:
        low = fine_chunk
    work = []
    o_indptr, merge_indptr = [0], [0]
    for number, length in enumerate(kv_lens):
        chunks = -(-length // low)
        work += [[number, tile, chunk] for tile in range(tiles) for chunk in range(chunks)]
        for _ in range(width):
            merge_indptr.append(merge_indptr[-1] + chunks)
        o_indptr.append(o_indptr[-1] + width * chunks)
    return {"work": work, "chunk": low, "o_indptr": o_indptr, "merge_indptr": merge_indptr}


def cases() -> list[dict[str, Any]]:
    """Short and long prefixes, split and unsplit, with and without room for all."""
    found = []
    for bs in BATCH_SIZES:
        for width in WIDTHS:
            rng = random.Random(bs * width)
            for group, num_kv_heads, longest in SHAPES:
                max_work = max_split_work(132, num_kv_heads)
                layout = layout_for(bs, width, group, max_work)
                prefix_lens = [rng.randrange(1, longest) for _ in range(bs)]
                sizes: dict[str, Any] = {"width": width, "group": group, "max_work": max_work}
                sizes |= {"prefix_lens": prefix_lens, "min_chunk": 128}
                found += [
                    sizes | {"layout": layout, "fine_chunk": fine, "whole": whole}
                    for fine, whole in ((64, 35), (128, 0))
                ]
                uniform = layout_for(bs, width, group, max_work, is_uniform=True)
                found.append(sizes | {"layout": uniform, "fine_chunk": 64, "whole": 35, "min_chunk": UNSPLIT})
    return found


def test_the_plan_is_flashinfers(interpreter: Executor) -> None:
    for case, actual in zip(cases(), interpreter.submit(plans, cases()).result(), strict=True):
        width, layout = case["width"], case["layout"]
        names = ("max_work", "fine_chunk", "whole", "min_chunk")
        sizes = case["group"], layout.tile_rows, *(case[name] for name in names)
        lens = [length + width for length in case["prefix_lens"]]
        expected = flashinfer_plan(lens, width, *sizes)
        places = [sum(lens[:count]) for count in range(len(lens) + 1)]
        assert actual == expected | {"kv_lens": lens, "kv_indptr": places}


def test_an_unsplit_plan_gives_a_request_what_it_has_alone() -> None:
    """Under deterministic inference: one chunk, and the tile of a block, whoever else is in the batch."""
    for group, width in ((2, 32), (4, 32), (2, 12), (4, 12)):
        tiles = {layout_for(bs, width, group, 33, is_uniform=True).tile_rows for bs in (1, 2, 8, 48)}
        assert len(tiles) == 1
        plan = flashinfer_plan([44, 41_000, 300], width, group, tiles.pop(), 33, 64, 35, UNSPLIT)
        assert {chunk for _, _, chunk in plan["work"]} == {0}
    assert {layout_for(bs, 32, 2, 33).tile_rows for bs in (1, 2)} == {64, 128}, "FlashInfer's own choice"


def test_a_bound_half_as_large_makes_another_plan() -> None:
    """The reference of the test above depends on what it is to check."""
    one, other = (flashinfer_plan([9000, 400], 32, 4, 128, work) for work in (33, 16))
    assert one["chunk"] < other["chunk"]


def test_little_work_is_split_finer() -> None:
    """As far as FlashInfer's bound allows."""
    little, much = (flashinfer_plan([length], 32, 4, 128, 33, 64) for length in (2100, 2200))
    assert (little["chunk"], much["chunk"]) == (64, 128)


def test_many_short_requests_are_left_whole_and_long_ones_are_not() -> None:
    sizes = 32, 4, 128, 33, 64
    assert flashinfer_plan([544] * 12, *sizes)["chunk"] == 272
    assert flashinfer_plan([544] * 12, *sizes, 35)["chunk"] == 544
    for lens in ([2080] * 12, [544] * 4, [900, *[200] * 7]):
        assert flashinfer_plan(lens, *sizes, 35) == flashinfer_plan(lens, *sizes)
