"""The output head where some requests of a batch have a grammar and others not: one product for all of them.

Letters: R of the bs requests are constrained; a block has `width` rows per request; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.constrained.base_grammar_backend import GrammarMask

from sglang_orthrus.models.orthrus import HEAD_ROWS


class _Piece(NamedTuple):
    """Logits of a few requests.

    Attributes:
        logits: [n, width, V].
        constrained: [r] which of the n are constrained, None if all are.
        slots: theirs among the constrained ones.
    """

    logits: torch.Tensor
    constrained: torch.Tensor | None
    slots: slice


def best_and_candidates(
    model: Any, hidden_states: torch.Tensor, rows: Sequence[int], count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The greedy choice after every row, and for constrained requests the best few: [bs, width], [R, width, count].

    Args:
        model: an `OrthrusLM`.
        hidden_states: [bs, width, hidden].
        rows: the constrained requests, ascending.
        count: candidates per row; the first is the greedy choice.
    """
    best, candidates = [], []
    for piece in _pieces(model, hidden_states, rows):
        if piece.constrained is None:
            found = piece.logits.topk(count, dim=-1).indices
            best.append(found[..., 0])
        else:
            found = piece.logits[piece.constrained].topk(count, dim=-1).indices
            best.append(piece.logits.argmax(dim=-1).index_copy(0, piece.constrained, found[..., 0]))
        candidates.append(found)
    return torch.cat(best), torch.cat(candidates)


def best_allowed(model: Any, hidden_states: torch.Tensor, rows: Sequence[int], mask: GrammarMask) -> torch.Tensor:
    """The greedy choice after every row, of what the mask allows where a request is constrained: [bs, width] int64.

    mask: [R * width, ...]; else as above.
    """
    width, best = hidden_states.shape[1], []
    for piece in _pieces(model, hidden_states, rows):
        mask_rows = slice(piece.slots.start * width, piece.slots.stop * width)
        own_mask = mask._replace(vocab_mask=mask.vocab_mask[mask_rows])
        if piece.constrained is None:
            own_mask.apply(piece.logits.flatten(0, 1))
            best.append(piece.logits.argmax(dim=-1))
        else:
            logits = piece.logits[piece.constrained]
            own_mask.apply(logits.flatten(0, 1))
            best.append(piece.logits.argmax(dim=-1).index_copy(0, piece.constrained, logits.argmax(dim=-1)))
    return torch.cat(best)


def _pieces(model: Any, hidden_states: torch.Tensor, rows: Sequence[int]) -> Iterator[_Piece]:
    """As many whole requests at a time as `HEAD_ROWS` has room for."""
    bs, width = hidden_states.shape[:2]
    step, slot = max(1, HEAD_ROWS // width), 0
    for start in range(0, bs, step):
        stop = min(start + step, bs)
        own = [row - start for row in rows if start <= row < stop]
        constrained = None
        if len(own) < stop - start:
            constrained = torch.tensor(own, dtype=torch.int64, device=hidden_states.device)
        logits = model.logits(hidden_states[start:stop]).unflatten(0, (-1, width))
        yield _Piece(logits, constrained, slice(slot, slot + len(own)))
        slot += len(own)
