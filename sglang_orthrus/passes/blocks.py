"""The draft block of one round, as pure tensor arithmetic.

Letters: C committed tokens, the anchor (the last token) at position C and not in the cache; Q width of the round.

    positions  C        C+1 ... C+Q-1
    input      anchor   MASK ... MASK          Q tokens
    slots      req_to_token[request, C : C+Q]  draft writes diffusion KV, verify overwrites it with AR KV
"""

from __future__ import annotations

from functools import cache

import torch

from sglang_orthrus.core import DraftBlock


def draft_block(
    anchors: torch.Tensor,
    prefix_lens: torch.Tensor,
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    *,
    width: int,
    mask_token_id: int,
) -> DraftBlock:
    """Lay out each request's draft block (paper, section 3.2; SGLang's `_prepare_dflash_draft_block_unchecked`).

    Args:
        anchors: [bs] token ids that are emitted but not yet in the cache.
        prefix_lens: [bs] committed lengths C.
        req_pool_indices: [bs] rows of `req_to_token`.
        req_to_token: [requests, columns] slot of every position; needs columns up to max(C) + width.
        width: Q.
        mask_token_id: id at the Q-1 positions to be drafted.
    """
    # As few kernels as possible: the host launches them one by one in every round.
    ids, positions = anchors.long()[:, None], prefix_lens.long()[:, None]
    if width > 1:
        masks = _masks(width - 1, mask_token_id, anchors.device)
        ids = torch.cat((ids, masks.expand(len(anchors), -1)), dim=1)
        positions = positions + _offsets(width, anchors.device)
    slots = req_to_token[req_pool_indices.long()[:, None], positions].long()
    return DraftBlock(ids, positions, slots)


@cache
def _offsets(width: int, device: torch.device) -> torch.Tensor:
    return torch.arange(width, device=device)


@cache
def _masks(count: int, mask_token_id: int, device: torch.device) -> torch.Tensor:
    return torch.full((count,), mask_token_id, dtype=torch.int64, device=device)
