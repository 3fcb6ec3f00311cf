"""What SGLang reports of rounds: the tokens that clients get.

Under overlap scheduling a round begins before the former one's result is known, so it also runs for requests that have
just ended. And a round may run past the end of a text. SGLang counts both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.wrapping import wrap_once

_BATCH_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor"
_METRICS = "sglang.srt.managers.scheduler_components.metrics_reporter"
_COUNTS_TEXT = "SGLang counts the tokens that it adds to texts"


@depends_on(
    f"{_BATCH_RESULTS}:SchedulerBatchResultProcessor.process_batch_result_decode",
    "batch",
    "result",
    what="wrapped: it remembers which requests of a round had ended before",
    why="when SGLang reports, requests that end in this round have ended, too",
    until=_COUNTS_TEXT,
)
@depends_on(
    f"{_METRICS}:SchedulerMetricsReporter.report_decode_stats",
    "can_run_cuda_graph",
    "running_batch",
    "num_generated_tokens",
    what="wrapped: it corrects the sums first, and reports nothing if they are empty",
    why="it divides by the number of rows",
    until=_COUNTS_TEXT,
)
def count_tokens_of_texts() -> None:
    """Leave tokens that no text takes in, and rows of ended requests, out of accept lengths and throughput."""
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor
    from sglang.srt.managers.scheduler_components.metrics_reporter import SchedulerMetricsReporter

    def counted(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def process_batch_result_decode(self: Any, batch: Any, result: Any) -> None:
            if result.accept_lens is not None:
                if result.copy_done is not None:
                    result.copy_done.synchronize()
                self.metrics_reporter._orthrus_round = _Round(batch.reqs, result)
            stock(self, batch, result)

        return process_batch_result_decode

    def reported(stock: Callable[..., None]) -> Callable[..., None]:
        @wraps(stock)
        def report_decode_stats(self: Any, *args: Any, num_generated_tokens: int = 0, **kwargs: Any) -> None:
            ended_round, self._orthrus_round = getattr(self, "_orthrus_round", None), None
            if ended_round is not None:
                num_generated_tokens -= ended_round.take_off_inplace(self)
            if self.spec_num_forward_ct > 0:
                stock(self, *args, num_generated_tokens=num_generated_tokens, **kwargs)

        return report_decode_stats

    wrap_once(SchedulerBatchResultProcessor, "process_batch_result_decode", counted)
    wrap_once(SchedulerMetricsReporter, "report_decode_stats", reported)


@depends_on(
    f"{_METRICS}:SchedulerMetricsReporter.update_spec_metrics",
    "bs",
    "num_correct_drafts",
    "num_accept_tokens",
    what="the sums that it adds every row to are lowered: spec_num_forward_ct, spec_num_correct_drafts, "
    "spec_num_accept_tokens",
    why="it counts all rows of a batch and all their tokens",
    until=_COUNTS_TEXT,
)
@depends_on(
    "sglang.srt.managers.utils:GenerationBatchResult.get_num_generated_tokens",
    "batch_size",
    what="num_correct_drafts of the result, which it reads, is lowered",
    why="the scheduler reports its load from it after the result was processed",
    until=_COUNTS_TEXT,
)
class _Round:
    """A round whose result SGLang is about to process.

    Args:
        reqs: its requests.
        result: SGLang's `GenerationBatchResult`, on the host.
    """

    def __init__(self, reqs: Sequence[Any], result: Any) -> None:
        self._result = result
        # Of a round of several steps of plain decoding SGLang counts one verify pass.
        self._num_more = result.num_non_draft_tokens_per_req - 1
        self._running = [req for req in reqs if not (req.finished() or req.is_retracted)]
        self._num_ended = len(reqs) - len(self._running)
        # What texts would hold afterwards, had they taken in all that SGLang counts.
        self._num_counted = sum(result.accept_lens.tolist()) + sum(len(req.output_ids) for req in self._running)
        for _ in range(self._num_more):
            for req in self._running:
                req.spec_verify_ct += 1
                req.update_spec_correct_drafts_histogram(0)

    def take_off_inplace(self, reporter: Any) -> int:
        """Take off the reporter's sums what no text has taken in; returns the number of such tokens."""
        num_ended = self._num_ended
        num_tokens = self._num_counted - sum(map(text_length, self._running))
        reporter.num_generated_tokens -= num_tokens
        reporter.spec_num_forward_ct += len(self._running) * self._num_more - num_ended
        reporter.spec_num_accept_tokens -= num_tokens
        if not self._num_more:
            # One token of every row is no draft; of several steps none is.
            reporter.spec_num_correct_drafts -= num_tokens - num_ended
        self._result.num_correct_drafts -= num_tokens
        return num_tokens


def text_length(req: Any) -> int:
    """Tokens of a request's text: what a round has committed behind its end does not count."""
    length = len(req.output_ids)
    return length if req.finished_len is None else min(length, req.finished_len)
