"""SGLang's speculative worker for ORTHRUS: speaks the scheduler's interface, and leaves rounds to `Round`."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.model_runner import SamplingPrewarmResult
from sglang.srt.runtime_context import (
    get_exec,
    get_observability,
    get_parallel,
    get_serving,
    get_spec,
)
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from sglang_orthrus import ranks
from sglang_orthrus.compat.ledger import EXTENSION_POINT, SHARED_BY_WORKERS, depends_on
from sglang_orthrus.compat.memory import largest_graph, use_graph_runner
from sglang_orthrus.compat.model import replace_sampler
from sglang_orthrus.compat.scheduler import DelayedPart
from sglang_orthrus.config import (
    WIDTHS,
    DraftMode,
    DualViewConfig,
    slow_mask_seconds,
    widths_from_env,
)
from sglang_orthrus.core import OrthrusState
from sglang_orthrus.grammar.across_ranks import GrammarsAcrossRanks
from sglang_orthrus.grammar.batch import BlockGrammars
from sglang_orthrus.metrics import GrammarMetrics, RoundMetrics, RoundPath
from sglang_orthrus.passes.attention import register_flashinfer, set_workspace_size, workspace_bytes
from sglang_orthrus.passes.cuda_graphs import LargestGraphRunner, OrthrusGraphRunner
from sglang_orthrus.passes.runner import DualViewRunner
from sglang_orthrus.round.adaptive_policy import adaptive_policy
from sglang_orthrus.round.ended_rows import RoundRows, UnreadResults
from sglang_orthrus.round.mixed import MixedSteps
from sglang_orthrus.round.policy import Policy
from sglang_orthrus.round.round import Round, RoundEnd
from sglang_orthrus.sampling.first_token import FirstTokenSampler
from sglang_orthrus.sampling.memory import reserve
from sglang_orthrus.sampling.output_history import History

logger = logging.getLogger(__name__)

Publish = Callable[[torch.Tensor], None]


@depends_on(
    "sglang.srt.speculative.base_spec_worker:BaseSpecWorker",
    what="subclassed; overrides init_attention_backends, init_cuda_graphs, prewarm_sampling, spec_v2_attn_backends, "
    "forward_batch_generation, on_verify_complete_cpu, note_request_finished",
    why="the scheduler expects its interface of every worker",
    until=EXTENSION_POINT,
)
@depends_on(
    "sglang.srt.managers.utils:GenerationBatchResult",
    "logits_output",
    "next_token_ids",
    "accept_lens",
    "next_draft_input",
    "new_seq_lens",
    "can_run_cuda_graph",
    "speculative_num_draft_tokens",
    "speculative_output_stride",
    "num_non_draft_tokens_per_req",
    "delay_sample_func",
    what="returned from every round",
    why="the scheduler expects it of every worker",
    until=EXTENSION_POINT,
)
class OrthrusWorker(BaseSpecWorker):
    """One model, one KV pool, no draft worker."""

    def __init__(self, server_args: Any, gpu_id: int, nccl_port: int | None = None, target_worker: Any = None) -> None:
        super().__init__()
        self._target_worker = target_worker
        self._draft_worker = None
        self.model_runner = target_worker.model_runner
        self.device = target_worker.device
        # Read by SGLang's metrics.
        self.speculative_num_steps = int(get_spec().speculative_num_steps)
        self.speculative_num_draft_tokens = int(get_spec().speculative_num_draft_tokens)

        config = DualViewConfig.from_hf(self.model_runner.model_config.hf_config)
        self._widths = widths_from_env(self.speculative_num_draft_tokens)
        self._passes = DualViewRunner(target_worker, config, self._widths)
        self._history = History(self.device)
        sampling_backend = get_exec().kernel.sampling_backend
        replace_sampler(self.model_runner, FirstTokenSampler())
        ranks.use_group(get_parallel().tp_group)
        reporting = _reporting()
        self._metrics = RoundMetrics(*reporting)
        grammars = (GrammarsAcrossRanks if ranks.are_several() else BlockGrammars)(
            DraftMode.from_env(),
            self.speculative_num_draft_tokens,
            self.device,
            target_worker.tokenizer,
            GrammarMetrics(*reporting),
            slow_mask_seconds(is_cpu=self.device == "cpu"),
        )
        self._policy = Policy(self._widths, runs_at_once=self.device == "cpu")
        self._unread = UnreadResults()
        self._grammars = grammars
        self._round = Round(self._passes, self._history, grammars, self.model_runner, sampling_backend)
        self._mixed = MixedSteps(target_worker, self._history, self._round)
        # The pools and graphs are made after this, and requests arrive later still.
        use_graph_runner(self.model_runner, OrthrusGraphRunner if len(self._widths) == 1 else LargestGraphRunner)
        if self.device != "cpu":
            model = self.model_runner.model_config
            size = workspace_bytes(
                largest_graph(),
                config.block_size,
                model.num_attention_heads,
                model.num_key_value_heads,
                model.head_dim,
            )
            set_workspace_size(size)
            register_flashinfer()
        logger.info(
            "ORTHRUS drafts and verifies blocks of %s tokens (%s).",
            " or ".join(map(str, self._widths)),
            WIDTHS,
        )

    @depends_on(
        "sglang.srt.model_executor.model_runner:ModelRunner._get_attention_backend",
        "init_new_workspace",
        what="called for a backend of every narrower width",
        why="an attention backend's graphs have one width (the UNO worker calls it, too)",
        until=SHARED_BY_WORKERS,
    )
    def init_attention_backends(self) -> None:
        """Adapt SGLang's attention backend to two passes per round."""
        runner = self.model_runner
        make_backend = runner._get_attention_backend
        if self.device == "cpu":
            # SGLang's PyTorch attention knows no verify passes.
            from sglang_orthrus.cpu.attention import OrthrusCpuAttnBackend

            make_backend = partial(OrthrusCpuAttnBackend, runner)
            runner.attn_backend = make_backend()
        self._passes.init_attention(make_backend)

    def init_cuda_graphs(self) -> None:
        """SGLang has captured the graphs of the largest width; capture those of the others."""
        self._additional_graph_memory_usage |= self._passes.capture_narrow()
        if len(self._widths) > 1:
            reporting = _reporting()
            self._policy = adaptive_policy(self._passes, self.model_runner, self._widths, self._grammars, reporting)
        leave_out_of_collections()

    def on_verify_complete_cpu(self, num_correct_drafts_per_req: list[int], batch_size: int = 0) -> None:
        """The oldest round's result is on the host."""
        self._unread.pop()
        self._policy.observe(num_correct_drafts_per_req)

    def note_request_finished(self, *, rid: str, natural_stop: bool) -> None:
        """A request is over."""
        self._policy.forget(rid)

    def prewarm_sampling(self) -> SamplingPrewarmResult:
        """Take once what choosing tokens takes at most, and name it to SGLang, which may size the KV pool then."""
        result = super().prewarm_sampling()
        if self.device != "cpu":
            result = reserve(self.model_runner, self._widths, get_exec().kernel.sampling_backend)
        return result

    @property
    def spec_v2_attn_backends(self) -> tuple[Any, ...]:
        """The backends that rounds use; they decide whether the overlap scheduler brings lengths to the host."""
        return self._passes.attention_backends

    def forward_batch_generation(
        self,
        batch: ScheduleBatch,
        on_publish: Publish | None = None,
        grammar_barrier: Callable[[], None] | None = None,
        pp_proxy_tensors: Any = None,
    ) -> GenerationBatchResult:
        """One scheduler step: a prefill in the AR view, which may take running requests along, or a round for these.

        The overlap scheduler gets a round with grammars when its first pass has begun. It takes in the former round's
        result then, so that answers do not wait for drafts to be chosen, and calls for the rest (`delay_sample_func`).

        on_publish is called once with the new committed lengths [bs]. grammar_barrier brings grammars to where the
        former round ended. For the rest of a round they are there; a round that drafts nothing begins its masks before.
        """
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return self._prefill(batch, on_publish, grammar_barrier)
        return self._run_round(batch, on_publish, grammar_barrier)

    @depends_on(
        "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
        "batch",
        what="called for prefill",
        why="a speculative worker runs the target model through it",
        until=SHARED_BY_WORKERS,
    )
    def _prefill(
        self, batch: ScheduleBatch, on_publish: Publish | None, grammar_barrier: Callable[[], None] | None
    ) -> GenerationBatchResult:
        if batch.forward_mode.is_mixed():
            self._policy.note_prefill(batch.decoding_reqs)
            result, is_wanted = self._mixed.run(batch, grammar_barrier)
            if is_wanted:
                self._metrics.count(RoundPath.MIXED)
        else:
            self._policy.note_prefill()
            self._history.resume(batch)
            result = self._target_worker.forward_batch_generation(batch)
            self._history.start(batch, result.next_token_ids)
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = OrthrusState(result.next_token_ids, batch.seq_lens)
        _publish(on_publish, batch.seq_lens)
        return result

    def _run_round(
        self, batch: ScheduleBatch, on_publish: Publish | None, grammar_barrier: Callable[[], None] | None
    ) -> GenerationBatchResult:
        if batch.seq_lens.is_cuda:
            # Made on another stream under overlap scheduling.
            batch.seq_lens.record_stream(torch.cuda.current_stream())
        if batch.has_grammar:
            # Prefill leaves its mask there, and SGLang's sampler would apply it again.
            batch.sampling_info.grammar_mask = None
        plan = self._policy.plan(batch, can_defer=on_publish is not None)
        running = RoundRows(batch, self._unread.running(batch.reqs) if plan.leaves_out_ended else None)
        known_at = time.perf_counter()
        self._policy.leave_out(running.rows)
        # The state is the former round's until this one ends.
        result = GenerationBatchResult(
            next_draft_input=running.state,
            speculative_num_draft_tokens=plan.width,
        )
        self._unread.add(batch.reqs, result)
        if not running.rows:
            return self._report(result, RoundEnd(running.of_all(), RoundPath.GRAPH, is_wanted=False), on_publish)
        round_batch = self._passes.lay_out(running.batch(), plan.width)

        def report(end: RoundEnd) -> GenerationBatchResult:
            return self._report(result, end._replace(verdict=running.of_all(end.verdict)), on_publish)

        if plan.is_deferred:
            begun = self._round.begin(round_batch, plan, grammar_barrier)
            result.delay_sample_func = DelayedPart(
                lambda: report(self._round.finish(begun)), runs_pass=begun.verify is None
            )
        else:
            report(self._round.run(round_batch, plan))
            self._policy.note_queued()
        if plan.leaves_out_ended:
            self._policy.note_waited(self._passes.queued_at - known_at)
        return result

    def _report(
        self, result: GenerationBatchResult, end: RoundEnd, on_publish: Publish | None
    ) -> GenerationBatchResult:
        """Publish a round's end and tell the scheduler of it."""
        if end.is_wanted:
            self._metrics.count(end.path)
        verdict = end.verdict
        _publish(on_publish, verdict.new_seq_lens)
        result.logits_output = LogitsProcessorOutput(next_token_logits=None)
        if end.logprobs is not None:
            end.logprobs.write_to(result.logits_output)
        result.next_token_ids = verdict.tokens.flatten()
        result.speculative_output_stride = verdict.tokens.shape[1]
        result.num_non_draft_tokens_per_req = end.num_steps
        result.accept_lens = verdict.accept_lens
        result.next_draft_input.bonus_tokens = verdict.bonus
        result.next_draft_input.new_seq_lens = result.new_seq_lens = verdict.new_seq_lens
        result.can_run_cuda_graph = end.path is not RoundPath.EAGER
        return result


def leave_out_of_collections() -> None:
    """Have Python's garbage collector pass over all objects that live now.

    A server starts with some 800,000. To go through them takes 0.1 s and more, in the middle of a round.
    """
    gc.collect()
    gc.freeze()


def _publish(on_publish: Publish | None, new_seq_lens: torch.Tensor) -> None:
    """The synchronous scheduler passes no callback and reads `new_seq_lens` off the result."""
    if on_publish is not None:
        on_publish(new_seq_lens)


def _reporting() -> tuple[int, str | None]:
    """Rounds between log lines, and the label of metrics. Of several ranks, which run the same rounds, one exports."""
    observability = get_observability()
    is_exporting = observability.enable_metrics and ranks.is_first()
    return observability.decode_log_interval, get_serving().served_model_name if is_exporting else None
