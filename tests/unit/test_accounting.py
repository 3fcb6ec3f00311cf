"""What SGLang counts of a round: its own reporter, fed as its own processing of results feeds it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter
from sglang.srt.managers.utils import GenerationBatchResult

from sglang_orthrus.compat.accounting import count_tokens_of_texts
from tests.sampling import request


class _Reporter:
    """The sums of SGLang's reporter, with its own code.

    Attributes:
        reported: num_generated_tokens of every report.
    """

    num_generated_tokens = spec_num_accept_tokens = spec_num_correct_drafts = spec_num_forward_ct = 0
    spec_num_block_accept_tokens = spec_num_cap_tokens = 0
    update_spec_metrics = SchedulerMetricsReporter.update_spec_metrics

    def __init__(self) -> None:
        self.reported: list[int] = []

    def report_decode_stats(self, *args: Any, **kwargs: Any) -> None:
        SchedulerMetricsReporter.report_decode_stats(self, *args, **kwargs)


def _process(self: Any, batch: Any, result: Any) -> None:
    """The lines of `process_batch_result_decode` that count, extend outputs and report, in their order."""
    lens = result.accept_lens.tolist()
    result.num_correct_drafts = sum(lens) - len(batch.reqs) * result.num_non_draft_tokens_per_req
    generated = result.get_num_generated_tokens(len(batch.reqs))
    self.metrics_reporter.num_generated_tokens += generated
    self.metrics_reporter.update_spec_metrics(len(batch.reqs), result.num_correct_drafts, num_accept_tokens=generated)
    for req, length in zip(batch.reqs, lens, strict=True):
        if not (req.finished() or req.is_retracted):
            req.output_ids = req.output_ids + [6] * length
            req.has_ended = req.ends_at is not None
            req.finished_len = req.ends_at
    self.metrics_reporter.report_decode_stats(False, running_batch=batch, num_generated_tokens=generated)


def _report(self: Any, graph: bool, running_batch: Any = None, num_generated_tokens: int = 0) -> None:
    self.reported.append(num_generated_tokens)


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor and the reporter wrapped."""
    monkeypatch.setattr(SchedulerBatchResultProcessor, "process_batch_result_decode", _process)
    monkeypatch.setattr(SchedulerMetricsReporter, "report_decode_stats", _report)
    count_tokens_of_texts()
    count_tokens_of_texts()


def _request(num_output: int = 0, ends_at: int | None = None, **state: bool) -> Any:
    """A request whose text ends at a length in this round, if it ends."""
    return request({}, output_ids=[5] * num_output, finished_len=None, ends_at=ends_at, **state)


def _round(reporter: _Reporter, reqs: list[Any], lens: list[int], **more: int) -> GenerationBatchResult:
    result = GenerationBatchResult(accept_lens=torch.tensor(lens), **more)
    processor: Any = SimpleNamespace(metrics_reporter=reporter)
    SchedulerBatchResultProcessor.process_batch_result_decode(processor, SimpleNamespace(reqs=reqs), result)
    return result


def test_rows_of_ended_requests_are_not_counted() -> None:
    """A round that began before the last one's result was known emits tokens that nobody gets."""
    reporter = _Reporter()
    reqs = [_request(), _request(has_ended=True), _request(), _request(is_retracted=True)]
    result = _round(reporter, reqs, [9, 32, 5, 7])
    assert reporter.reported == [14]
    assert reporter.spec_num_forward_ct == 2
    assert reporter.num_generated_tokens == reporter.spec_num_accept_tokens == 14
    assert reporter.spec_num_correct_drafts == 12
    # The scheduler asks again, for its report of load.
    assert result.get_num_generated_tokens(len(reqs)) == 14
    _round(reporter, [_request()], [3])
    assert (reporter.num_generated_tokens, reporter.spec_num_forward_ct) == (17, 3)


def test_a_round_whose_requests_have_all_ended_counts_for_nothing() -> None:
    """Between two reports there may be no other round, and SGLang divides by their rows."""
    reporter = _Reporter()
    _round(reporter, [_request(has_ended=True), _request(has_ended=True)], [1, 1])
    assert reporter.num_generated_tokens == reporter.spec_num_forward_ct == reporter.spec_num_correct_drafts == 0
    assert reporter.reported == []
    _round(reporter, [_request(), _request(has_ended=True)], [4, 1])
    assert reporter.reported == [4]


def test_tokens_past_the_end_of_a_text_are_not_counted() -> None:
    """A round of 32 tokens may end a text with its third one."""
    reporter = _Reporter()
    reqs = [_request(10, ends_at=13), _request(20), _request(30, ends_at=39)]
    result = _round(reporter, reqs, [32, 6, 9])
    assert reporter.reported == [3 + 6 + 9]
    assert reporter.num_generated_tokens == reporter.spec_num_accept_tokens == 18
    assert reporter.spec_num_correct_drafts == 15
    assert result.get_num_generated_tokens(len(reqs)) == 18


def test_a_round_without_drafts_is_left_to_sglang() -> None:
    reporter = _Reporter()
    reporter.spec_num_forward_ct = 1
    reporter.report_decode_stats(False, num_generated_tokens=5)
    assert reporter.reported == [5]


def test_every_step_of_plain_decoding_is_a_verify_pass() -> None:
    """And none of its tokens a draft. One text ends with the first of two, and one had ended before."""
    reporter = _Reporter()
    reqs = [_request(), _request(ends_at=1), _request(has_ended=True)]
    for req in reqs:
        req.spec_verify_ct, req.histogram = 0, []
        req.update_spec_correct_drafts_histogram = req.histogram.append
    result = _round(reporter, reqs, [2, 2, 2], num_non_draft_tokens_per_req=2)
    assert reporter.reported == [3] and reporter.spec_num_accept_tokens == reporter.num_generated_tokens == 3
    assert reporter.spec_num_forward_ct == 4 and reporter.spec_num_correct_drafts == 0
    assert result.get_num_generated_tokens(len(reqs)) == 3
    # SGLang adds the other pass.
    assert [(req.spec_verify_ct, req.histogram) for req in reqs] == [(1, [0]), (1, [0]), (0, [])]
