"""What is rehearsed before the server takes requests is the most that choosing takes; on a CPU, small."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_orthrus.cpu import kernels
from sglang_orthrus.sampling.memory import choose_once
from sglang_orthrus.sampling.request_groups import SAMPLED_ROWS
from tests.gpu.test_gpu_sampling_memory import HIDDEN, ONE_ASKS, OPTIONS, WIDTH, Head, choose
from tests.sampling import Peak

VOCAB = 3000


def _peak(*, are_seeded: bool, width: int = WIDTH) -> int:
    states = torch.zeros(SAMPLED_ROWS // width, width, HIDDEN)
    with Peak() as peak:
        choose_once(states, VOCAB, "pytorch", are_seeded=are_seeded)
    return peak.bytes


def test_no_group_of_requests_takes_more_than_the_rehearsed_one() -> None:
    """But for what each of 8 requests has for itself: states, counts, the bias and penalties that SGLang makes."""
    head: Any = Head(VOCAB, "cpu")
    rehearsed = _peak(are_seeded=False)
    own = 4 * 8 * VOCAB * 4 + 2**19
    for options in OPTIONS:
        for name in ("penalty", "penalty, bias and top_logprobs"):
            asked, top = ONE_ASKS[name]
            with Peak() as peak:
                choose(head, [options | asked] * 8, VOCAB, "cpu", "pytorch", [top] * 8)
            assert peak.bytes < rehearsed + own, (options, asked)


@pytest.mark.parametrize("width", [1, 8])
def test_narrow_rounds_take_no_more_than_what_is_rehearsed_for_all_widths(width: int) -> None:
    """But for what each request of two groups has for itself, as above."""
    head: Any = Head(VOCAB, "cpu")
    rehearsed = max(_peak(are_seeded=False, width=each) for each in (1, 8, WIDTH))
    requests = 2 * SAMPLED_ROWS // width
    own = 4 * requests * VOCAB * 4 + 2**19
    for options in OPTIONS:
        asked, top = ONE_ASKS["penalty, bias and top_logprobs"]
        with Peak() as peak:
            choose(head, [options | asked] * requests, VOCAB, "cpu", "pytorch", [top] * requests, width)
        assert peak.bytes < rehearsed + own, options


def test_a_seeded_server_rehearses_what_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.layers.sampler.murmur_hash32", kernels.murmur_hash32)
    assert _peak(are_seeded=True) > 3 * SAMPLED_ROWS * VOCAB * 4
