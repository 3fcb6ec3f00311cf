"""The wrapping of SGLang's FlashInfer backend, on a backend that only keeps account."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.attention.hybrid_attn_backend import HybridAttnBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_orthrus.passes import flashinfer as flashinfer_plans
from sglang_orthrus.passes.flashinfer import (
    bound_indices,
    fit,
    keep_blocks_whole,
    set_workspace_size,
    share_plans,
    verifying,
    workspace_bytes,
)


class _Wrapper:
    """FlashInfer's, as far as outputs go: it makes one of zeros, or takes one of the planned type."""

    _cached_o_data_type: torch.dtype | None = None

    def run(self, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            return torch.zeros_like(q)
        assert out.dtype is self._cached_o_data_type
        assert out.data_ptr() != q.data_ptr()
        return out.copy_(q + cache)


class _Backend:
    """As much of `FlashInferAttnBackend` as is wrapped."""

    def __init__(self) -> None:
        self.prefill_cuda_graph_metadata: dict[int, list[_Wrapper]] = {}
        self.forward_metadata: Any = None
        self.req_to_token_pool = SimpleNamespace(req_to_token=torch.zeros(9, 1000))
        self.workspace_buffer = torch.zeros(1)
        self.allocated: Any = None

    def _prepare_cuda_graph_metadata(self, bs: int, num_tokens: int, forward_mode: Any, spec_info: Any) -> None:
        self.prefill_cuda_graph_metadata[bs] = [_Wrapper()]
        self.forward_metadata = "new"

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, kv_indices_buf: Any = None) -> None:
        self.allocated = (max_bs, max_num_tokens, kv_indices_buf)


def test_the_graphs_of_a_batch_size_share_wrappers() -> None:
    """Stock, the second capture of a size makes new ones, and the first graph replays with a stale plan."""
    backend = _Backend()
    share_plans(backend)
    backend._prepare_cuda_graph_metadata(4, 128, ForwardMode.TARGET_VERIFY, None)
    first = backend.prefill_cuda_graph_metadata[4]
    backend._prepare_cuda_graph_metadata(2, 64, ForwardMode.TARGET_VERIFY, None)
    backend._prepare_cuda_graph_metadata(4, 128, ForwardMode.TARGET_VERIFY, None)
    assert backend.prefill_cuda_graph_metadata[4] is first
    assert backend.forward_metadata.prefill_wrappers is first
    assert not backend.forward_metadata.use_ragged


def test_an_output_is_not_zeroed_first() -> None:
    backend = _Backend()
    share_plans(backend)
    for _ in range(2):
        backend._prepare_cuda_graph_metadata(4, 128, ForwardMode.TARGET_VERIFY, None)
    (wrapper,) = backend.prefill_cuda_graph_metadata[4]
    q = torch.ones(4, 2, dtype=torch.bfloat16)
    assert torch.equal(wrapper.run(q, q), q + q)
    assert torch.equal(q, torch.ones_like(q))


def test_indices_are_bounded_by_the_requests_and_no_mask_is_allocated() -> None:
    backend = _Backend()
    bound_indices(backend)
    backend.init_cuda_graph_state(8, 256)
    max_bs, mask_tokens, indices = backend.allocated
    assert (max_bs, mask_tokens) == (8, 0)
    assert indices.dtype is torch.int32
    # Stock: 256 rows of 1000. A block appears twice in what the planner asks for.
    assert indices.numel() == 8 * 1000 + 2 * 256


def test_the_workspace_grows_with_the_rows_of_a_batch() -> None:
    small = workspace_bytes(1, 32, 32, 8, 128)
    large = workspace_bytes(512, 32, 32, 8, 128)
    assert small == 512 * 1024**2
    # 512 query tiles at least, each 32 rows of fp32 partial results and a log-sum for 32 heads.
    assert large > max(small, 512 * 32 * 32 * (128 + 1) * 4)


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
def test_of_unlike_backends_the_one_that_verifies_is_fitted(
    verifies_by_decode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang wraps both; FlashInfer's graphs would replay with the lengths of their capture."""
    fitted: dict[str, list[Any]] = {"planned": [], "bounded": [], "shared": []}

    def plan(backend: Any) -> None:
        fitted["planned"].append(backend)
        backend.needs_cpu_seq_lens = False

    monkeypatch.setattr(flashinfer_plans, "plan_in_graphs", plan)
    monkeypatch.setattr(flashinfer_plans, "share_plans", fitted["shared"].append)
    monkeypatch.setattr(flashinfer_plans, "bound_indices", fitted["bounded"].append)
    flashinfer = object.__new__(FlashInferAttnBackend)
    flashinfer.enable_deterministic = False
    other: Any = SimpleNamespace(needs_cpu_seq_lens=False)
    verifies = _hybrid(other, flashinfer, verifies_by_decode=True)
    idle = _hybrid(other, flashinfer, verifies_by_decode=False)
    backend = verifies if verifies_by_decode else idle
    assert verifying(backend) is (flashinfer if verifies_by_decode else other)
    fit(backend)
    assert fitted["bounded"] == [flashinfer], "SGLang allocates its indices even where it does not verify"
    assert fitted["planned"] == fitted["shared"] == [flashinfer] * verifies_by_decode
    assert not backend.needs_cpu_seq_lens


def test_under_deterministic_inference_a_pass_without_a_graph_splits_nothing() -> None:
    planned: list[dict[str, Any]] = []
    wrapper = SimpleNamespace(begin_forward=lambda *args, **kwargs: planned.append(kwargs))
    keep_blocks_whole(SimpleNamespace(prefill_wrappers_verify=[wrapper]))
    wrapper.begin_forward("rows", fixed_split_size=None)
    assert planned == [{"fixed_split_size": None, "disable_split_kv": True}]
