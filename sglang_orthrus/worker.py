"""SGLang's speculative worker for ORTHRUS: the order of a round, no arithmetic."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_spec
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

from sglang_orthrus import compat, flashinfer_plans
from sglang_orthrus.admission import refusal
from sglang_orthrus.block import DraftBlock
from sglang_orthrus.checkpoint import folder_problem
from sglang_orthrus.config import DualViewConfig
from sglang_orthrus.constrained import BlockGrammars, Proposal
from sglang_orthrus.grammar_stats import GrammarStats
from sglang_orthrus.graph_runner import OrthrusGraphRunner
from sglang_orthrus.heads import best_allowed, best_and_candidates
from sglang_orthrus.model_runner import DualViewRunner
from sglang_orthrus.paths import Path, RoundPaths
from sglang_orthrus.settings import DraftMode
from sglang_orthrus.spec_input import OrthrusState
from sglang_orthrus.verify import accept_greedy

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
        reporting = {"log_interval": server_args.decode_log_interval, "with_metrics": server_args.enable_metrics}
        self._paths = RoundPaths(**reporting)
        self._grammars = BlockGrammars(
            DraftMode.from_env(),
            self.speculative_num_draft_tokens,
            self.device,
            target_worker.tokenizer,
            GrammarStats(**reporting),
        )
        # The pools and graphs are made after this, and requests arrive later still.
        compat.use_graph_runner(self.model_runner, OrthrusGraphRunner)
        if self.device != "cpu":
            model = self.model_runner.model_config
            size = flashinfer_plans.workspace_bytes(
                server_args.max_running_requests,
                config.block_size,
                model.num_attention_heads,
                model.num_key_value_heads,
                model.head_dim,
            )
            flashinfer_plans.set_workspace_size(size)
        compat.widen_req_to_token_rows(config.block_size)
        compat.refuse_requests(refusal)
        compat.stop_at_first_match()
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
        result = self._target_worker.forward_batch_generation(batch)
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
        fused = None if batch.has_grammar else self._runner.round(batch, layout)
        if fused is not None:
            block, predictions = fused
            path = Path.GRAPH
        else:
            block, predictions, path = self._two_passes(batch, layout, grammar_barrier)
        self._paths.count(path)

        verdict = accept_greedy(block, predictions, prefix_lens)
        _publish(on_publish, verdict.new_seq_lens)
        return GenerationBatchResult(
            logits_output=LogitsProcessorOutput(next_token_logits=None),
            next_token_ids=verdict.tokens.flatten(),
            accept_lens=verdict.accept_lens,
            next_draft_input=OrthrusState(verdict.bonus, verdict.new_seq_lens),
            new_seq_lens=verdict.new_seq_lens,
            speculative_num_draft_tokens=block.shape[1],
            can_run_cuda_graph=path is not Path.EAGER,
        )

    def _two_passes(
        self, batch: ScheduleBatch, layout: DraftBlock, grammar_barrier: Callable[[], None] | None
    ) -> tuple[torch.Tensor, torch.Tensor, Path]:
        """Draft, then verify, with what needs the host in between: the block and the AR view's next tokens, [bs, Q]."""
        model = self.model_runner.model
        rows = self._grammars.rows_of(batch.reqs) if batch.has_grammar else []
        draft = self._runner.draft(batch, layout)
        hidden_states = draft.hidden_states[:, : self.speculative_num_draft_tokens - 1]
        if not rows:
            block = torch.cat((layout.ids[:, :1], model.best_tokens(hidden_states)), dim=1)
            verify = self._runner.verify(batch, layout, block)
            predictions = model.best_tokens(verify.hidden_states)
        else:
            drafts, candidates = best_and_candidates(model, hidden_states, rows, self._grammars.num_candidates)
            block = torch.cat((layout.ids[:, :1], drafts), dim=1)
            constrain = partial(
                self._grammars.constrain,
                batch.reqs,
                rows,
                Proposal(candidates),
                batch.sampling_info.vocab_size,
                grammar_barrier,
            )
            if self._grammars.changes_drafts:
                constrained = constrain()
                block[constrained.rows, 1:] = constrained.drafts
                verify = self._runner.verify(batch, layout, block)
            else:
                # The walk needs no result of verify, and verify none of the walk: they run at the same time.
                verify = self._runner.verify(batch, layout, block)
                constrained = constrain()
            predictions = best_allowed(model, verify.hidden_states, rows, constrained.mask)
            # What prefill left there would be applied again by SGLang's sampler.
            batch.sampling_info.grammar_mask = None
        return block, predictions, Path.SPLIT if draft.replayed and verify.replayed else Path.EAGER


def _publish(on_publish: Publish | None, new_seq_lens: torch.Tensor) -> None:
    """The synchronous scheduler passes no callback and reads `new_seq_lens` off the result."""
    if on_publish is not None:
        on_publish(new_seq_lens)
