"""SGLang's speculative worker for ORTHRUS: the order of a round, no arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.model_runner import SamplingPrewarmResult
from sglang.srt.runtime_context import get_exec, get_observability, get_schedule, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker
from sglang.srt.utils.common import async_h2d

from sglang_orthrus.compat.ledger import EXTENSION_POINT, SHARED_BY_WORKERS, depends_on
from sglang_orthrus.compat.memory import use_graph_runner
from sglang_orthrus.compat.model import replace_sampler
from sglang_orthrus.config import DualViewConfig
from sglang_orthrus.core import OrthrusState
from sglang_orthrus.environment import DraftMode, slow_mask_seconds
from sglang_orthrus.grammar.batch import BlockGrammars, Chosen, Proposal
from sglang_orthrus.grammar.repair import Ids
from sglang_orthrus.grammar_stats import GrammarStats
from sglang_orthrus.passes import flashinfer as flashinfer_plans
from sglang_orthrus.passes.blocks import DraftBlock
from sglang_orthrus.passes.cuda_graphs import OrthrusGraphRunner
from sglang_orthrus.passes.runner import DualViewRunner, VerifyPass
from sglang_orthrus.paths import Path, RoundPaths
from sglang_orthrus.sampling.acceptance import Verdict, accept_greedy, accept_nothing
from sglang_orthrus.sampling.first_token import LoneSampler
from sglang_orthrus.sampling.logit_adjustments import Adjustments, RowMasks, are_adjusted
from sglang_orthrus.sampling.logprobs import RoundLogprobs
from sglang_orthrus.sampling.memory import reserve
from sglang_orthrus.sampling.output_history import History
from sglang_orthrus.sampling.request_groups import rows_index
from sglang_orthrus.sampling.verification import Drafts, TokenChoice

logger = logging.getLogger(__name__)

Publish = Callable[[torch.Tensor], None]


class DraftedRound(NamedTuple):
    """A round whose draft pass has begun.

    Attributes:
        batch: as the passes want it.
        adjustments: what its requests' options do to logits.
        choice: of its tokens.
        constrained: places of the requests whose grammars matter.
        draft_replayed: whether a CUDA graph drafts.
        drafts: to be verified.
        proposal: what the grammars choose drafts from; None if there are none.
        prepared: the verify pass.
    """

    batch: ScheduleBatch
    adjustments: Adjustments
    choice: TokenChoice
    constrained: Sequence[int]
    draft_replayed: bool
    drafts: Drafts
    proposal: Proposal | None
    prepared: VerifyPass


class RoundEnd(NamedTuple):
    """What a round came to.

    Attributes:
        verdict: what it commits.
        path: how it was run.
        logprobs: of what it emits, if a request wants them.
        is_wanted: whether any of its requests still ran.
    """

    verdict: Verdict
    path: Path
    logprobs: RoundLogprobs | None = None
    is_wanted: bool = True


@depends_on(
    "sglang.srt.speculative.base_spec_worker:BaseSpecWorker",
    what="subclassed; overrides init_attention_backends, init_cuda_graphs, prewarm_sampling, spec_v2_attn_backends, "
    "forward_batch_generation",
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
    "delay_sample_func",
    what="returned from every round",
    why="the scheduler expects it of every worker",
    until=EXTENSION_POINT,
)
class OrthrusWorker(BaseSpecWorker):
    """One model, one KV pool, no draft worker. A round is draft, verify, commit.

    For a request with C committed tokens and block width F:

        slots [0, C)        AR-view K/V, shared with the radix tree
        slots [C, C+F)      draft writes diffusion K/V here, verify overwrites the same slots with AR K/V
        after n commits     [C, C+n) stays; the rest is overwritten next round and never reaches the radix tree
    """

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
        self._runner = DualViewRunner(target_worker, config, self.speculative_num_draft_tokens)
        self._history = History(self.device)
        self._sampling_backend = get_exec().kernel.sampling_backend
        replace_sampler(self.model_runner, LoneSampler())
        reporting = (get_observability().decode_log_interval, get_observability().enable_metrics)
        self._paths = RoundPaths(*reporting)
        self._grammars = BlockGrammars(
            DraftMode.from_env(),
            self.speculative_num_draft_tokens,
            self.device,
            target_worker.tokenizer,
            GrammarStats(*reporting),
            slow_mask_seconds(is_cpu=self.device == "cpu"),
        )
        # The pools and graphs are made after this, and requests arrive later still.
        use_graph_runner(self.model_runner, OrthrusGraphRunner)
        if self.device != "cpu":
            model = self.model_runner.model_config
            size = flashinfer_plans.workspace_bytes(
                get_schedule().max_running_requests,
                config.block_size,
                model.num_attention_heads,
                model.num_key_value_heads,
                model.head_dim,
            )
            flashinfer_plans.set_workspace_size(size)
        logger.info(
            "ORTHRUS drafts blocks of %d tokens and verifies %d of them per round.",
            config.block_size,
            self.speculative_num_draft_tokens,
        )

    @depends_on(
        "sglang.srt.model_executor.model_runner:ModelRunner._get_attention_backend",
        "init_new_workspace",
        what="called for a second backend if drafts are wider than verify",
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
        self._runner.init_attention(make_backend)

    def init_cuda_graphs(self) -> None:
        """SGLang has captured the graphs of the verify width; capture drafts here if they are wider."""
        self._additional_graph_memory_usage |= self._runner.capture_wide_draft()

    def prewarm_sampling(self) -> SamplingPrewarmResult:
        """Take once what choosing tokens takes at most, and name it to SGLang, which may size the KV pool then."""
        result = super().prewarm_sampling()
        if self.device != "cpu":
            result = reserve(self.model_runner, self.speculative_num_draft_tokens, self._sampling_backend)
        return result

    @property
    def spec_v2_attn_backends(self) -> tuple[Any, ...]:
        """The backends that rounds use; they decide whether the overlap scheduler brings lengths to the host."""
        return self._runner.attention_backends

    def forward_batch_generation(
        self,
        batch: ScheduleBatch,
        on_publish: Publish | None = None,
        grammar_barrier: Callable[[], None] | None = None,
        pp_proxy_tensors: Any = None,
    ) -> GenerationBatchResult:
        """One scheduler step: a prefill in the AR view, or a round for every running request.

        The overlap scheduler gets a round with grammars when its draft pass has begun. It takes in the former round's
        result then, so that answers do not wait for drafts to be chosen, and calls for the rest (`delay_sample_func`).

        on_publish is called once with the new committed lengths [bs]. grammar_barrier is not needed: by then the
        grammars are where the former round ended.
        """
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return self._prefill(batch, on_publish)
        return self._round(batch, on_publish)

    @depends_on(
        "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
        "batch",
        what="called for prefill",
        why="a speculative worker runs the target model through it",
        until=SHARED_BY_WORKERS,
    )
    def _prefill(self, batch: ScheduleBatch, on_publish: Publish | None) -> GenerationBatchResult:
        self._history.resume(batch)
        result = self._target_worker.forward_batch_generation(batch)
        self._history.start(batch, result.next_token_ids)
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = OrthrusState(result.next_token_ids, batch.seq_lens)
        _publish(on_publish, batch.seq_lens)
        return result

    def _round(self, batch: ScheduleBatch, on_publish: Publish | None) -> GenerationBatchResult:
        prefix_lens = batch.seq_lens
        if prefix_lens.is_cuda:
            # Made on another stream under overlap scheduling.
            prefix_lens.record_stream(torch.cuda.current_stream())

        layout = self._runner.layout(batch)
        # The state is the former round's until this one ends.
        result = GenerationBatchResult(
            next_draft_input=OrthrusState(layout.ids[:, 0], prefix_lens),
            speculative_num_draft_tokens=self.speculative_num_draft_tokens,
        )
        fused = self._runner.round(batch, layout) if _is_plain(batch) else None
        if fused is not None:
            end = RoundEnd(accept_greedy(*fused, prefix_lens), Path.GRAPH)
            return self._finish(result, end, on_publish)
        if batch.has_grammar and on_publish is not None:
            # The scheduler takes back what a pass changes in its batch.
            drafted = self._draft(copy(batch), layout)
            result.delay_sample_func = lambda: self._finish(result, self._verify(drafted), on_publish)
            return result
        return self._finish(result, self._verify(self._draft(batch, layout)), on_publish)

    def _finish(
        self, result: GenerationBatchResult, end: RoundEnd, on_publish: Publish | None
    ) -> GenerationBatchResult:
        """Publish a round's end and tell the scheduler of it."""
        if end.is_wanted:
            self._paths.count(end.path)
        verdict = end.verdict
        _publish(on_publish, verdict.new_seq_lens)
        result.logits_output = LogitsProcessorOutput(next_token_logits=None)
        if end.logprobs is not None:
            end.logprobs.write_to(result.logits_output)
        result.next_token_ids = verdict.tokens.flatten()
        result.accept_lens = verdict.accept_lens
        result.next_draft_input.bonus_tokens = verdict.bonus
        result.next_draft_input.new_seq_lens = result.new_seq_lens = verdict.new_seq_lens
        result.can_run_cuda_graph = end.path is not Path.EAGER
        return result

    def _draft(self, batch: ScheduleBatch, layout: DraftBlock) -> DraftedRound:
        """The first of two passes, for whatever is not in one graph: grammars, sampling and the like, large batches."""
        width = self.speculative_num_draft_tokens
        adjustments = self._history.adjustments(batch)
        model = self.model_runner.model
        choice = TokenChoice(model, batch, layout.ids[:, 0], adjustments, width, self._sampling_backend)
        constrained = self._grammars.rows_of(batch.reqs) if batch.has_grammar else []

        draft = self._runner.draft(batch, layout)
        drafts = choice.draft(draft.hidden_states[:, : width - 1], constrained, self._grammars.num_candidates)
        proposal = None
        if drafts.candidates is not None:
            # What prefill left there would be applied again by SGLang's sampler.
            batch.sampling_info.grammar_mask = None
            proposal = Proposal(drafts.candidates)
            if not self._grammars.changes_drafts:
                # A round may be cut where masks take long, so its drafts must not be drawn at random.
                drafts.propose_inplace(rows_index(constrained, drafts.tokens.device), drafts.candidates[:, :, 0])
        prepared = self._runner.prepare_verify(batch, layout, draft, drafts.block)
        return DraftedRound(batch, adjustments, choice, constrained, draft.replayed, drafts, proposal, prepared)

    def _verify(self, drafted: DraftedRound) -> RoundEnd:
        """The second pass and what it decides."""
        batch, choice, drafts, constrained = drafted.batch, drafted.choice, drafted.drafts, drafted.constrained
        path = Path.SPLIT if drafted.draft_replayed else Path.EAGER
        logprobs = RoundLogprobs(batch, self.speculative_num_draft_tokens) if batch.return_logprob else None
        if all(req.finished() for req in batch.reqs):
            return RoundEnd(accept_nothing(drafts.block, batch.seq_lens), path, logprobs, is_wanted=False)
        chosen = None
        if constrained and self._grammars.changes_drafts:
            chosen = self._choose(drafted)
            drafts.propose_inplace(chosen.rows, chosen.drafts)
        verify = self._runner.verify(drafted.prepared)
        # Verify needs no masks, and the masks no result of verify: what follows on the host runs at the same time.
        if constrained and chosen is None:
            chosen = self._choose(drafted)
        masks = limits = None
        if chosen is not None:
            # Requests for which nothing but the choice itself would tell that a mask was left out.
            rows = {row for row in choice.foreseeable_requests if not batch.reqs[row].return_logprob}
            foreseeable = {number for number, row in enumerate(constrained) if row in rows}
            best_of = partial(_best_of, choice, drafts, verify.hidden_states, constrained)
            filled = self._grammars.masks(chosen, foreseeable, best_of)
            masks = RowMasks(filled.mask, constrained)
            limits = _limits(filled.limits, constrained, drafts.tokens)
        verdict = choice.judge(drafts, verify.hidden_states, masks, logprobs, limits)
        self._history.extend(batch, drafted.adjustments, drafts.block, verdict)
        return RoundEnd(verdict, path if verify.replayed else Path.EAGER, logprobs)

    def _choose(self, drafted: DraftedRound) -> Chosen:
        """Choose the drafts of the constrained requests."""
        assert drafted.proposal is not None, "made for every round with constrained requests"
        vocab_size = drafted.batch.sampling_info.vocab_size
        return self._grammars.choose(drafted.batch.reqs, drafted.constrained, drafted.proposal, vocab_size)


def _best_of(
    choice: TokenChoice,
    drafts: Drafts,
    hidden_states: torch.Tensor,
    constrained: Sequence[int],
    numbers: Sequence[int],
) -> Ids:
    """The best tokens of some of the constrained requests, given by their numbers among these: [n, Q]."""
    requests = [constrained[number] for number in numbers]
    return choice.best_tokens(drafts, hidden_states, requests).cpu().numpy()[requests]


def _limits(of_constrained: Sequence[int], constrained: Sequence[int], tokens: torch.Tensor) -> torch.Tensor | None:
    """The most drafts that may be accepted: [bs] int64; None for all. tokens: [bs, Q-1] the drafts."""
    num_requests, num_drafts = tokens.shape
    if min(of_constrained) == num_drafts:
        return None
    limits = [num_drafts] * num_requests
    for row, limit in zip(constrained, of_constrained, strict=True):
        limits[row] = limit
    return async_h2d(limits, dtype=torch.int64, device=tokens.device)


def _is_plain(batch: ScheduleBatch) -> bool:
    """Greedy requests without options, whose rounds fit one CUDA graph."""
    info = batch.sampling_info
    return info.is_all_greedy and not (batch.has_grammar or batch.return_logprob or are_adjusted(info))


def _publish(on_publish: Publish | None, new_seq_lens: torch.Tensor) -> None:
    """The synchronous scheduler passes no callback and reads `new_seq_lens` off the result."""
    if on_publish is not None:
        on_publish(new_seq_lens)
