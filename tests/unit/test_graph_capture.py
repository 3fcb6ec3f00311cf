"""What is captured as CUDA graphs, and how often it runs before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_orthrus.passes.cuda_graphs import WARM_UPS, _skipping, as_in_plain_decoding


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
    sizes = [*range(1, 9), *range(10, 33, 2), *range(40, 65, 4), *range(72, 129, 8)]
    kept = as_in_plain_decoding(sizes)
    assert len(kept) < 0.65 * len(sizes)
    assert {1, 2, 4, 8, 16, 32, 64, 128} <= set(kept) <= set(sizes)
    assert as_in_plain_decoding([1, 2, 3]) == [1, 2, 3], "the largest stays"
    assert as_in_plain_decoding([1]) == [1]
