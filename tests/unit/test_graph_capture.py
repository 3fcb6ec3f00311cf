"""What is captured as CUDA graphs, and how often it runs before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_orthrus.passes.cuda_graphs import WARM_UPS, _skipping


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
