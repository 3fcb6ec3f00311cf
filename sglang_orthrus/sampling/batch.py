"""The requests of a round as far as their tokens go: in which groups they choose, and from which logits.

Every request chooses as plain SGLang would if it served that request alone: the largest logit, a draw with the noise of
its seed, or a draw at random. The first two are functions of the logits and the position.

Letters: r requests of a group, W rows of each, V vocabulary, K columns that a row can choose from.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from sglang.kernels.ops.sampling import softmax
from sglang.srt.layers.sampler import sampling_from_probs_torch, top_k_top_p_min_p_sampling_from_probs_torch

from sglang_orthrus.compat.ledger import SHARED_BY_SAMPLERS, depends_on
from sglang_orthrus.sampling.distributions import Support, joint_support, sequential_support, sorted_support
from sglang_orthrus.sampling.logit_adjustments import Adjustments, RowContext, RowMasks
from sglang_orthrus.sampling.request_groups import RequestGroup, greedy_groups, request_groups


@depends_on(
    "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
    "probs",
    "top_ks",
    "top_ps",
    "min_ps",
    "need_min_p_sampling",
    "sampling_seed",
    "positions",
    what="called for seeded rows with filters",
    why="the same function gives the same tokens",
    until=SHARED_BY_SAMPLERS,
)
@depends_on(
    "sglang.srt.layers.sampler:sampling_from_probs_torch",
    "probs",
    "sampling_seed",
    "positions",
    what="called for seeded rows without filters",
    why="the same function gives the same tokens",
    until=SHARED_BY_SAMPLERS,
)
@depends_on(
    "sglang.kernels.ops.sampling:softmax",
    "logits",
    what="called on rows that are sampled without a seed",
    why="SGLang's sampler uses it there",
    until=SHARED_BY_SAMPLERS,
)
class BatchSampler:
    """What draft and verification ask of the requests of one round.

    Args:
        model: an `OrthrusLM`, for its head, or `KnownLogits`.
        batch: in a decode round; its `spec_info` is not read.
        anchors: [bs] int64.
        adjustments: what the requests' options do to logits.
        width: Q of the round, tokens verified per request; 1 if nothing is drafted.
        sampling_backend: SGLang's, which decides what filters leave.

    Attributes:
        groups: of requests that choose alike.
        reqs: the requests.
        prefix_lens: [bs] committed lengths.
    """

    def __init__(
        self,
        model: Any,
        batch: Any,
        anchors: torch.Tensor,
        adjustments: Adjustments,
        width: int,
        sampling_backend: str,
    ) -> None:
        self.reqs = batch.reqs
        self.prefix_lens: torch.Tensor = batch.seq_lens
        self.anchors = anchors.long()
        self._model = model
        self._info = batch.sampling_info
        self._adjustments = adjustments
        self._sampling_backend = sampling_backend
        costly = adjustments.requests.union(row for row, req in enumerate(batch.reqs) if req.return_logprob)
        if batch.sampling_info.is_all_greedy and not costly:
            self.groups = tuple(greedy_groups(len(batch.reqs), width, anchors.device))
        else:
            params = [req.sampling_params for req in batch.reqs]
            self.groups = tuple(request_groups(params, width, anchors.device, costly))

    def draft_context(self, offsets: torch.Tensor) -> RowContext:
        """All that a draft row knows of the block is the anchor. offsets: [W] or [bs, W]."""
        width = offsets.shape[-1]
        visible = torch.ones(width, 1, dtype=torch.bool, device=offsets.device)
        host = self.anchors[:, None].tolist() if self._adjustments.read_outputs else None
        return RowContext(self.anchors[:, None], visible, offsets, host)

    def verify_context(self, block: torch.Tensor) -> RowContext:
        """A verify row knows the block up to its own token. block: [bs, Q]"""
        host = block.tolist() if self._adjustments.read_outputs else None
        return RowContext(block, *_rows_of_block(block.shape[1], block.device), host)

    def logits(
        self, hidden_states: torch.Tensor, group: RequestGroup, context: RowContext, masks: RowMasks | None = None
    ) -> torch.Tensor:
        """Of a group's rows, adjusted: [bs, W, hidden] -> [r, W, V]; fp32 where there is arithmetic with it."""
        states = hidden_states[group.index]
        # On a CPU XGrammar masks fp32 alone.
        in_fp32 = not group.kind.is_greedy or group.is_costly or (masks is not None and states.is_cpu)
        logits: torch.Tensor = self._model.logits(states, in_fp32=in_fp32).unflatten(0, states.shape[:2])
        self._adjustments.apply_inplace(logits, group, context, masks)
        return logits

    def draft_logits_at(self, states: torch.Tensor, group: RequestGroup, row: torch.Tensor) -> torch.Tensor:
        """Of one draft row of every request of a group: states [r, 1, hidden], row [r, 1] -> [r, 1, V] fp32."""
        logits: torch.Tensor = self._model.logits(states).unflatten(0, (-1, 1))
        offsets = self.anchors.new_zeros(self.anchors.shape[0], 1)
        offsets[group.index] = row
        self._adjustments.apply_inplace(logits, group, self.draft_context(offsets))
        return logits

    def is_function_of_logits(self, group: RequestGroup) -> bool:
        """Whether nothing is drawn at random."""
        return group.kind.is_greedy or self._info.sampling_seed is not None

    def predictions(self, logits: torch.Tensor, group: RequestGroup) -> torch.Tensor:
        """Greedy and seeded choices: [r, W, V] -> [r, W] int64."""
        if group.kind.is_greedy:
            return logits.argmax(dim=-1)
        positions = self.prefix_lens[group.index][:, None] + torch.arange(logits.shape[1], device=logits.device)
        # A seed acts on the very function that plain SGLang takes, with its deterministic softmax.
        probs = torch.softmax(self._scaled(logits, group), dim=-1)
        seeds = self._per_row(self._info.sampling_seed, group, probs.shape[0])
        if group.kind.is_filtered:
            top_ks, top_ps, min_ps = self._filters(group, probs.shape[0])
            tokens = top_k_top_p_min_p_sampling_from_probs_torch(
                probs, top_ks, top_ps, min_ps, False, seeds, positions.flatten()
            )
        else:
            tokens = sampling_from_probs_torch(probs, seeds, positions.flatten())
        return tokens.long().view(logits.shape[:2])

    def support(self, logits: torch.Tensor, group: RequestGroup) -> Support:
        """What rows draw from: [r, W, V] -> [r * W, K]."""
        probs = softmax(self._scaled(logits, group))
        if not group.kind.is_filtered:
            return Support(probs)
        top_ks, top_ps, min_ps = self._filters(group, probs.shape[0])
        if self._sampling_backend == "pytorch":
            return sorted_support(probs, top_ks, top_ps, min_ps, group.max_top_k)
        from sglang.srt.layers.sampler import top_k_renorm_prob, top_p_renorm_prob

        if group.kind.has_min_p:
            return sequential_support(probs, top_ks, top_ps, min_ps, top_k_renorm_prob, top_p_renorm_prob)
        return joint_support(probs, top_ks, top_ps, top_k_renorm_prob, top_p_renorm_prob)

    def temperatures(self, group: RequestGroup, num_rows: int) -> torch.Tensor | None:
        """[r * W, 1]; None for greedy requests, whose temperature plain SGLang ignores."""
        return None if group.kind.is_greedy else self._per_row(self._info.temperatures, group, num_rows)

    def _scaled(self, logits: torch.Tensor, group: RequestGroup) -> torch.Tensor:
        """[r, W, V] -> [r * W, V], divided by temperatures."""
        rows = logits.flatten(0, 1)
        return rows / self._per_row(self._info.temperatures, group, rows.shape[0])

    def _filters(self, group: RequestGroup, num_rows: int) -> list[torch.Tensor]:
        """top_ks, top_ps and min_ps, [r * W] each."""
        return [self._per_row(x, group, num_rows) for x in (self._info.top_ks, self._info.top_ps, self._info.min_ps)]

    def _per_row(self, parameter: torch.Tensor, group: RequestGroup, num_rows: int) -> torch.Tensor:
        """A parameter of requests, [bs, ...] -> [r * W, ...]."""
        width = num_rows // len(group.requests)
        return parameter[group.index].repeat_interleave(width, dim=0, output_size=num_rows)


class KnownLogits:
    """In place of a model whose head has run: for it, hidden states are logits."""

    def logits(self, hidden_states: torch.Tensor, *, in_fp32: bool = True) -> torch.Tensor:
        """A copy, since options are applied in place: [..., V] -> [rows, V]."""
        dtype = torch.float32 if in_fp32 else hidden_states.dtype
        return hidden_states.flatten(0, -2).to(dtype, copy=True)


@cache
def _rows_of_block(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of a block its verify rows know, [Q, Q] bool, and the rows' offsets, [Q]; not to be written to."""
    offsets = torch.arange(width, device=device)
    return offsets[:, None] >= offsets, offsets
