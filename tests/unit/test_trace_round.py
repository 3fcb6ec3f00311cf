"""What a trace is summed up to."""

from __future__ import annotations

from typing import Any

import pytest
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo

from benchmarks.speed.trace_round import ENDLESS, gaps, kind_of, summarise
from benchmarks.structured.cases import END, fast, nano


def test_gaps_are_where_nothing_runs() -> None:
    assert gaps([(0, 2), (1, 3), (5, 6), (5, 5.5), (7, 8)]) == [2, 1]
    assert gaps([(4, 12), (0, 10), (2, 3)]) == []


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<...>", "attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", "matrix products"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>>>", "argmax"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("fused_rope_kernel", "other"),
    ],
)
def test_kernels_are_sorted_by_name(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_pass_is_its_share_of_the_trace() -> None:
    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("kernel", "nvjet", 1000, 3000),
        event("kernel", "BatchPrefillWithPagedKVCache", 4000, 1000),
        event("gpu_memcpy", "Memcpy DtoH", 7000, 2000),
        event("cuda_runtime", "cudaGraphLaunch", 0, 10),
        event("cuda_runtime", "cudaEventSynchronize", 0, 10),
        event("cuda_runtime", "cudaEventSynchronize", 20, 10),
        {"ph": "M", "name": "process_name"},
    ]
    summary = summarise(events, passes=2)
    assert (summary["span_ms"], summary["busy_ms"], summary["idle_ms"]) == (4.0, 3.0, 1.0)
    assert summary["idle_in_short_gaps_ms"] == 0
    assert summary["kinds_ms"] == {"matrix products": 1.5, "copies": 1.0, "attention": 0.5}
    assert summary["kernels"] == 1.5
    assert summary["launches"] == {"cudaGraphLaunch": 0.5}
    assert summary["waits"] == {"cudaEventSynchronize": 1.0}


def test_a_traced_answer_never_ends() -> None:
    """It may say whatever it likes until it is cut off."""
    tokenizer, _ = nano()
    end = tokenizer.token_to_id(END)
    info = TokenizerInfo.from_huggingface(fast(tokenizer), stop_token_ids=[end])
    matcher = GrammarMatcher(GrammarCompiler(info).compile_grammar(ENDLESS))
    for token in tokenizer.encode('Größe: {"a": 1}\n', add_special_tokens=False).ids:
        assert not matcher.accept_token(end)
        assert matcher.accept_token(token)
