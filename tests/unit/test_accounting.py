"""What SGLang counts of a round: its own reporter, fed by its own processing of results."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter
from sglang.srt.managers.utils import GenerationBatchResult

from sglang_orthrus.compat.accounting import count_running_requests_only
from tests.sampling import request


class _Reporter:
    """The sums of SGLang's reporter, with its own code."""

    num_generated_tokens = spec_num_accept_tokens = spec_num_correct_drafts = spec_num_forward_ct = 0
    spec_num_block_accept_tokens = spec_num_cap_tokens = 0
    update_spec_metrics = SchedulerMetricsReporter.update_spec_metrics


def _count(self: Any, batch: Any, result: Any) -> None:
    """The lines of `process_batch_result_decode` that count."""
    result.num_correct_drafts = int(result.accept_lens.sum()) - len(batch.reqs)
    generated = result.get_num_generated_tokens(len(batch.reqs))
    self.metrics_reporter.num_generated_tokens += generated
    self.metrics_reporter.update_spec_metrics(len(batch.reqs), result.num_correct_drafts, num_accept_tokens=generated)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The processor and the reporter wrapped; what is reported."""
    found: list[str] = []
    monkeypatch.setattr(SchedulerBatchResultProcessor, "process_batch_result_decode", _count)
    monkeypatch.setattr(
        SchedulerMetricsReporter, "report_decode_stats", lambda self, *args, **kwargs: found.append("report")
    )
    count_running_requests_only()
    count_running_requests_only()
    return found


def _process(reporter: _Reporter, lens: list[int], ended: list[int], retracted: list[int] | None = None) -> None:
    reqs = [
        request({}, has_ended=row in ended, is_retracted=row in (retracted or []), finished_len=None)
        for row in range(len(lens))
    ]
    _take_in(reporter, reqs, lens)


def _take_in(reporter: _Reporter, reqs: list[Any], lens: list[int]) -> None:
    result = GenerationBatchResult(accept_lens=torch.tensor(lens))
    processor: Any = SimpleNamespace(metrics_reporter=reporter)
    SchedulerBatchResultProcessor.process_batch_result_decode(processor, SimpleNamespace(reqs=reqs), result)


def test_rows_of_ended_requests_are_not_counted(reports: list[str]) -> None:
    """A round that began before the last one's result was known emits tokens that nobody gets."""
    reporter = _Reporter()
    _process(reporter, [9, 32, 5, 7], ended=[1], retracted=[3])
    assert reporter.spec_num_forward_ct == 2
    assert reporter.num_generated_tokens == reporter.spec_num_accept_tokens == 14
    assert reporter.spec_num_correct_drafts == 12
    _process(reporter, [3], ended=[])
    assert (reporter.num_generated_tokens, reporter.spec_num_forward_ct) == (17, 3)


def test_a_round_that_accepts_nothing_by_design_counts_for_nothing(reports: list[str]) -> None:
    """All its requests have ended; between two reports there may be no other round, and SGLang divides by them."""
    reporter = _Reporter()
    _process(reporter, [1, 1], ended=[0, 1])
    assert reporter.num_generated_tokens == reporter.spec_num_forward_ct == reporter.spec_num_correct_drafts == 0
    SchedulerMetricsReporter.report_decode_stats(reporter, False)
    assert reports == []
    _process(reporter, [4, 1], ended=[1])
    SchedulerMetricsReporter.report_decode_stats(reporter, False)
    assert reports == ["report"]


def test_tokens_past_the_end_of_a_text_are_not_counted(reports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of 32 tokens may end a text with its third one."""
    generated = list[int]()
    reporter = _Reporter()
    reqs = [request({}, output_ids=[5] * said, finished_len=None) for said in (10, 20, 30)]
    _take_in(reporter, reqs, [32, 6, 9])
    for req, length, end in zip(reqs, [32, 6, 9], [13, None, 39], strict=True):
        req.output_ids = req.output_ids + [6] * length
        req.finished_len = end
    monkeypatch.undo()
    monkeypatch.setattr(
        SchedulerMetricsReporter,
        "report_decode_stats",
        lambda self, graph, num_generated_tokens=0: generated.append(num_generated_tokens),
    )
    count_running_requests_only()
    SchedulerMetricsReporter.report_decode_stats(reporter, False, num_generated_tokens=47)
    assert generated == [3 + 6 + 9]
    assert reporter.num_generated_tokens == reporter.spec_num_accept_tokens == 18
    assert reporter.spec_num_correct_drafts == 15
