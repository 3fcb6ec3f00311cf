"""What the patch for log probabilities does, and what `compat/logprobs.py` does without it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sglang.srt.layers import logprob_processor as stock
from sglang.srt.managers import schedule_batch
from sglang.srt.sampling.sampling_params import SamplingParams
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_orthrus.compat.logprobs import select_top_logprobs_per_request
from tests.patching import load, patched_module

pytestmark = pytest.mark.contract

VOCAB = 1000
LENS = [3, 0, 2, 4, 1, 2]
NUMS = [5, 7, 700, 0, VOCAB, 20]


class _Selected(TorchDispatchMode):
    """How many numbers the top-k operations gave while it is on."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.topk:
            self.count += result[0].numel()
        return result


@pytest.fixture(name="patched", params=["patch", "compat"])
def _patched(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param == "patch":
        return patched_module("0020", tmp_path, "logprob_processor")
    wrapped = load("wrapped_logprob_processor", Path(str(stock.__file__)))
    monkeypatch.setattr("sglang.srt.layers.logprob_processor", wrapped)
    select_top_logprobs_per_request()
    return wrapped


def _rows(num: int) -> torch.Tensor:
    return torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(num)).log_softmax(dim=-1)


def _decode(module: ModuleType, nums: list[int], on_device: bool) -> tuple[list[Any], list[Any]]:
    values, indices = module.get_top_logprobs(_rows(len(nums)), nums, no_copy_to_cpu=on_device)
    return ([x.tolist() for x in values], [x.tolist() for x in indices]) if on_device else (values, indices)


@pytest.mark.parametrize("on_device", [True, False])
@pytest.mark.parametrize("nums", [[5, 0, 20], [0, 0, 64], [VOCAB, 0, 5, 65], [100, 100]])
def test_outputs_get_the_same_top_logprobs(patched: ModuleType, nums: list[int], on_device: bool) -> None:
    for expected, got in zip(_decode(stock, nums, on_device), _decode(patched, nums, on_device), strict=True):
        for k, wanted, row in zip(nums, expected, got, strict=True):
            assert len(row) == k
            assert row == wanted


def _chunks(module: ModuleType, size: int, normalised: bool, as_spans: bool = False) -> tuple[list[Any], list[Any]]:
    """The prompts' top log probabilities, in chunks of `size` rows as SGLang's `InputLogprobProcessor` makes them.

    as_spans: as for a copy to pinned memory, finished as SGLang's `finalize_input_logprobs` does.
    """
    owners = [n for n, length in enumerate(LENS) for _ in range(length)]
    rows = _rows(len(owners))
    values: list[Any] = []
    indices: list[Any] = []
    split = 0
    for start in range(0, len(owners), size):
        chunk = rows[start : start + size]
        first, last = owners[start], owners[min(start + size, len(owners)) - 1]
        norm = stock.compute_row_log_normalizer(chunk) if normalised else None
        nums, lens = NUMS[first : last + 1], LENS[first : last + 1]
        split = module.get_top_logprobs_chunk(
            chunk, nums, lens, values, indices, split, log_normalizer=norm, copy_to_pinned_cpu=as_spans
        )
    if as_spans:
        values, indices = ([[row for span in x for row in span.tolist()] for x in table] for table in (values, indices))
    return values, indices


@pytest.mark.parametrize("as_spans", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("size", [100, 12, 5, 2, 1])
def test_prompts_get_the_same_top_logprobs(patched: ModuleType, size: int, normalised: bool, as_spans: bool) -> None:
    assert _chunks(patched, size, normalised, as_spans) == _chunks(stock, size, normalised)
    whole = [
        module.get_top_logprobs_raw(_rows(sum(LENS)), NUMS, stock.LogprobStage.PREFILL, LENS)
        for module in (stock, patched)
    ]
    assert whole[0] == whole[1]


def test_a_large_number_is_selected_from_its_own_rows_alone(patched: ModuleType) -> None:
    nums = [5] * 30 + [VOCAB, 0]
    with _Selected() as as_shipped:
        _decode(stock, nums, True)
    with _Selected() as selected:
        _decode(patched, nums, True)
    assert (as_shipped.count, selected.count) == (32 * VOCAB, 32 * 5 + VOCAB)
    with _Selected() as selected:
        _chunks(patched, 100, False)
    assert selected.count == sum(LENS) * 20 + 2 * 700 + VOCAB


def test_a_number_above_the_vocabulary_does_not_end_the_scheduler(patched: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="out of range"):
        _decode(stock, [3, VOCAB + 1], True)
    values, _ = _decode(patched, [3, VOCAB + 1], True)
    assert [len(row) for row in values] == [3, VOCAB]


def test_a_request_without_log_probabilities_asks_for_none(tmp_path: Path) -> None:
    patched = patched_module("0020", tmp_path, "schedule_batch")
    asked = {"top_logprobs_num": 9, "token_ids_logprob": [4]}
    for module, number, ids in ((schedule_batch, 9, [4]), (patched, 0, None)):
        silent = module.Req("id", "", [1], SamplingParams(), **asked).logprob
        assert (silent.top_logprobs_num, silent.token_ids_logprob) == (number, ids)
        wanted = module.Req("id", "", [1], SamplingParams(), return_logprob=True, **asked).logprob
        assert (wanted.top_logprobs_num, wanted.token_ids_logprob) == (9, [4])
