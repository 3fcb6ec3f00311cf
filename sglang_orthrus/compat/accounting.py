"""What SGLang reports of rounds: tokens that somebody gets.

Under overlap scheduling a round begins before the former one's result is known, so it runs once more for requests that
ended there. And a round may run past the end of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from sglang_orthrus.compat.ledger import Touch
from sglang_orthrus.compat.scheduler import _wrap_once

ACCOUNTING_TOUCHES: tuple[Touch, ...] = (
    Touch(
        "sglang.srt.managers.scheduler_components.batch_result_processor:"
        "SchedulerBatchResultProcessor.process_batch_result_decode",
        ("batch", "result"),
        "wrapped, so that rows of ended and retracted requests are left out of what is counted",
        "it counts all rows of a batch, and skips those when it hands tokens out",
        "it counts what it hands out",
    ),
    Touch(
        "sglang.srt.managers.utils:GenerationBatchResult.get_num_generated_tokens",
        ("batch_size",),
        "replaced on the result of such a round",
        "as above",
        "as above",
    ),
    Touch(
        "sglang.srt.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter.report_decode_stats",
        ("can_run_cuda_graph", "running_batch", "num_generated_tokens"),
        "wrapped, so that it reports nothing where nothing was counted",
        "it divides by the number of rows, and tokens past the end of a text are known by then",
        "as above",
    ),
    Touch(
        "sglang.srt.managers.scheduler_components.metrics_reporter:SchedulerMetricsReporter.update_spec_metrics",
        ("bs", "num_correct_drafts", "num_accept_tokens"),
        "the two sums that it adds every row to, spec_num_forward_ct and spec_num_correct_drafts, are lowered before",
        "as above",
        "as above",
    ),
)


def count_running_requests_only() -> None:
    """Leave ended and retracted requests out of accept lengths and throughput.

    Must run in the scheduler process; a second call changes nothing.
    """
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
    from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter

    def counted(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def process_batch_result_decode(self: Any, batch: Any, result: Any) -> None:
            if result.accept_lens is None:
                stock(self, batch, result)
                return
            reporter = self.metrics_reporter
            if result.copy_done is not None:
                result.copy_done.synchronize()
            lens = result.accept_lens.tolist()
            _leave_out_ended(reporter, batch.reqs, result, lens)
            reporter._orthrus_begun = _Begun(batch.reqs, lens)
            stock(self, batch, result)

        return process_batch_result_decode

    def reported(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def report_decode_stats(self: Any, *args: Any, num_generated_tokens: int = 0, **kwargs: Any) -> None:
            begun, self._orthrus_begun = getattr(self, "_orthrus_begun", None), None
            if begun is not None:
                past = begun.tokens_past_the_end()
                num_generated_tokens -= past
                self.num_generated_tokens -= past
                self.spec_num_accept_tokens -= past
                self.spec_num_correct_drafts -= past
            if self.spec_num_forward_ct > 0:
                stock(self, *args, num_generated_tokens=num_generated_tokens, **kwargs)

        return report_decode_stats

    _wrap_once(SchedulerBatchResultProcessor, "process_batch_result_decode", counted)
    _wrap_once(SchedulerMetricsReporter, "report_decode_stats", reported)


class _Begun:
    """The running requests of a round whose result is being taken in."""

    def __init__(self, reqs: Sequence[Any], lens: Sequence[int]) -> None:
        self._rows = [
            (req, len(req.output_ids) + length)
            for req, length in zip(reqs, lens, strict=True)
            if not (req.finished() or req.is_retracted)
        ]

    def tokens_past_the_end(self) -> int:
        """Accepted tokens that the requests' texts did not take in."""
        return sum(
            committed - min(len(req.output_ids), len(req.output_ids) if req.finished_len is None else req.finished_len)
            for req, committed in self._rows
        )


def _leave_out_ended(reporter: Any, reqs: Sequence[Any], result: Any, lens: Sequence[int]) -> None:
    """SGLang adds all rows of the batch; take off before what rows of ended requests will add."""
    ended = [row for row, req in enumerate(reqs) if req.finished() or req.is_retracted]
    if not ended:
        return
    emitted = sum(lens[row] for row in ended)
    stock = result.get_num_generated_tokens
    result.get_num_generated_tokens = lambda batch_size: stock(batch_size) - emitted
    reporter.spec_num_forward_ct -= len(ended)
    reporter.spec_num_correct_drafts -= emitted - len(ended)
