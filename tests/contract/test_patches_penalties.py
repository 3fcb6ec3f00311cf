"""What the patch for the order of penalties does."""

from __future__ import annotations

from abc import ABCMeta
from itertools import permutations
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling import penaltylib, sampling_batch_info
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.patching import patched_module

pytestmark = pytest.mark.contract

VOCAB = 6
KINDS = (
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
    penaltylib.BatchedRepetitionPenalizer,
)
# Of a request that has emitted token 1 twice and token 2 once. Token 0 ends it, and it may not end yet.
LOGITS = [1.0, 4.0, -3.0, 0.5, -0.5, 2.0]
ADDITIVE_FIRST = [float("-inf"), (4.0 - 2 * 0.5 - 0.25) / 2, (-3.0 - 0.5 - 0.25) * 2, 0.5, -0.5, 2.0]
SCALED_FIRST = [float("-inf"), 4.0 / 2 - 2 * 0.5 - 0.25, -3.0 * 2 - 0.5 - 0.25, 0.5, -0.5, 2.0]


class _Addressed(ABCMeta):
    """Classes whose addresses are chosen: Python's small sets list them by it."""

    address = 0

    def __hash__(cls) -> int:
        return cls.address


class _Batch:
    """What SGLang reads of its `ScheduleBatch`."""

    def __init__(self) -> None:
        params = SamplingParams(
            temperature=0.0,
            frequency_penalty=0.5,
            presence_penalty=0.25,
            repetition_penalty=2.0,
            min_new_tokens=9,
            max_new_tokens=20,
        )
        params.normalize(object())
        self.device = "cpu"
        self.reqs = [Req("id", "", [3], params, vocab_size=VOCAB)]
        self.reqs[0].eos_token_ids = {0}
        self.reqs[0].tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=0)


def _without_overlap(module: ModuleType, addresses: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """LOGITS after the penalties, in a process that has the four classes at these addresses."""
    placed = {
        kind.__name__: _Addressed(kind.__name__, (kind,), {"address": address})
        for kind, address in zip(KINDS, addresses, strict=True)
    }
    own = SimpleNamespace(BatchedPenalizerOrchestrator=penaltylib.BatchedPenalizerOrchestrator, **placed)
    monkeypatch.setattr(module, "penaltylib", own)
    off = SimpleNamespace(
        deterministic=SimpleNamespace(enable_deterministic_inference=False),
        features=SimpleNamespace(enable_custom_logit_processor=False, enable_watermark=False),
    )
    monkeypatch.setattr(module, "get_exec", lambda: off)
    batch = _Batch()
    info = module.SamplingBatchInfo.from_schedule_batch(batch, VOCAB)
    for token in (1, 2, 1):
        info.penalizer_orchestrator.cumulate_output_tokens(torch.tensor([token]))
    logits = torch.tensor([LOGITS])
    info.apply_logits_bias(logits)
    found: list[float] = logits[0].tolist()
    return found


def test_penalties_act_in_one_order_in_every_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As shipped, a set of classes decides."""
    orders = list(permutations(range(4)))
    stock = [_without_overlap(sampling_batch_info, order, monkeypatch) for order in orders]
    assert ADDITIVE_FIRST in stock and SCALED_FIRST in stock, "SGLang has closed the gap: drop the patch"
    patched = patched_module("0023", tmp_path, "sampling_batch_info")
    assert [_without_overlap(patched, order, monkeypatch) for order in orders] == [ADDITIVE_FIRST] * len(orders)


def _in_order(orchestrator_class: Any, kinds: tuple[Any, ...]) -> list[float]:
    batch = _Batch()
    penalizers = orchestrator_class(VOCAB, batch, kinds)
    for token in (1, 2, 1):
        penalizers.cumulate_output_tokens(torch.tensor([token]))
    logits = torch.tensor([LOGITS])
    penalizers.apply(logits)
    found: list[float] = logits[0].tolist()
    return found


@pytest.mark.parametrize("kinds", list(permutations(KINDS)))
def test_additive_penalties_come_first(kinds: tuple[Any, ...], tmp_path: Path) -> None:
    """However they are listed, and as under overlap scheduling."""
    patched = patched_module("0023", tmp_path, "orchestrator").BatchedPenalizerOrchestrator
    assert _in_order(patched, kinds) == ADDITIVE_FIRST
