"""SGLang's FA3 backend over blocks: what its kernel is called with."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_orthrus.core import OrthrusBlockInput, Phase
from sglang_orthrus.passes.flash_attention import schedule_once_a_pass
from tests.kernels import importable_kernels

pytestmark = pytest.mark.contract

PAGE, PAGES, WIDTH, HEAD = 16, 8, 4, 8


class Kernel:
    """Stands in for FA3's: writes down its schedules, and what it is called with."""

    def __init__(self) -> None:
        self.schedules: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []

    def make_schedule(self, **kwargs: Any) -> int:
        self.schedules.append(kwargs)
        return len(self.schedules)

    def __call__(self, q: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.calls.append(kwargs)
        return q


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    with importable_kernels():
        from sglang.srt.layers.attention import flashattention_backend as module

        made = Kernel()
        monkeypatch.setattr(module, "flash_attn_with_kvcache", made)
        monkeypatch.setattr(module, "get_device_capability", lambda: (9, 0))
        settings: dict[str, dict[str, Any]] = {
            "get_parallel": {
                "attn_tp_size": 1,
                "attn_cp_size": 1,
                "enable_prefill_cp": False,
                "attn_dp_enabled": False,
            },
            "get_spec": {"speculative_eagle_topk": None, "speculative_num_draft_tokens": WIDTH},
            "get_exec": {"deterministic": SimpleNamespace(enable_deterministic_inference=False)},
            "get_model": {"is_embedding": False},
        }
        for name, values in settings.items():
            monkeypatch.setattr(module, name, partial(SimpleNamespace, **values))
        yield made


def _backend(kernel: Kernel, **values: Any) -> Any:
    """SGLang's of version 3, on a CPU."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

    cache = torch.zeros(PAGE * PAGES, 1, HEAD)
    model = SimpleNamespace(
        is_encoder_decoder=False,
        is_local_attention_model=False,
        context_len=PAGE * PAGES,
        attention_arch=AttentionArch.MHA,
        head_dim=HEAD,
        hf_text_config=SimpleNamespace(num_attention_heads=2),
        get_num_kv_heads=lambda tp_size: 1,
    )
    runner: Any = SimpleNamespace(
        model_config=model,
        sliding_window_size=None,
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(4, PAGE * PAGES, dtype=torch.int32), size=3),
        token_to_kv_pool=SimpleNamespace(get_kv_buffer=lambda layer_id: (cache, cache)),
        kv_cache_dtype=torch.bfloat16,
        kv_cache_dtype_str="auto",
        kv_index_translator=SimpleNamespace(is_translating=False, reads_are_translated=False),
        page_size=PAGE,
        is_draft_worker=False,
    )
    backend = FlashAttentionBackend(runner)
    vars(backend).update({"_get_scheduler_metadata": kernel.make_schedule} | values)
    return backend


def _plan(backend: Any, *, in_graph: bool = False) -> None:
    """Plan blocks of three requests, as SGLang does before a pass without a graph, or for the capture of one."""
    lens = torch.tensor([9, 17, 5])
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        spec_info=_block(Phase.VERIFY),
        batch_size=3,
        seq_lens=lens,
        seq_lens_cpu=lens,
        req_pool_indices=torch.arange(3),
        encoder_lens=None,
        kv_loc_plan=None,
    )
    if not in_graph:
        backend.init_forward_metadata(batch)
        return
    backend.init_cuda_graph_state(3, 3 * WIDTH)
    backend._bind_metadata_buffers(3, 3 * WIDTH, None, batch.forward_mode, batch.spec_info, "cpu")
    backend.forward_metadata = backend.target_verify_metadata[3]


def _attend(backend: Any, spec_info: Any, is_causal: bool) -> None:
    """Two layers of a pass."""
    mode = ForwardMode.EXTEND if spec_info is None else ForwardMode.TARGET_VERIFY
    batch = SimpleNamespace(forward_mode=mode, spec_info=spec_info, batch_size=3, encoder_lens=None)
    for layer_id in range(2):
        layer = SimpleNamespace(
            layer_id=layer_id,
            attn_type=AttentionType.DECODER if is_causal else AttentionType.ENCODER_ONLY,
            sliding_window_size=-1,
            is_cross_attention=False,
            tp_q_head_num=2,
            tp_k_head_num=1,
            tp_v_head_num=1,
            head_dim=HEAD,
            v_head_dim=HEAD,
            scaling=1.0,
            logit_cap=0.0,
            k_scale=None,
        )
        backend.forward_extend(torch.zeros(3 * WIDTH, 2 * HEAD), None, None, layer, batch, save_kv_cache=False)


def _block(phase: Phase) -> OrthrusBlockInput:
    return OrthrusBlockInput(draft_token=None, positions=None, draft_token_num=WIDTH, phase=phase)


def test_all_layers_of_a_pass_take_one_schedule(kernel: Kernel) -> None:
    """A draft pass has another one than a verify pass: work depends on causality."""
    backend = _backend(kernel)
    schedule_once_a_pass(backend)
    _plan(backend)
    _attend(backend, _block(Phase.DRAFT), is_causal=False)
    _attend(backend, _block(Phase.VERIFY), is_causal=True)
    assert [(call["scheduler_metadata"], call["causal"]) for call in kernel.calls] == [
        *((1, False), (1, False)),
        *((2, True), (2, True)),
    ]
    assert [schedule["causal"] for schedule in kernel.schedules] == [False, True]


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_schedule_is_made_of_what_the_kernel_gets(kernel: Kernel, in_graph: bool) -> None:
    """The kernel takes its longest context from the page table. Made for another one, a schedule may split further."""
    backend = _backend(kernel)
    schedule_once_a_pass(backend)
    _plan(backend, in_graph=in_graph)
    _attend(backend, _block(Phase.VERIFY), is_causal=True)
    (schedule,), call = kernel.schedules, kernel.calls[0]
    for name in ("cache_seqlens", "cu_seqlens_q", "max_seqlen_q", "num_splits", "causal"):
        assert schedule[name] is call[name], name
    assert schedule["batch_size"] == len(call["page_table"]) == 3
    longest = PAGES * PAGE if in_graph else 32  # 17 tokens and a block, in whole pages
    assert schedule["max_seqlen_k"] == call["page_table"].shape[1] * call["k_cache"].shape[1] == longest
    assert schedule["page_size"] == call["k_cache"].shape[1]
    assert (schedule["num_heads"], schedule["num_heads_k"], schedule["headdim"]) == (2, 1, HEAD)


def test_prefills_are_as_before(kernel: Kernel) -> None:
    backend = _backend(kernel)
    schedule_once_a_pass(backend)
    _plan(backend)
    _attend(backend, None, is_causal=True)
    assert not kernel.schedules and all("scheduler_metadata" not in call for call in kernel.calls)


@pytest.mark.parametrize(
    "values", [{"_get_scheduler_metadata": None}, {"_disable_scheduler_metadata_precompute": True}], ids=["FA4", "DP"]
)
def test_where_sglang_makes_no_schedules_neither_do_we(kernel: Kernel, values: dict[str, Any]) -> None:
    """FA4 takes none. Where attention is shared out to ranks SGLang has found them out of date."""
    backend = _backend(kernel, **values)
    schedule_once_a_pass(backend)
    _plan(backend)
    _attend(backend, _block(Phase.VERIFY), is_causal=True)
    assert not kernel.schedules and all("scheduler_metadata" not in call for call in kernel.calls)


def test_other_backends_are_left_alone() -> None:
    backend = SimpleNamespace()
    schedule_once_a_pass(backend)
    assert vars(backend) == {}
