"""The two forward passes of a round, over SGLang's target runner and its one KV pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from sglang_orthrus.block import DraftBlock, draft_block
from sglang_orthrus.config import DualViewConfig
from sglang_orthrus.spec_input import OrthrusBlockInput, View


class DualViewRunner:
    """Runs draft and verify passes eagerly on a target worker.

    Args:
        target_worker: SGLang's `TpModelWorker`, whose model is an `OrthrusLM`.
        config: the trained block.
        verify_width: Q, tokens verified per request and round; at most the block size.
    """

    def __init__(self, target_worker: Any, config: DualViewConfig, verify_width: int) -> None:
        self._target_worker = target_worker
        self._config = config
        self._verify_width = verify_width

    def layout(self, batch: ScheduleBatch) -> DraftBlock:
        """Block ids, positions and slots of a decode batch, whose anchors are in `batch.spec_info`."""
        return draft_block(
            batch.spec_info.bonus_tokens,
            batch.seq_lens,
            batch.req_pool_indices,
            batch.req_to_token_pool.req_to_token,
            width=self._config.block_size,
            mask_token_id=self._config.mask_token_id,
        )

    def draft(self, batch: ScheduleBatch, block: DraftBlock) -> torch.Tensor:
        """Diffusion view over the whole block: logits [bs, Q-1, vocabulary]; row j predicts position C+j+1.

        Writes the block's diffusion K/V to its slots; the block always has its trained width.
        """
        num_drafts = self._verify_width - 1
        logits = self._forward(batch, block, View.DIFFUSION, num_drafts).next_token_logits
        return logits.unflatten(0, (-1, num_drafts))

    def verify(self, batch: ScheduleBatch, block: DraftBlock, tokens: torch.Tensor) -> LogitsProcessorOutput:
        """AR view over the anchor and the drafts: logits [bs * Q, vocabulary].

        Overwrites the first Q slots with AR K/V. tokens: [bs, Q] anchor and drafts.
        """
        width = self._verify_width
        narrowed = DraftBlock(tokens, block.positions[:, :width], block.slots[:, :width])
        return self._forward(batch, narrowed, View.AR, None)

    def _forward(
        self, batch: ScheduleBatch, block: DraftBlock, view: View, num_drafts: int | None
    ) -> LogitsProcessorOutput:
        width = block.ids.shape[1]
        batch.forward_mode = ForwardMode.TARGET_VERIFY
        batch.input_ids = block.ids.flatten()
        batch.out_cache_loc = block.slots.flatten()
        batch.spec_info = OrthrusBlockInput(
            draft_token=batch.input_ids,
            positions=block.positions.flatten(),
            draft_token_num=width,
            view=view,
            num_drafts=num_drafts,
        )
        with _host_lens_including_block(batch, width):
            forward_batch = ForwardBatch.init_new(
                batch,
                self._target_worker.model_runner,
                capture_hidden_mode=batch.spec_info.capture_hidden_mode,
                return_hidden_states_before_norm=False,
            )
        result = self._target_worker.forward_batch_generation(batch=None, forward_batch=forward_batch, is_verify=True)
        return result.logits_output


@contextmanager
def _host_lens_including_block(batch: ScheduleBatch, width: int) -> Iterator[None]:
    """Attention planners want the host lengths with the block, the device lengths without (as DFLASH gives them)."""
    lens, total = batch.seq_lens_cpu, batch.seq_lens_sum
    if lens is not None:
        batch.seq_lens_cpu = lens + width
        batch.seq_lens_sum = int(batch.seq_lens_cpu.sum())
    try:
        yield
    finally:
        batch.seq_lens_cpu, batch.seq_lens_sum = lens, total
