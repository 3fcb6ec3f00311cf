"""SGLang's speculative worker for ORTHRUS: the order of a round, no arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_exec, get_observability, get_schedule, get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from sglang_orthrus import compat, flashinfer_plans
from sglang_orthrus.adjust import RowMasks, are_adjusted
from sglang_orthrus.admission import refusal
from sglang_orthrus.block import DraftBlock
from sglang_orthrus.checkpoint import folder_problem
from sglang_orthrus.choice import Drafts, TokenChoice
from sglang_orthrus.config import DualViewConfig
from sglang_orthrus.constrained import BlockGrammars, Chosen, Proposal
from sglang_orthrus.grammar import Ids
from sglang_orthrus.grammar_stats import GrammarStats
from sglang_orthrus.graph_runner import OrthrusGraphRunner
from sglang_orthrus.history import History
from sglang_orthrus.logprobs import RoundLogprobs
from sglang_orthrus.model_runner import DualViewRunner
from sglang_orthrus.paths import Path, RoundPaths
from sglang_orthrus.rows import rows_index
from sglang_orthrus.settings import DraftMode, slow_mask_seconds
from sglang_orthrus.spec_input import OrthrusState
from sglang_orthrus.verify import Verdict, accept_greedy

logger = logging.getLogger(__name__)

Publish = Callable[[torch.Tensor], None]


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
        compat.choose_as_if_alone(self.model_runner)
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
        compat.use_graph_runner(self.model_runner, OrthrusGraphRunner)
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
        compat.widen_req_to_token_rows(config.block_size)
        compat.refuse_requests(partial(refusal, are_seeded=get_exec().deterministic.enable_deterministic_inference))
        compat.stop_at_first_match()
        compat.begin_llguidance_behind_a_reasoning()
        compat.continue_sessions_at_the_end()
        layers = self.model_runner.model_config.hf_config.num_hidden_layers
        compat.check_weight_updates(partial(folder_problem, num_layers=layers))
        logger.info(
            "ORTHRUS drafts blocks of %d tokens and verifies %d of them per round.",
            config.block_size,
            self.speculative_num_draft_tokens,
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
        self._runner.capture_wide_draft()

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

        on_publish is called once with the new committed lengths [bs]; grammar_barrier brings the grammars of the
        batch to its committed state.
        """
        if batch.forward_mode.is_extend() or batch.is_extend_in_batch:
            return self._prefill(batch, on_publish)
        return self._round(batch, on_publish, grammar_barrier)

    def _prefill(self, batch: ScheduleBatch, on_publish: Publish | None) -> GenerationBatchResult:
        self._history.resume(batch)
        result = self._target_worker.forward_batch_generation(batch)
        self._history.start(batch, result.next_token_ids)
        result.new_seq_lens = batch.seq_lens
        result.next_draft_input = OrthrusState(result.next_token_ids, batch.seq_lens)
        _publish(on_publish, batch.seq_lens)
        return result

    def _round(
        self,
        batch: ScheduleBatch,
        on_publish: Publish | None,
        grammar_barrier: Callable[[], None] | None,
    ) -> GenerationBatchResult:
        prefix_lens = batch.seq_lens
        if prefix_lens.is_cuda:
            # Made on another stream under overlap scheduling.
            prefix_lens.record_stream(torch.cuda.current_stream())

        layout = self._runner.layout(batch)
        fused = self._runner.round(batch, layout) if _is_plain(batch) else None
        if fused is not None:
            path = Path.GRAPH
            verdict = accept_greedy(*fused, prefix_lens)
            logits_output = LogitsProcessorOutput(next_token_logits=None)
        else:
            verdict, logits_output, path = self._two_passes(batch, layout, grammar_barrier)
        self._paths.count(path)

        _publish(on_publish, verdict.new_seq_lens)
        return GenerationBatchResult(
            logits_output=logits_output,
            next_token_ids=verdict.tokens.flatten(),
            accept_lens=verdict.accept_lens,
            next_draft_input=OrthrusState(verdict.bonus, verdict.new_seq_lens),
            new_seq_lens=verdict.new_seq_lens,
            speculative_num_draft_tokens=verdict.tokens.shape[1],
            can_run_cuda_graph=path is not Path.EAGER,
        )

    def _two_passes(
        self, batch: ScheduleBatch, layout: DraftBlock, grammar_barrier: Callable[[], None] | None
    ) -> tuple[Verdict, LogitsProcessorOutput, Path]:
        """Draft, then verify, for whatever is not in one graph: grammars, sampling and other options, large batches."""
        width = self.speculative_num_draft_tokens
        adjustments = self._history.adjustments(batch)
        model = self.model_runner.model
        choice = TokenChoice(model, batch, layout.ids[:, 0], adjustments, width, self._sampling_backend)
        constrained = self._grammars.rows_of(batch.reqs) if batch.has_grammar else []
        guided = constrained if self._grammars.changes_drafts else []

        draft = self._runner.draft(batch, layout)
        drafts = choice.draft(draft.hidden_states[:, : width - 1], guided, self._grammars.num_candidates)
        choose = self._choose(batch, constrained, drafts, grammar_barrier) if constrained else None
        prepared = self._runner.prepare_verify(batch, layout, draft, drafts.block)
        chosen = choose() if choose is not None and guided else None
        if chosen is not None:
            drafts.propose_inplace(chosen.rows, chosen.drafts)
        verify = self._runner.verify(prepared)
        # Verify needs no masks, and the masks no result of verify: what follows on the host runs at the same time.
        if choose is not None and chosen is None:
            chosen = choose()
        masks = None
        if chosen is not None:
            # Whether nothing but the choice itself would tell that a mask was left out.
            can_be_spared = (
                choice.greedy_requests.issuperset(constrained)
                and not batch.return_logprob
                and not batch.sampling_info.has_custom_logit_processor
            )
            best_of = partial(_best_of, choice, drafts, verify.hidden_states, constrained) if can_be_spared else None
            masks = RowMasks(self._grammars.masks(chosen, best_of), constrained)
        logprobs = RoundLogprobs(batch, width) if batch.return_logprob else None
        verdict = choice.judge(drafts, verify.hidden_states, masks, logprobs)
        logits_output = LogitsProcessorOutput(next_token_logits=None)
        if logprobs is not None:
            logprobs.write_to(logits_output)
        self._history.extend(batch, adjustments, drafts.block, verdict)
        return verdict, logits_output, Path.SPLIT if draft.replayed and verify.replayed else Path.EAGER

    def _choose(
        self, batch: ScheduleBatch, constrained: Sequence[int], drafts: Drafts, barrier: Callable[[], None] | None
    ) -> Callable[[], Chosen]:
        """Start the copy that the constrained requests' grammars need; to be called is the host's part."""
        # What prefill left there would be applied again by SGLang's sampler.
        batch.sampling_info.grammar_mask = None
        candidates = drafts.candidates
        if candidates is None:
            candidates = drafts.tokens[rows_index(constrained, drafts.tokens.device)][:, :, None]
        vocab_size = batch.sampling_info.vocab_size
        return partial(self._grammars.choose, batch.reqs, constrained, Proposal(candidates), vocab_size, barrier)


def _best_of(choice: TokenChoice, drafts: Drafts, hidden_states: torch.Tensor, requests: Sequence[int]) -> Ids:
    return choice.best_tokens(drafts, hidden_states).cpu().numpy()[requests]


def _is_plain(batch: ScheduleBatch) -> bool:
    """Greedy requests without options, whose rounds fit one CUDA graph."""
    info = batch.sampling_info
    return info.is_all_greedy and not (batch.has_grammar or batch.return_logprob or are_adjusted(info))


def _publish(on_publish: Publish | None, new_seq_lens: torch.Tensor) -> None:
    """The synchronous scheduler passes no callback and reads `new_seq_lens` off the result."""
    if on_publish is not None:
        on_publish(new_seq_lens)
