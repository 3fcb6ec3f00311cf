"""Acceptance of drafts, as pure tensor functions.

Letters: Q verify width: the anchor and Q-1 drafts. Row j of the verify pass has seen tokens 0..j of the block, so
its prediction is what the autoregressive view puts after them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Verdict(NamedTuple):
    """What a round commits, in SGLang's spec-V2 result layout; tensors on the model's device.

    Attributes:
        accept_lens: [bs] int32, tokens emitted this round, bonus included, in 1..Q.
        tokens: [bs, Q] int64, row i holds the accepted drafts, then the bonus, then padding.
        bonus: [bs] int64, the last emitted token, which is the next round's anchor.
        new_seq_lens: [bs] committed lengths after the round, in the dtype of the prefix lengths.
    """

    accept_lens: torch.Tensor
    tokens: torch.Tensor
    bonus: torch.Tensor
    new_seq_lens: torch.Tensor


def accept_greedy(block: torch.Tensor, predictions: torch.Tensor, prefix_lens: torch.Tensor) -> Verdict:
    """Accept the longest draft prefix that the autoregressive view itself would have emitted (paper, section 3.3).

    Args:
        block: [bs, Q] the anchor and the drafts that were verified.
        predictions: [bs, Q] the AR view's next token after each of them.
        prefix_lens: [bs] committed lengths C before the round.
    """
    agrees = block[:, 1:] == predictions[:, :-1]
    num_accepted = agrees.cumprod(dim=1).sum(dim=1)
    bonus = predictions.gather(1, num_accepted[:, None])
    # Accepted drafts equal the predictions in their places, and so does the bonus: the prediction row is the output.
    return Verdict(
        accept_lens=(num_accepted + 1).int(),
        tokens=predictions,
        bonus=bonus.squeeze(1),
        new_seq_lens=prefix_lens + (num_accepted + 1).to(prefix_lens.dtype),
    )
