"""Log probabilities of the tokens that a round emits, in the form that SGLang's result processing expects."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprob_processor import get_token_ids_logprobs, get_top_logprobs
from sglang.srt.managers.schedule_batch import ScheduleBatch

from sglang_orthrus.rows import Piece


class RoundLogprobs:
    """Collects them piece by piece: SGLang's `compute_spec_logprobs` wants the logits of all rows at once.

    Args:
        batch: whose `return_logprob` is set.
        width: Q, rows per request.
    """

    def __init__(self, batch: ScheduleBatch, width: int) -> None:
        self._width = width
        self._wanted = [req.return_logprob for req in batch.reqs]
        self._top = batch.top_logprobs_nums or [0] * len(batch.reqs)
        self._ids = batch.token_ids_logprobs or [None] * len(batch.reqs)
        self._chosen = torch.zeros(len(batch.reqs), width, device=batch.device)
        nothing = torch.empty(0)
        rows = len(batch.reqs) * width
        self._top_values: list[torch.Tensor] | None = [nothing] * rows if any(self._top) else None
        self._top_ids: list[torch.Tensor] = [nothing] * rows
        has_ids = any(ids is not None for ids in self._ids)
        self._ids_values: list[torch.Tensor] | None = [nothing] * rows if has_ids else None
        self._ids_ids: list[list[int]] = [[] for _ in range(rows)]

    def wants(self, piece: Piece) -> bool:
        """Whether a request of the piece asks for log probabilities."""
        return any(self._wanted[request] for request in piece.requests)

    def add(self, piece: Piece, logits: torch.Tensor, temperatures: torch.Tensor | None, tokens: torch.Tensor) -> None:
        """Take them from a piece's logits.

        Args:
            logits: [r * Q, V], adjusted, not divided by temperatures.
            temperatures: [r * Q, 1]; None for greedy requests, whose temperature plain SGLang ignores.
            tokens: [r, Q] int64, emitted after each row.
        """
        if temperatures is not None and not envs.SGLANG_RETURN_ORIGINAL_LOGPROB.get():
            logits = logits / temperatures
        logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        logprobs.clamp_(min=torch.finfo(logprobs.dtype).min)
        self._chosen[piece.index] = logprobs.gather(1, tokens.reshape(-1, 1)).view(tokens.shape)
        rows = [request * self._width + row for request in piece.requests for row in range(self._width)]
        top = [self._top[request] for request in piece.requests for _ in range(self._width)]
        if self._top_values is not None and any(top):
            values, found = get_top_logprobs(logprobs, top, no_copy_to_cpu=True)
            for row, row_values, row_ids in zip(rows, values, found, strict=True):
                self._top_values[row], self._top_ids[row] = row_values, row_ids
        ids = [self._ids[request] for request in piece.requests for _ in range(self._width)]
        if self._ids_values is not None and any(wanted is not None for wanted in ids):
            values, found = get_token_ids_logprobs(logprobs, ids, no_copy_to_cpu=True)
            for row, row_values, row_ids in zip(rows, values, found, strict=True):
                self._ids_values[row], self._ids_ids[row] = row_values, row_ids

    def write_to(self, output: LogitsProcessorOutput) -> None:
        """Hand them to the scheduler."""
        result: dict[str, Any] = {"next_token_logprobs": self._chosen}
        if self._top_values is not None:
            result |= {
                "next_token_top_logprobs_val": self._top_values,
                "next_token_top_logprobs_idx": self._top_ids,
            }
        if self._ids_values is not None:
            result |= {
                "next_token_token_ids_logprobs_val": self._ids_values,
                "next_token_token_ids_logprobs_idx": self._ids_ids,
            }
        for name, value in result.items():
            setattr(output, name, value)
