"""What rounds cost on this machine: timed at start-up, before there are requests."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.core import OrthrusState
from sglang_orthrus.passes.runner import DualViewRunner

_CONTEXT = 512
_IN_A_ROW = 2
_REPEATS = 2


def batch_sizes(largest: int) -> list[int]:
    """Powers of two, and the largest."""
    sizes = [1 << exponent for exponent in range(largest.bit_length()) if 1 << exponent < largest]
    return [*sizes, largest]


def time_rounds(
    passes: DualViewRunner, model_runner: Any, widths: Sequence[int], sizes: Iterable[int], seconds: float
) -> dict[int, dict[int, float]]:
    """Seconds of a greedy round by width and batch size, of small batches first until `seconds` are over.

    Every width has the same sizes, one at least. Needs an empty KV pool, whose content it overwrites.

    Args:
        passes: whose graphs are captured, if they are.
        model_runner: SGLang's.
        widths: to be timed.
        sizes: ascending batch sizes.
        seconds: time to take, about.
    """
    found: dict[int, dict[int, float]] = {width: {} for width in widths}
    end = time.monotonic() + seconds
    for size in sizes:
        batch = _batch(model_runner, size, max(widths))
        if batch is None or (time.monotonic() > end and found[widths[0]]):
            break
        for width in widths:
            found[width][size] = _time(passes, model_runner, batch, width)
    return found


def _time(passes: DualViewRunner, model_runner: Any, batch: ScheduleBatch, width: int) -> float:
    """The shortest of a few times, of rounds in a row: a host prepares one while a GPU runs another."""
    best_tokens = model_runner.model.best_tokens

    def run() -> None:
        round_batch = passes.lay_out(batch, width)
        if passes.fused(round_batch) is not None:
            return
        block, draft = round_batch.blocks.ids, None
        if width > 1:
            draft = passes.draft(round_batch)
            block = torch.cat((block[:, :1], best_tokens(draft.hidden_states[:, :-1])), dim=1)
        best_tokens(passes.verify(passes.prepare_verify(round_batch, draft), block).hidden_states)

    def wait() -> None:
        if batch.seq_lens.is_cuda:
            torch.cuda.synchronize()

    run()
    wait()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for _ in range(_IN_A_ROW):
            run()
        wait()
        times.append((time.perf_counter() - started) / _IN_A_ROW)
    return min(times)


@depends_on(
    "sglang.srt.managers.schedule_batch:ScheduleBatch.init_new",
    "reqs",
    "req_to_token_pool",
    "token_to_kv_pool_allocator",
    "tree_cache",
    "model_config",
    "enable_overlap",
    "spec_algorithm",
    what="called for batches that are timed at start-up; their rows and slots are written, not allocated",
    why="passes take SGLang's batches",
    until="SGLang times passes of plugins' algorithms",
)
def _batch(model_runner: Any, size: int, width: int) -> ScheduleBatch | None:
    """A decode batch of greedy requests with some context, on slots that nobody owns yet; None if the pool is small."""
    pool = model_runner.req_to_token_pool
    rows, columns = pool.req_to_token.shape
    context = min(_CONTEXT, columns - width, model_runner.max_total_num_tokens // size - width)
    if size >= rows or context < 1:
        return None
    params = SamplingParams(temperature=0.0, max_new_tokens=1)
    params.normalize(None)
    reqs = [Req(str(number), "", array("q", [0]), params) for number in range(size)]
    batch = ScheduleBatch.init_new(
        reqs=reqs,
        req_to_token_pool=pool,
        token_to_kv_pool_allocator=model_runner.token_to_kv_pool_allocator,
        tree_cache=None,
        model_config=model_runner.model_config,
        enable_overlap=False,
        spec_algorithm=model_runner.spec_algorithm,
    )
    device = pool.req_to_token.device
    slots = torch.arange(size * (context + width), device=device).view(size, -1)
    batch.req_pool_indices = torch.arange(1, size + 1, device=device)
    pool.req_to_token[1 : size + 1, : context + width] = slots.to(pool.req_to_token.dtype)
    batch.seq_lens_cpu = torch.full((size,), context)
    batch.seq_lens = batch.seq_lens_cpu.to(device)
    batch.seq_lens_sum = size * context
    batch.sampling_info = SamplingBatchInfo.from_schedule_batch(batch, model_runner.model_config.vocab_size)
    batch.spec_info = OrthrusState(torch.zeros(size, dtype=torch.int64, device=device), batch.seq_lens)
    return batch
