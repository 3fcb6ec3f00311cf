"""What SGLang reports of rounds: tokens of requests that run, and nothing of those that have ended.

Under overlap scheduling a round begins before the former one's result is known, so it runs once more for requests that
ended there. Nobody gets its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from sglang_orthrus.compat import _wrap_once
from sglang_orthrus.touch import Touch

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
        "it divides by the number of rows",
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
            if result.accept_lens is not None:
                _leave_out_ended(self.metrics_reporter, batch, result)
            stock(self, batch, result)

        return process_batch_result_decode

    def reported(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def report_decode_stats(self: Any, *args: Any, **kwargs: Any) -> None:
            if self.spec_num_forward_ct > 0:
                stock(self, *args, **kwargs)

        return report_decode_stats

    _wrap_once(SchedulerBatchResultProcessor, "process_batch_result_decode", counted)
    _wrap_once(SchedulerMetricsReporter, "report_decode_stats", reported)


def _leave_out_ended(reporter: Any, batch: Any, result: Any) -> None:
    """SGLang adds all rows of the batch; take off before what rows of ended requests will add."""
    ended = [row for row, req in enumerate(batch.reqs) if req.finished() or req.is_retracted]
    if not ended:
        return
    if result.copy_done is not None:
        result.copy_done.synchronize()
    lens = result.accept_lens.tolist()
    emitted = sum(lens[row] for row in ended)
    stock = result.get_num_generated_tokens
    result.get_num_generated_tokens = lambda batch_size: stock(batch_size) - emitted
    reporter.spec_num_forward_ct -= len(ended)
    reporter.spec_num_correct_drafts -= emitted - len(ended)
