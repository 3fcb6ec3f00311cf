"""What is captured as CUDA graphs, and how often it runs before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.runtime_context import _ConfigBag

from sglang_orthrus.core import Phase
from sglang_orthrus.passes import cuda_graphs
from sglang_orthrus.passes.cuda_graphs import (
    MOST_ROWS,
    WARM_UPS,
    LargestGraphRunner,
    NarrowGraphRunner,
    OrthrusGraphRunner,
    _captured_input,
    _skipping,
    as_in_plain_decoding,
    worthwhile,
)

SIZES = [*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 257, 8)]


@pytest.mark.parametrize("skipped", range(WARM_UPS + 1))
def test_the_first_warm_ups_are_left_out_and_the_capture_never(skipped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    is_capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    calls = list[bool]()

    def forward() -> Any:
        calls.append(is_capturing)

    run = _skipping(forward, skipped)
    for _ in range(WARM_UPS):
        run()
    is_capturing = True
    run()
    assert calls == [False] * (WARM_UPS - skipped) + [True]


def test_a_capture_without_warm_ups_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    calls = list[int]()
    _skipping(lambda: calls.append(1), WARM_UPS)()
    assert calls


def test_narrow_widths_have_graphs_of_the_sizes_of_plain_decoding() -> None:
    kept = as_in_plain_decoding(SIZES)
    assert len(kept) < 0.75 * len(SIZES)
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256} <= set(kept) <= set(SIZES)
    assert as_in_plain_decoding([1, 2, 3]) == [1, 2, 3], "the largest stays"
    assert as_in_plain_decoding([1]) == [1]


def test_rounds_of_many_rows_are_not_captured() -> None:
    assert worthwhile(SIZES, 1) == SIZES, "plain decoding is always worth it"
    for width in (8, 16, 32):
        assert worthwhile(SIZES, width)[-1] == MOST_ROWS // width
    assert worthwhile([500], 32) == [500], "a runner has one graph at least"


@pytest.mark.parametrize(
    ("named", "no_padding", "is_narrow", "expected"),
    [
        (None, False, False, [*range(1, 9), 12, 16, 24, 32]),
        (None, False, True, [1, 2, 4, 8, 12, 16, 24, 32]),
        ([3, 200], False, True, [3, 200]),
        (None, True, True, SIZES),
    ],
)
def test_each_of_several_widths_has_fewer_graphs_unless_sizes_are_named(
    named: list[int] | None,
    no_padding: bool,
    is_narrow: bool,
    expected: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = _ConfigBag("exec.graph")
    graph._set("cuda_graph_config", CudaGraphConfig(decode=PhaseConfig(bs=named or SIZES)))
    graph._set("cuda_graph_bs_decode", named)
    graph._set("disable_cuda_graph_padding", no_padding)
    found = list[list[int]]()

    def init(self: OrthrusGraphRunner, runner: Any, **kwargs: Any) -> None:
        found.append(graph.cuda_graph_config.decode.bs)

    monkeypatch.setattr(cuda_graphs, "get_exec", lambda: SimpleNamespace(graph=graph))
    monkeypatch.setattr(cuda_graphs, "get_spec", lambda: SimpleNamespace(speculative_num_draft_tokens=32))
    monkeypatch.setattr(OrthrusGraphRunner, "__init__", init)
    (NarrowGraphRunner if is_narrow else LargestGraphRunner)(None)
    assert found == [expected]
    assert graph.cuda_graph_config.decode.bs == (named or SIZES), "the next width begins with all of them"


@pytest.mark.parametrize(
    ("width", "fused"), [(1, [1, 2, 4, 8, 16, 32, 64, 128]), (8, [1, 2, 4, 8, 16, 32]), (32, [1, 2, 4, 8])]
)
def test_whole_rounds_that_draft_have_graphs_where_they_are_short(
    width: int, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is padded to the next size, and runs in two graphs if that one has none for a whole round."""
    monkeypatch.setattr(DecodeCudaGraphRunner, "can_run_graph", lambda self, batch: batch.batch_size <= 128)
    runner = object.__new__(OrthrusGraphRunner)
    runner.captured_req_width = width
    runner.capture_bs = [1, 2, 4, 8, 16, 32, 64, 128]

    def can_run(phase: Phase, size: int) -> bool:
        batch: Any = SimpleNamespace(spec_info=_captured_input(phase, width), batch_size=size)
        return runner.can_run_graph(batch)

    for size in range(1, 140):
        assert can_run(Phase.ROUND, size) == (size <= fused[-1])
        assert can_run(Phase.VERIFY, size) == (size <= 128)
        assert can_run(Phase.DRAFT, size) == (size <= 128 and width > 1)
    assert [size for size in runner.capture_bs if runner.phases(size)[0] is Phase.ROUND] == fused
