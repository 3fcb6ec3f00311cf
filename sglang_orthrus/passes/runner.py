"""The two forward passes of a round at any of a few widths, over SGLang's target runner and its one KV pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_spec
from sglang.srt.utils.common import get_available_gpu_memory

from sglang_orthrus.compat.ledger import SHARED_BY_WORKERS, depends_on
from sglang_orthrus.config import DualViewConfig
from sglang_orthrus.core import OrthrusBlockInput, OrthrusState, Phase, RoundBatch, Verdict, snapshot
from sglang_orthrus.passes.attention import plans_in_graphs, verifying, wait_only_for_verifying
from sglang_orthrus.passes.blocks import draft_block
from sglang_orthrus.passes.cuda_graphs import NarrowGraphRunner, OrthrusGraphRunner
from sglang_orthrus.passes.flash_attention import schedule_once_a_pass

logger = logging.getLogger(__name__)


class Pass(NamedTuple):
    """A finished pass.

    Attributes:
        hidden_states: [bs, width, hidden]; the next replay of a graph overwrites them.
        replayed: whether a CUDA graph ran it.
    """

    hidden_states: torch.Tensor
    replayed: bool


class PreparedPass(NamedTuple):
    """A pass that is ready to run."""

    batch: RoundBatch
    forward_batch: ForwardBatch


class _Profile(NamedTuple):
    """What passes of one width run on: attention backends and graphs are made for one."""

    backend: Any
    graphs: OrthrusGraphRunner | None = None


@depends_on(
    "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
    "batch",
    "model_runner",
    "return_hidden_states_before_norm",
    what="called for every pass",
    why="no public call runs one more forward pass over a batch",
    until=SHARED_BY_WORKERS,
)
@depends_on(
    "sglang.srt.model_executor.forward_batch_info:ForwardBatch.mark_forward_metadata_ready",
    what="called for a verify pass whose graph replays on the draft's plan",
    why="SGLang would plan again (the DFLASH worker calls it, too)",
    until=SHARED_BY_WORKERS,
)
@depends_on(
    "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
    "batch",
    "forward_batch",
    "is_verify",
    what="called for both passes",
    why="no public call runs one more forward pass over a batch",
    until=SHARED_BY_WORKERS,
)
@depends_on(
    "sglang.srt.utils.common:get_available_gpu_memory",
    "device",
    "gpu_id",
    "empty_cache",
    what="called before and after graphs of narrower widths are captured",
    why="SGLang reports the memory of all graphs (the UNO worker calls it, too)",
    until=SHARED_BY_WORKERS,
)
class DualViewRunner:
    """Runs draft and verify passes on a target worker, as CUDA graphs where they were captured.

    Both passes of a round have its width: draft and verify share slots, plans and buffers.

    Args:
        target_worker: SGLang's `TpModelWorker`, whose model is an `OrthrusLM`.
        config: the trained block.
        widths: ascending, in 1..F; SGLang's own backend and graphs are for the largest.
    """

    def __init__(self, target_worker: Any, config: DualViewConfig, widths: Sequence[int]) -> None:
        self._target_worker = target_worker
        self._config = config
        self._model_runner = target_worker.model_runner
        *self._narrow_widths, self._largest = widths
        self._queued_at: float | None = None
        self._narrow: dict[int, _Profile] = {}

    @property
    def attention_backends(self) -> tuple[Any, ...]:
        """SGLang's own, and those of narrower widths."""
        return (self._model_runner.attn_backend, *(profile.backend for profile in self._narrow.values()))

    @property
    def queued_at(self) -> float:
        """When the first pass over the blocks that were laid out last was queued, in seconds."""
        assert self._queued_at is not None, "no pass was queued"
        return self._queued_at

    def init_attention(self, make_backend: Callable[[], Any]) -> None:
        """Make the backends of narrower widths. Needs the KV pool."""
        for width in self._narrow_widths:
            with get_spec().override(speculative_num_draft_tokens=width):
                self._narrow[width] = _Profile(make_backend())
        for backend in self.attention_backends:
            wait_only_for_verifying(backend)
            schedule_once_a_pass(verifying(backend))

    def capture_narrow(self) -> dict[str, float]:
        """Capture the graphs of narrower widths if CUDA graphs are on.

        Returns the memory that they took in GB, by SGLang's name of the graphs' use; nothing if nothing was captured.
        """
        runner = self._model_runner
        if not self._narrow or not isinstance(runner.decode_cuda_graph_runner, OrthrusGraphRunner):
            return {}
        started = time.perf_counter()
        before = get_available_gpu_memory(runner.device, runner.gpu_id, empty_cache=False)
        for width, profile in self._narrow.items():
            with self._at(width):
                graphs = NarrowGraphRunner(runner, attn_backend=profile.backend, speculative_num_draft_tokens=width)
            self._narrow[width] = profile._replace(graphs=graphs)
        taken = before - get_available_gpu_memory(runner.device, runner.gpu_id, empty_cache=False)
        seconds = time.perf_counter() - started
        logger.info("ORTHRUS captured CUDA graphs of its narrower widths in %.1f s, %.2f GB.", seconds, taken)
        return {"target_verify": taken}

    @property
    def graph_sizes(self) -> dict[int, list[int]]:
        """The batch sizes that have graphs, by width."""
        runners = {width: profile.graphs for width, profile in self._narrow.items()}
        runners[self._largest] = self._model_runner.decode_cuda_graph_runner
        return {width: list(getattr(runner, "capture_bs", ())) for width, runner in runners.items()}

    def lay_out(self, batch: ScheduleBatch, width: int) -> RoundBatch:
        """A decode batch, whose anchors are in `batch.spec_info`, with blocks of mask tokens laid out."""
        self._queued_at = None
        blocks = draft_block(
            batch.spec_info.bonus_tokens,
            batch.seq_lens,
            batch.req_pool_indices,
            batch.req_to_token_pool.req_to_token,
            width=width,
            mask_token_id=self._config.mask_token_id,
        )
        return RoundBatch(batch, blocks)

    def next_step(self, batch: RoundBatch, verdict: Verdict) -> RoundBatch:
        """The batch behind a step that drafted nothing, while nobody has seen its result."""
        own = snapshot(batch.scheduled)
        own.seq_lens = verdict.new_seq_lens
        own.seq_lens_cpu = None if batch.known_lens is None else batch.known_lens + 1
        own.spec_info = OrthrusState(verdict.bonus, verdict.new_seq_lens)
        return self.lay_out(own, batch.width)

    def fused(self, batch: RoundBatch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A greedy round in one CUDA graph, or None if none was captured for this batch.

        Returns the verified block, to be used before the next round, and the AR view's next tokens, both [bs, Q].
        """
        with self._at(batch.width):
            graphs = self._model_runner.decode_cuda_graph_runner
            if not isinstance(graphs, OrthrusGraphRunner):
                return None
            prepared = self._prepare(batch, Phase.ROUND)
            if not graphs.can_run_graph(prepared.forward_batch):
                return None
            replayed = self._run(prepared).can_run_cuda_graph
        assert replayed, "run eagerly, a round would be one verify pass over mask tokens"
        bs = prepared.forward_batch.batch_size
        # The next round overwrites both while the overlap scheduler may still copy the output to the host.
        return graphs.block[:bs], graphs.predictions[:bs].clone()

    def draft(self, batch: RoundBatch) -> Pass:
        """Diffusion view over the whole block; row j predicts position C+j+1, so the last row is of no use.

        Writes the block's diffusion K/V to its slots.
        """
        with self._at(batch.width):
            return self._forward(self._prepare(batch, Phase.DRAFT))

    def prepare_verify(self, batch: RoundBatch, draft: Pass | None) -> PreparedPass:
        """All of a verify pass that does not depend on the drafts; the host may do this while a GPU drafts.

        draft: the pass on the same batch; None if nothing is drafted.
        """
        # The mask tokens stand for the drafts.
        with self._at(batch.width):
            prepared = self._prepare(batch, Phase.VERIFY)
        # A plan knows nothing of causality: the draft's graph left buffers and plan as verify's graph wants them.
        if draft is not None and draft.replayed:
            prepared.forward_batch.mark_forward_metadata_ready()
        return prepared

    def verify(self, prepared: PreparedPass, block: torch.Tensor) -> Pass:
        """AR view over the anchor and the drafts, block: [bs, Q] int64. Overwrites the slots with AR K/V."""
        ids = block.flatten()
        prepared.forward_batch.input_ids = prepared.forward_batch.spec_info.draft_token = ids
        with self._at(block.shape[1]):
            return self._forward(prepared)

    def _forward(self, prepared: PreparedPass) -> Pass:
        result = self._run(prepared)
        width = prepared.forward_batch.spec_info.draft_token_num
        hidden_states = result.logits_output.hidden_states.unflatten(0, (-1, width))
        return Pass(hidden_states, result.can_run_cuda_graph)

    def _prepare(self, batch: RoundBatch, phase: Phase) -> PreparedPass:
        own, block = snapshot(batch.scheduled), batch.blocks
        own.forward_mode = ForwardMode.TARGET_VERIFY
        own.input_ids = block.ids.flatten()
        own.out_cache_loc = block.slots.flatten()
        own.seq_lens_cpu = batch.known_lens
        own.spec_info = OrthrusBlockInput(
            draft_token=own.input_ids,
            positions=block.positions.flatten(),
            draft_token_num=batch.width,
            phase=phase,
        )
        forward_batch = ForwardBatch.init_new(
            own,
            self._model_runner,
            capture_hidden_mode=own.spec_info.capture_hidden_mode,
            return_hidden_states_before_norm=False,
        )
        return PreparedPass(batch, forward_batch)

    @contextmanager
    def _at(self, width: int) -> Iterator[None]:
        """Have SGLang's runner use the backend and graphs of a width (as its `SpecRuntimeState` does)."""
        if width == self._largest:
            yield
            return
        runner, profile = self._model_runner, self._narrow[width]
        backend, graphs = runner.attn_backend, runner.decode_cuda_graph_runner
        runner.attn_backend, runner.decode_cuda_graph_runner = profile.backend, profile.graphs
        try:
            yield
        finally:
            runner.attn_backend, runner.decode_cuda_graph_runner = backend, graphs

    def _run(self, prepared: PreparedPass) -> Any:
        batch, forward_batch = prepared
        graphs = self._model_runner.decode_cuda_graph_runner
        lacks_lens = batch.known_lens is None and plans_in_graphs(self._model_runner.attn_backend)
        if lacks_lens and (graphs is None or not graphs.can_run_graph(forward_batch)):
            # FlashInfer plans this one on the host. Both passes of the round get what is waited for here.
            batch.wait_for_lens()
        if batch.known_lens is not None:
            # Planners want the block in them (as DFLASH gives them).
            forward_batch.seq_lens_cpu = batch.known_lens + forward_batch.spec_info.draft_token_num
            forward_batch.seq_lens_sum = int(forward_batch.seq_lens_cpu.sum())
        result = self._target_worker.forward_batch_generation(batch=None, forward_batch=forward_batch, is_verify=True)
        self._queued_at = self._queued_at or time.perf_counter()
        return result
