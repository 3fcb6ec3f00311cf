"""Our FlashInfer backend, as far as it goes without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from sglang.srt.environ import envs
from sglang.srt.layers.attention import attention_registry
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_orthrus.passes import flashinfer as module
from sglang_orthrus.passes.attention import (
    int_workspace_bytes,
    plans_in_graphs,
    register_flashinfer,
    set_workspace_size,
    verifying,
    wait_only_for_verifying,
    workspace_bytes,
)
from sglang_orthrus.passes.flashinfer import BlockWrapper, OrthrusFlashInferBackend
from sglang_orthrus.passes.plan_kernel import MIN_CHUNK, UNSPLIT, max_split_work


def _backend(**values: Any) -> OrthrusFlashInferBackend:
    """One without a runner: its constructor makes wrappers, which need a GPU."""
    backend = object.__new__(OrthrusFlashInferBackend)
    backend.__dict__.update(
        {
            "prefill_cuda_graph_metadata": {},
            "num_wrappers": 1,
            "prefill_backend": "fa2",
            "workspace_buffer": torch.zeros(1),
            "kv_indptr": [torch.zeros(9)],
            "cuda_graph_qo_indptr": [torch.zeros(9)],
            "cuda_graph_kv_indices": [torch.zeros(9)],
            "kv_last_page_len": torch.ones(8),
            "enable_deterministic": False,
            **values,
        }
    )
    return backend


def test_every_flashinfer_backend_that_sglang_makes_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also each of two, if prefill and decode have unlike backends."""
    made: list[tuple[Any, Any]] = []

    def init(self: Any, runner: Any, init_new_workspace: bool) -> None:
        made.append((runner, init_new_workspace))

    monkeypatch.setattr(OrthrusFlashInferBackend, "__init__", init)
    monkeypatch.setitem(attention_registry.ATTENTION_BACKENDS, "flashinfer", None)
    register_flashinfer()
    runner = SimpleNamespace(init_new_workspace=True)
    backend = attention_registry.ATTENTION_BACKENDS["flashinfer"](runner)
    assert isinstance(backend, OrthrusFlashInferBackend) and made == [(runner, True)]


def test_the_graphs_of_a_batch_size_share_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang makes new ones for the second capture of a size, and the first graph replays with a stale plan."""
    monkeypatch.setattr(BlockWrapper, "__init__", lambda self, *args, **kwargs: None)
    integers: list[torch.Tensor] = []
    monkeypatch.setattr(BlockWrapper, "reset_workspace_buffer", lambda self, floats, ints: integers.append(ints))
    backend = _backend(_width=32, _group=4, _max_work=33)
    backend._prepare_cuda_graph_metadata(4, 128, ForwardMode.TARGET_VERIFY, None)
    first = backend.prefill_cuda_graph_metadata[4]
    backend._prepare_cuda_graph_metadata(2, 64, ForwardMode.TARGET_VERIFY, None)
    assert backend.prefill_cuda_graph_metadata[2] is not first
    backend._prepare_cuda_graph_metadata(4, 128, ForwardMode.TARGET_VERIFY, None)
    assert backend.prefill_cuda_graph_metadata[4] is first
    metadata: Any = backend.forward_metadata
    assert metadata.prefill_wrappers is first and not metadata.use_ragged
    assert [tensor.numel() for tensor in integers] == [int_workspace_bytes(bs, 32, 4, 33) for bs in (4, 2)]


def test_an_output_is_not_zeroed_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer makes an output of zeros, or takes one of the planned type."""

    def run(self: Any, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        assert out is not None and out.dtype is self._cached_o_data_type
        assert out.data_ptr() != q.data_ptr()
        return out.copy_(q + cache)

    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "run", run)
    wrapper = object.__new__(BlockWrapper)
    q = torch.ones(4, 2, dtype=torch.bfloat16)
    assert torch.equal(wrapper.run(q, q), q + q)
    assert torch.equal(q, torch.ones_like(q))


@pytest.mark.parametrize("keeps_whole", [False, True])
def test_under_deterministic_inference_a_pass_without_a_graph_splits_nothing(
    keeps_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[dict[str, Any]] = []
    monkeypatch.setattr(
        BatchPrefillWithPagedKVCacheWrapper, "plan", lambda self, *args, **kwargs: planned.append(kwargs)
    )
    wrapper = object.__new__(BlockWrapper)
    wrapper.keeps_whole = keeps_whole
    wrapper.begin_forward("rows", fixed_split_size=None)
    assert planned == [{"fixed_split_size": None} | ({"disable_split_kv": True} if keeps_whole else {})]


def test_indices_are_bounded_by_the_requests_and_no_mask_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated: list[Any] = []
    monkeypatch.setattr(FlashInferAttnBackend, "init_cuda_graph_state", lambda self, *sizes: allocated.extend(sizes))
    backend = _backend(req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(9, 1000)))
    backend.init_cuda_graph_state(8, 256)
    max_bs, mask_tokens, indices = allocated
    assert (max_bs, mask_tokens) == (8, 0)
    assert indices.dtype is torch.int32
    # SGLang's: 256 rows of 1000. A block appears twice in what the planner asks for.
    assert indices.numel() == 8 * 1000 + 2 * 256


def test_replays_leave_the_host_alone_and_captures_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(
        FlashInferAttnBackend,
        "init_forward_metadata_out_graph",
        lambda self, batch, in_capture: calls.append((batch.forward_mode, in_capture)),
    )
    backend = _backend()
    verify, decode = (SimpleNamespace(forward_mode=mode) for mode in (ForwardMode.TARGET_VERIFY, ForwardMode.DECODE))
    backend.init_forward_metadata_out_graph(verify, in_capture=True)
    backend.init_forward_metadata_out_graph(verify)
    backend.init_forward_metadata_out_graph(decode)
    assert calls == [(ForwardMode.TARGET_VERIFY, True), (ForwardMode.DECODE, False)]


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_a_graph_begins_with_its_plan_and_its_page_indices(
    is_deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the batch's lengths with the block, on the wrapper of its size."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    planned: list[Any] = []
    packed: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "write_plan", lambda *args, **kwargs: planned.append((args, kwargs)))
    wrapper = SimpleNamespace(
        _plan_info=range(15),
        _int_workspace_buffer="workspace",
        _paged_kv_indptr_buf=torch.zeros(3),
        _paged_kv_indices_buf="indices",
    )
    backend = _backend(
        prefill_cuda_graph_metadata={2: [wrapper]},
        indices_updater_prefill=SimpleNamespace(num_qo_heads=32, num_kv_heads=8),
        kv_index_translator=SimpleNamespace(pack_read_stream=lambda plan, **rest: packed.append(rest)),
        enable_deterministic=is_deterministic,
    )
    backend._init_planner()
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        batch_size=2,
        seq_lens=torch.tensor([5, 7, 99]),
        req_pool_indices=torch.tensor([1, 2, 9]),
        kv_loc_plan=None,
        spec_info=SimpleNamespace(draft_token_num=8),
    )
    backend.init_forward_metadata_in_graph(batch)
    ((args, kwargs),) = planned
    assert args[0] == "workspace" and args[2].tolist() == [5, 7]
    assert kwargs == {
        "width": 8,
        "group": 4,
        "max_work": 33,
        "min_chunk": UNSPLIT if is_deterministic else MIN_CHUNK,
    }
    assert packed[0]["req_pool_indices"].tolist() == [1, 2]
    assert packed[0]["out"] == "indices" and packed[0]["seq_lens"] is args[3] and packed[0]["indptr"] is args[4]


def test_the_workspace_grows_with_the_rows_of_a_batch() -> None:
    small = workspace_bytes(1, 32, 32, 8, 128)
    large = workspace_bytes(512, 32, 32, 8, 128)
    assert small == 512 * 1024**2
    # 512 query tiles at least, each 32 rows of fp32 partial results and a log-sum for 32 heads.
    assert large > max(small, 512 * 32 * 32 * (128 + 1) * 4)


@pytest.mark.parametrize(("bs", "width", "group"), [(1, 1, 4), (3, 4, 2), (8, 32, 4), (256, 1, 4), (128, 8, 8)])
def test_the_integers_of_a_plan_fit_whatever_the_tile(bs: int, width: int, group: int) -> None:
    """FlashInfer's own count of work items, for the tiles that it may choose; and 8 MB are saved."""
    max_work = max_split_work(132, 8)
    for tile in (16, 64, 128):
        padded = max(max_work, -(-bs * width * group // tile) + bs - 1)
        arrays = [4 * padded] * 3 + [4 * (bs + 1), 4, 4, 4 * (bs * width + 1), padded]
        end = 0
        for size in arrays:
            end = -(-end // 16) * 16 + size
        assert end <= int_workspace_bytes(bs, width, group, max_work) < 1 << 17


def test_a_workspace_size_that_the_user_set_stays() -> None:
    with envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.override(123):
        set_workspace_size(456)
        assert envs.SGLANG_FLASHINFER_WORKSPACE_SIZE.get() == 123


def _hybrid(prefill: Any, decode: Any, *, verifies_by_decode: bool) -> Any:
    backend = object.__new__(HybridAttnBackend)
    backend.prefill_backend, backend.decode_backend = prefill, decode
    backend.spec_attn_is_decode = verifies_by_decode
    backend.needs_cpu_seq_lens = True
    return backend


@pytest.mark.parametrize("verifies_by_decode", [False, True])
@pytest.mark.parametrize("other_needs_lens", [False, True])
def test_of_unlike_backends_the_one_that_verifies_decides(verifies_by_decode: bool, other_needs_lens: bool) -> None:
    flashinfer = _backend()
    other: Any = SimpleNamespace(needs_cpu_seq_lens=other_needs_lens)
    backend = _hybrid(other, flashinfer, verifies_by_decode=verifies_by_decode)
    assert verifying(backend) is (flashinfer if verifies_by_decode else other)
    assert plans_in_graphs(backend) is verifies_by_decode
    wait_only_for_verifying(backend)
    assert backend.needs_cpu_seq_lens is (other_needs_lens and not verifies_by_decode)
