"""What the patch for metrics of speculation does."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import utils
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components import batch_result_processor, metrics_reporter
from sglang.srt.sampling.sampling_params import SamplingParams

from tests.patching import PATCHES, apply, load

pytestmark = pytest.mark.contract

WIDTH = 8
STOP = 7


class _Reporter:
    """The sums of SGLang's reporter, with its own code."""

    num_generated_tokens = spec_num_accept_tokens = spec_num_correct_drafts = spec_num_forward_ct = 0
    spec_num_block_accept_tokens = spec_num_cap_tokens = forward_ct_decode = 0
    update_spec_metrics = metrics_reporter.SchedulerMetricsReporter.update_spec_metrics

    def __init__(self) -> None:
        self.reported: list[int] = []

    def snapshot_spec_decode_metrics(self, batch: Any, result: Any) -> None:
        """Nothing: that is for other metrics."""

    def report_decode_stats(self, graph: bool, running_batch: Any, num_generated_tokens: int) -> None:
        """Keep the number of tokens."""
        self.reported.append(num_generated_tokens)


class _Nothing:
    """What the processor calls that does not count."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _processor(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's processor of results, which reports to a `_Reporter`."""
    monkeypatch.setattr(module, "get_observability", lambda: SimpleNamespace(enable_metrics=False))
    stock = module.SchedulerBatchResultProcessor
    for name in ("_handle_finish_state_updated_req", "_maybe_update_reasoning_tokens"):
        monkeypatch.setattr(stock, name, lambda *args: None)
    parts = {field.name: _Nothing() for field in fields(stock)}
    return stock(**{**parts, "metrics_reporter": _Reporter(), "enable_overlap": True})


def _requests(num: int) -> list[Req]:
    sampling = SamplingParams(max_new_tokens=64, stop_token_ids=[STOP])
    sampling.normalize(None)
    return [Req("id", "", [1], sampling, eos_token_ids=set(), vocab_size=500) for _ in range(num)]


def _result(module: ModuleType, tokens: list[list[int]], extras: dict[str, int]) -> Any:
    """Of a step that gives each request these tokens; extras: lengths that exceed theirs, of a speculative step."""
    result = module.GenerationBatchResult(logits_output=SimpleNamespace(sampling_mask_output=None))
    if extras:
        result.next_token_ids = torch.tensor([row + [0] * (WIDTH - len(row)) for row in tokens]).flatten()
        result.accept_lens = torch.tensor([len(row) for row in tokens])
        result.speculative_output_stride = WIDTH
        for name, extra in extras.items():
            setattr(result, name, result.accept_lens + extra)
    else:
        result.next_token_ids = torch.tensor(tokens).flatten()
    return result


def _process(
    modules: tuple[ModuleType, ModuleType],
    steps: list[list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    **extras: int,
) -> tuple[_Reporter, Any]:
    """Steps of requests that stop at STOP; as under overlap, one that has ended is in the next step, too.

    Args:
        modules: `batch_result_processor`, and `utils` with the class of results.
        steps: [steps][requests], the tokens of each.

    Returns: the sums, and the last result.
    """
    processor = _processor(modules[0], monkeypatch)
    batch = SimpleNamespace(
        reqs=_requests(len(steps[0])),
        spec_algorithm=SimpleNamespace(is_none=lambda: not extras),
        batch_size=lambda: len(steps[0]),
        return_logprob=False,
        has_grammar=False,
    )
    results = [_result(modules[1], tokens, extras) for tokens in steps]
    for result in results:
        processor.process_batch_result_decode(batch, result)
    return processor.metrics_reporter, results[-1]


@pytest.fixture(name="patched")
def _patched(tmp_path: Path) -> dict[str, ModuleType]:
    copies = apply(PATCHES / "0021-metrics-count-tokens-of-texts.patch", tmp_path)
    return {copy.stem: load(f"patched_0021_{copy.stem}", copy) for copy in copies}


def test_rows_of_ended_requests_and_tokens_past_the_end_are_not_counted(
    patched: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first request ends with the second of six tokens, the other goes on.
    steps = [[[1, STOP, 2, 3, 4, 5], [1, 2, 3]], [[6] * WIDTH, [4, 5]]]
    extras = {"block_accept_lens": 1, "cap_lens": 2}
    reporter, result = _process((batch_result_processor, utils), steps, monkeypatch, **extras)
    assert reporter.reported == [9, 10], "SGLang has closed the gap: drop the patch"
    assert (reporter.spec_num_accept_tokens, reporter.spec_num_forward_ct) == (19, 4)

    modules = patched["batch_result_processor"], patched["utils"]
    reporter, result = _process(modules, steps, monkeypatch, **extras)
    assert reporter.reported == [2 + 3, 2]
    assert reporter.num_generated_tokens == reporter.spec_num_accept_tokens == 7
    assert (reporter.spec_num_forward_ct, reporter.spec_num_correct_drafts) == (3, 4)
    # What was accepted of blocks, of rows that count.
    assert (reporter.spec_num_block_accept_tokens, reporter.spec_num_cap_tokens) == (6 + 3 + 2 + 3, 6 + 3 + 2 + 6)
    # The scheduler asks again, for its report of load.
    assert result.get_num_generated_tokens(2) == 2


def test_plain_decoding_counts_no_rows_of_ended_requests(
    patched: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [[[STOP], [1]], [[6], [2]]]
    reporter, _ = _process((batch_result_processor, utils), steps, monkeypatch)
    assert reporter.num_generated_tokens == 4
    reporter, _ = _process((patched["batch_result_processor"], patched["utils"]), steps, monkeypatch)
    assert (reporter.num_generated_tokens, reporter.reported, reporter.spec_num_forward_ct) == (3, [2, 1], 0)


def test_a_report_without_any_row_does_not_divide_by_zero(
    patched: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def reached() -> None:
        raise Reached

    pool_stats = SimpleNamespace(get_decode_usage_msg_parts=list)
    reporter: Any = SimpleNamespace(
        current_scheduler_metrics_enabled=False,
        is_stats_logging_rank=True,
        forward_ct_decode=0,
        decode_log_interval=1,
        last_decode_stats_tic=0.0,
        num_generated_tokens=0,
        spec_num_accept_tokens=0,
        spec_num_correct_drafts=0,
        spec_num_forward_ct=0,
        scheduler=SimpleNamespace(
            pool_stats_observer=SimpleNamespace(get_pool_stats=lambda: pool_stats),
            spec_algorithm=SimpleNamespace(is_none=lambda: False),
        ),
    )
    batch = SimpleNamespace(reqs=[], forward_iter=0)
    for module, end in ((metrics_reporter, ZeroDivisionError), (patched["metrics_reporter"], Reached)):
        monkeypatch.setattr(module, "get_spec", reached)
        with pytest.raises(end):
            module.SchedulerMetricsReporter.report_decode_stats(reporter, False, running_batch=batch)
