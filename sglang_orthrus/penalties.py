"""Frequency, presence and repetition penalties at every position of a block, as tensor functions.

Letters: n requests, W rows of a block, V vocabulary, K tokens whose order inside the block matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Penalties:
    """The parameters of requests, each [n] fp32; 0, 0 and 1 leave logits as they are."""

    frequency: torch.Tensor
    presence: torch.Tensor
    repetition: torch.Tensor

    def at(self, rows: torch.Tensor | slice) -> Penalties:
        """The same for some of the requests."""
        return Penalties(self.frequency[rows], self.presence[rows], self.repetition[rows])


def penalise_inplace(
    logits: torch.Tensor, counts: torch.Tensor, tokens: torch.Tensor, sees: torch.Tensor, penalties: Penalties
) -> None:
    """Penalise what occurs in a request's output, as plain SGLang does: additive penalties, then scaling.

    Args:
        logits: [n, W, V] fp32, changed in place.
        counts: [n, V] int, occurrences in the output before the block.
        tokens: [n, K] int64, tokens of the block.
        sees: [W, K] bool, which of them come before the token that a row chooses.
        penalties: of the requests.
    """
    index = tokens[:, None, :].expand(-1, logits.shape[1], -1)
    untouched = logits.gather(2, index)
    logits.copy_(_penalised(logits, counts[:, None, :], penalties))
    # Whatever occurs in the block is written once more: a token that occurs twice gets the same value twice.
    is_same = (tokens[:, :, None] == tokens[:, None, :]).float()
    counts_there = counts.gather(1, tokens)[:, None, :] + sees.float() @ is_same
    logits.scatter_(2, index, _penalised(untouched, counts_there, penalties))


def _penalised(logits: torch.Tensor, counts: torch.Tensor, penalties: Penalties) -> torch.Tensor:
    occurs = counts > 0
    presence = torch.where(occurs, penalties.presence[:, None, None], 0)
    logits = logits - (penalties.frequency[:, None, None] * counts + presence)
    scale = torch.where(occurs, penalties.repetition[:, None, None], 1)
    return torch.where(logits < 0, logits * scale, logits / scale)


def forbid_inplace(logits: torch.Tensor, num_before: torch.Tensor, min_new: torch.Tensor, stops: torch.Tensor) -> None:
    """Keep requests from stopping before they have emitted `min_new` tokens.

    Args:
        logits: [n, W, V], changed in place.
        num_before: [n, W] int, tokens emitted before the one that a row chooses.
        min_new: [n] int, 0 to allow everything.
        stops: [n, S] int64, the tokens that stop a request, in any order, repeated at will.
    """
    too_early = num_before < min_new[:, None]
    index = stops[:, None, :].expand(-1, logits.shape[1], -1)
    allowed = logits.gather(2, index)
    logits.scatter_(2, index, allowed.masked_fill(too_early[:, :, None], float("-inf")))


class TokenCounts:
    """How often every token occurs in the outputs of running requests, on the device, one row per request.

    A row holds what comes before the request's anchor. It is written on the stream of the passes, so it is up to date
    when the host does not know the last round's result yet.

    Args:
        num_rows: rows of `req_to_token`.
        vocab_size: V.
        device: where the table lives.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device | str) -> None:
        self._table = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """[n] -> [n, V] int32."""
        return self._table[rows]

    def reset(self, rows: torch.Tensor) -> None:
        """Begin anew. rows: [n]."""
        self._table[rows] = 0

    def add(self, rows: torch.Tensor, tokens: torch.Tensor, lens: torch.Tensor) -> None:
        """Count the first `lens` tokens of every row. rows: [n] int64, tokens: [n, W] int64, lens: [n]."""
        counted = torch.arange(tokens.shape[1], device=tokens.device) < lens[:, None]
        index = rows[:, None] * self._table.shape[1] + tokens
        self._table.view(-1).index_add_(0, index.flatten(), counted.flatten().int())
