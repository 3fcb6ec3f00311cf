"""Prefills that take running requests along, a token each (`--enable-mixed-chunk`).

The rows of such a batch are the prompts, then the anchors of the running requests. One pass of the AR view computes all
of them. What follows a prompt is chosen as in any prefill, what follows an anchor as in a round that drafts nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from sglang_orthrus.compat.ledger import SHARED_BY_SAMPLERS, SHARED_BY_WORKERS, depends_on
from sglang_orthrus.core import DraftBlock, RoundBatch, snapshot
from sglang_orthrus.round.round import Round
from sglang_orthrus.sampling.output_history import History


class MixedSteps:
    """Runs them.

    Args:
        target_worker: SGLang's `TpModelWorker`.
        history: what running requests have emitted.
        round_: chooses the tokens of running requests.
    """

    def __init__(self, target_worker: Any, history: History, round_: Round) -> None:
        self._target_worker = target_worker
        self._model_runner = target_worker.model_runner
        self._history = history
        self._round = round_

    @depends_on(
        "sglang.srt.managers.schedule_batch:ScheduleBatch.mix_with_running",
        "running_batch",
        what="a batch that it made is taken apart: decoding_reqs are its last rows, with one token each",
        why="prompts and running requests choose tokens differently",
        until=SHARED_BY_WORKERS,
    )
    @depends_on(
        "sglang.srt.managers.scheduler:Scheduler._advance_pending_grammar",
        what="called, as the grammar_barrier, before masks are filled",
        why="under overlap scheduling grammars lag behind by the former round",
        until=SHARED_BY_WORKERS,
    )
    def run(
        self, batch: ScheduleBatch, grammar_barrier: Callable[[], None] | None
    ) -> tuple[GenerationBatchResult, bool]:
        """A prefill's result, with one token per row, and whether any of the running requests still ran."""
        num_rows = len(batch.reqs)
        num_prompts = num_rows - len(batch.decoding_reqs)
        prompts = _part(batch, slice(num_prompts))
        running = _running(batch, slice(num_prompts, None))
        self._history.resume(prompts)
        forward_batch = ForwardBatch.init_new(batch, self._model_runner, return_hidden_states_before_norm=False)
        result: GenerationBatchResult = self._target_worker.forward_batch_generation(
            batch=None, forward_batch=forward_batch, is_verify=True
        )
        if grammar_barrier is not None and batch.has_grammar:
            grammar_barrier()
        logits = result.logits_output.next_token_logits
        end = self._round.choose(running, logits[num_prompts:num_rows])
        first_tokens = self._first_tokens(prompts, logits[:num_prompts], forward_batch)
        self._history.start(prompts, first_tokens)
        result.next_token_ids = torch.cat((first_tokens, end.verdict.bonus))
        return result, end.is_wanted

    @depends_on(
        "sglang.srt.model_executor.model_runner:ModelRunner.sample",
        "logits_output",
        "forward_batch",
        what="called for the rows of prompts, which it tells by sampling_info and seq_lens",
        why="a prefill's first tokens are chosen there",
        until=SHARED_BY_WORKERS,
    )
    def _first_tokens(self, prompts: ScheduleBatch, logits: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[prompts], of the pass's logits [prompts, V]; those of unfinished prompts mean nothing."""
        forward_batch.sampling_info = prompts.sampling_info
        forward_batch.seq_lens = prompts.seq_lens
        tokens: torch.Tensor = self._model_runner.sample(LogitsProcessorOutput(next_token_logits=logits), forward_batch)
        return tokens


def _running(batch: ScheduleBatch, rows: slice) -> RoundBatch:
    """The running requests as a round sees them: their anchors are the last tokens of the pass."""
    part = _part(batch, rows)
    part.seq_lens = part.seq_lens - 1  # the anchor is not committed yet
    count = len(part.reqs)
    anchors, slots = batch.input_ids[-count:, None], batch.out_cache_loc[-count:, None]
    return RoundBatch(part, DraftBlock(anchors, part.seq_lens.long()[:, None], slots))


@depends_on(
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.from_schedule_batch",
    "batch",
    "vocab_size",
    what="called for a part of a batch",
    why="the scheduler has merged the parameters of all its requests",
    until=SHARED_BY_SAMPLERS,
)
def _part(batch: ScheduleBatch, rows: slice) -> ScheduleBatch:
    """A snapshot that tells what it takes to choose the tokens of some rows."""
    part = snapshot(batch)
    part.reqs = batch.reqs[rows]
    part.seq_lens, part.seq_lens_cpu = batch.seq_lens[rows], None
    grammars = [req.grammar for req in part.reqs]
    part.has_grammar = any(grammar is not None for grammar in grammars)
    info = SamplingBatchInfo.from_schedule_batch(part, batch.sampling_info.vocab_size).copy_for_forward()
    info.grammars = grammars if part.has_grammar else None
    part.sampling_info = info
    return part
