"""Greedy verification under masks, for tests of what masks decide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def judged(drafts: Sequence[int], scores: np.ndarray, masks: torch.Tensor, stop: int) -> list[int]:
    """What a round emits, up to a stop token. drafts: [Q-1]; scores: [Q, V]; masks: [Q, W] int32."""
    emitted: list[int] = []
    for row, mask in enumerate(masks.numpy()):
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").astype(bool)
        emitted.append(int(np.where(allowed, scores[row], -np.inf).argmax()))
        if row == len(drafts) or emitted[-1] != drafts[row] or emitted[-1] == stop:
            break
    return emitted
