"""Acceptance of drafts, as pure tensor functions.

Letters: Q verify width: the anchor and Q-1 drafts. Row j of the verify pass has seen tokens 0..j of the block, so
its prediction is what the autoregressive view puts after them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from sglang.srt.utils.common import async_h2d

from sglang_orthrus.core import Verdict


def accept_greedy(block: torch.Tensor, predictions: torch.Tensor, prefix_lens: torch.Tensor) -> Verdict:
    """Accept the longest draft prefix that the autoregressive view itself would have emitted (paper, section 3.3).

    Args:
        block: [bs, Q] the anchor and the drafts that were verified.
        predictions: [bs, Q] the AR view's next token after each of them.
        prefix_lens: [bs] committed lengths C before the round.
    """
    if block.shape[1] == 1:
        return accept_bonus(predictions[:, 0], prefix_lens)
    num_accepted = leading(block[:, 1:] == predictions[:, :-1])
    bonus = predictions.gather(1, num_accepted[:, None]).squeeze(1)
    # Accepted drafts equal the predictions at their positions, and so does the bonus: the prediction row is the output.
    return Verdict(*_lens(num_accepted, prefix_lens, predictions, bonus))


def accept_drafts(
    block: torch.Tensor, num_accepted: torch.Tensor, bonus: torch.Tensor, prefix_lens: torch.Tensor
) -> Verdict:
    """Commit drafts and the token that follows them, however they were judged.

    Args:
        block: [bs, Q] as above.
        num_accepted: [bs] int64, leading drafts that count, in 0..Q-1.
        bonus: [bs] int64, the token after them.
        prefix_lens: [bs] as above.
    """
    if block.shape[1] == 1:
        return accept_bonus(bonus, prefix_lens)
    tokens = block.roll(-1, dims=1).scatter_(1, num_accepted[:, None], bonus[:, None])
    return Verdict(*_lens(num_accepted, prefix_lens, tokens, bonus))


def accept_bonus(bonus: torch.Tensor, prefix_lens: torch.Tensor) -> Verdict:
    """Commit the tokens of a round that drafted nothing. bonus: [bs] int64; prefix_lens: [bs], as above."""
    return Verdict(torch.ones_like(bonus, dtype=torch.int32), bonus[:, None], bonus, prefix_lens + 1)


def with_bonus(verdict: Verdict, tokens: Mapping[int, int]) -> Verdict:
    """The verdict of a round that drafted nothing, with other tokens for some requests. tokens: by their rows."""
    rows, values = (
        async_h2d(list(own), dtype=torch.int64, device=verdict.bonus.device) for own in (tokens, tokens.values())
    )
    bonus = verdict.bonus.index_copy(0, rows, values)
    return verdict._replace(tokens=bonus[:, None], bonus=bonus)


def accept_nothing(block: torch.Tensor, prefix_lens: torch.Tensor) -> Verdict:
    """End a round that nobody waits for any more, without verification: the anchor again, and no draft.

    block: [bs, Q]; prefix_lens: [bs], as above.
    """
    anchors = block[:, 0]
    return accept_drafts(block, torch.zeros_like(anchors), anchors, prefix_lens)


def in_a_row(verdicts: Sequence[Verdict]) -> Verdict:
    """Those of steps that drafted nothing, each behind the former one, as of one round."""
    first, *_, last = verdicts
    tokens = torch.cat([verdict.tokens for verdict in verdicts], dim=1)
    return Verdict(first.accept_lens * len(verdicts), tokens, last.bonus, last.new_seq_lens)


def spread(verdict: Verdict | None, rows: Sequence[int], anchors: torch.Tensor, prefix_lens: torch.Tensor) -> Verdict:
    """What a round commits, if it ran for some requests only: nothing of the others.

    Args:
        verdict: of these; None if there are none.
        rows: their rows.
        anchors: [bs] int64, of all requests.
        prefix_lens: [bs], of all.
    """
    num_requests = len(anchors)
    if verdict is None:
        lens = torch.zeros(num_requests, dtype=torch.int32, device=anchors.device)
        return Verdict(lens, anchors[:, None], anchors, prefix_lens)
    index = async_h2d(list(rows), dtype=torch.int64, device=anchors.device)
    lens, tokens = (own.new_zeros(num_requests, *own.shape[1:]) for own in (verdict.accept_lens, verdict.tokens))
    return Verdict(
        lens.index_copy_(0, index, verdict.accept_lens),
        tokens.index_copy_(0, index, verdict.tokens),
        anchors.index_copy(0, index, verdict.bonus),
        prefix_lens.index_copy(0, index, verdict.new_seq_lens),
    )


def leading(agrees: torch.Tensor) -> torch.Tensor:
    """How many of the first entries hold: [n, drafts] bool -> [n] int64."""
    return agrees.cumprod(dim=1).sum(dim=1)


def _lens(
    num_accepted: torch.Tensor, prefix_lens: torch.Tensor, tokens: torch.Tensor, bonus: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    emitted = num_accepted + 1
    return emitted.int(), tokens, bonus, prefix_lens + emitted.to(prefix_lens.dtype)
