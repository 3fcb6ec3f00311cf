"""The plan made on the GPU against FlashInfer's own, array by array."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_orthrus.passes.flashinfer import BlockWrapper, OrthrusFlashInferBackend
from sglang_orthrus.passes.plan_kernel import MIN_CHUNK, UNSPLIT, PlanLayout, max_split_work, write_plan
from tests.unit.interpreted import read_plan

pytestmark = pytest.mark.gpu

HEAD_DIM = 128


def _planned(prefix_lens: torch.Tensor, width: int, num_heads: int, num_kv_heads: int) -> tuple[Any, torch.Tensor]:
    """FlashInfer's wrapper with its plan for blocks behind prefixes, and where each request's pages begin."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    def ints(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device="cuda")

    bs, lens = len(prefix_lens), prefix_lens + width
    num_pages = int(lens.sum())
    kv_indptr = ints(bs + 1)
    kv_indptr[1:] = lens.cumsum(0)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(1 << 30, dtype=torch.uint8, device="cuda"),
        "NHD",
        use_cuda_graph=True,
        backend="fa2",
        qo_indptr_buf=ints(bs + 1),
        paged_kv_indptr_buf=ints(bs + 1),
        paged_kv_indices_buf=ints(num_pages),
        paged_kv_last_page_len_buf=ints(bs) + 1,
    )
    wrapper.plan(
        torch.arange(0, (bs + 1) * width, width, dtype=torch.int32, device="cuda"),
        kv_indptr,
        torch.arange(num_pages, dtype=torch.int32, device="cuda"),
        ints(bs) + 1,
        num_heads,
        num_kv_heads,
        HEAD_DIM,
        1,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    return wrapper, kv_indptr


@pytest.mark.parametrize("bs", [1, 2, 3, 8, 33, 128])
@pytest.mark.parametrize("width", [12, 32])
def test_the_plan_is_flashinfers(bs: int, width: int) -> None:
    rng = random.Random(bs * width)
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    for num_heads, num_kv_heads, longest in ((32, 8, 400), (16, 8, 5000), (32, 8, 40_000)):
        prefix_lens = torch.tensor([rng.randrange(1, longest) for _ in range(bs)], device="cuda")
        wrapper, kv_indptr = _planned(prefix_lens, width, num_heads, num_kv_heads)
        layout, workspace = PlanLayout(*wrapper._plan_info), wrapper._int_workspace_buffer
        expected = read_plan(workspace, layout, bs, width)
        constants = workspace[layout.total_rows_offset : layout.total_rows_offset + 4].clone()
        workspace.fill_(1)
        ours = torch.zeros(bs, dtype=torch.int32, device="cuda"), torch.zeros_like(kv_indptr)
        write_plan(
            workspace,
            layout,
            prefix_lens,
            *ours,
            width=width,
            group=num_heads // num_kv_heads,
            max_work=max_split_work(num_sms, num_kv_heads),
            fine_chunk=MIN_CHUNK,
            whole=0,
        )
        assert read_plan(workspace, layout, bs, width) == expected
        assert ours[0].tolist() == (prefix_lens + width).tolist()
        assert ours[1].tolist() == kv_indptr.tolist()
        # What no plan of ours touches is the same in every plan of the size.
        assert constants.view(torch.int32).item() == bs * width


@pytest.mark.parametrize("lens", [[40], [300, 5000, 33, 40]])
def test_every_row_of_an_output_is_written(lens: list[int]) -> None:
    """Padded requests included, whose blocks have no prefix: an output need not be zeroed."""
    width, num_heads, num_kv_heads = 32, 32, 8
    prefix_lens = torch.tensor([*lens, 0], device="cuda")
    wrapper, kv_indptr = _planned(prefix_lens, width, num_heads, num_kv_heads)
    bs, num_pages = len(prefix_lens), int(kv_indptr[-1])
    _write(wrapper, prefix_lens, kv_indptr, width, num_heads, num_kv_heads)
    q = torch.randn(bs * width, num_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    cache = tuple(torch.randn(num_pages, 1, num_kv_heads, HEAD_DIM, dtype=q.dtype, device="cuda") for _ in range(2))
    expected = wrapper.run(q, cache)
    wrapper.__class__ = BlockWrapper
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # What the output finds in its memory: nothing that a kernel could make good use of.
        torch.full_like(q, float("nan"))
        out = wrapper.run(q, cache)
    graph.replay()
    assert torch.equal(out, expected)


def _write(
    wrapper: Any,
    prefix_lens: torch.Tensor,
    kv_indptr: torch.Tensor,
    width: int,
    num_heads: int,
    num_kv_heads: int,
    **options: Any,
) -> None:
    """Our plan in the wrapper's place for one."""
    write_plan(
        wrapper._int_workspace_buffer,
        PlanLayout(*wrapper._plan_info),
        prefix_lens,
        torch.zeros(len(prefix_lens), dtype=torch.int32, device="cuda"),
        kv_indptr,
        width=width,
        group=num_heads // num_kv_heads,
        max_work=max_split_work(torch.cuda.get_device_properties(0).multi_processor_count, num_kv_heads),
        **options,
    )


def _whole(prefix_lens: torch.Tensor, width: int, num_heads: int, num_kv_heads: int) -> Any:
    """A wrapper for graphs as deterministic inference plans it: one chunk, and the tile of a block."""
    wrapper, kv_indptr = _planned(prefix_lens, width, num_heads, num_kv_heads)
    bs = len(prefix_lens)
    backend = object.__new__(OrthrusFlashInferBackend)
    backend.prefill_cuda_graph_metadata = {bs: [wrapper]}
    backend.indices_updater_prefill = SimpleNamespace(
        num_qo_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=HEAD_DIM
    )
    backend._fix_tiles(SimpleNamespace(batch_size=bs, spec_info=SimpleNamespace(draft_token_num=width)))
    _write(wrapper, prefix_lens, kv_indptr, width, num_heads, num_kv_heads, min_chunk=UNSPLIT)
    return wrapper


@pytest.mark.parametrize("num_heads", [16, 32])
@pytest.mark.parametrize("width", [12, 32])
def test_unsplit_blocks_attend_bit_by_bit_as_alone(num_heads: int, width: int) -> None:
    """In a graph of their own, in one with seven others, and without a graph."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    num_kv_heads = 8
    prefix_lens = torch.tensor([300, 5000, 33, 40, 2000, 100, 7, 1024], device="cuda")
    bs, lens = len(prefix_lens), prefix_lens + width
    starts = [0, *lens.cumsum(0).tolist()]
    q = torch.randn(bs * width, num_heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    cache = tuple(torch.randn(starts[-1], 1, num_kv_heads, HEAD_DIM, dtype=q.dtype, device="cuda") for _ in range(2))
    for causal in (False, True):
        together = _whole(prefix_lens, width, num_heads, num_kv_heads)
        together._causal = causal
        expected = together.run(q, cache)
        for number in range(bs):
            alone = _whole(prefix_lens[number : number + 1], width, num_heads, num_kv_heads)
            alone._causal = causal
            rows = slice(number * width, (number + 1) * width)
            pages = tuple(part[starts[number] : starts[number + 1]] for part in cache)
            assert torch.equal(alone.run(q[rows], pages), expected[rows]), f"request {number}"
        eager = BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(1 << 28, dtype=torch.uint8, device="cuda"), "NHD", backend="fa2"
        )
        kv_indptr = torch.tensor(starts, dtype=torch.int32, device="cuda")
        eager.plan(
            torch.arange(0, (bs + 1) * width, width, dtype=torch.int32, device="cuda"),
            kv_indptr,
            torch.arange(starts[-1], dtype=torch.int32, device="cuda"),
            torch.ones(bs, dtype=torch.int32, device="cuda"),
            num_heads,
            num_kv_heads,
            HEAD_DIM,
            1,
            causal=causal,
            q_data_type=q.dtype,
            kv_data_type=q.dtype,
            disable_split_kv=True,
        )
        assert torch.equal(eager.run(q, cache), expected)
