"""Who may attend to whom, as `mask_mod` functions that serve FlexAttention and dense masks alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def packed_causal(docs: Tensor) -> MaskMod:
    """Causal within each conversation of a packed row. docs [bs, length]."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (q >= kv) & (docs[b, q] == docs[b, kv])

    return mask_mod


def packed_blocks(docs: Tensor, anchors: Tensor, block_size: int) -> MaskMod:
    """Diffusion blocks over a packed row (the paper's training mask).

    Queries are the blocks of `anchors` [bs, n] laid end to end; keys are the row's AR keys [0, length) followed by the
    blocks' own keys. A block sees AR keys strictly before its anchor in the anchor's conversation, and all of itself.
    """
    length = docs.shape[1]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        anchor = anchors[b, q // block_size]
        past = torch.clamp(kv, max=length - 1)
        sees_past = (kv < anchor) & (docs[b, past] == docs[b, anchor])
        return sees_past | ((kv >= length) & ((kv - length) // block_size == q // block_size))

    return mask_mod


def dense(mask_mod: MaskMod, bs: int, q_len: int, kv_len: int, device: torch.device) -> Tensor:
    """The mask as booleans [bs, 1, q_len, kv_len], True where attention is allowed."""
    b = torch.arange(bs, device=device)[:, None, None, None]
    q = torch.arange(q_len, device=device)[None, None, :, None]
    kv = torch.arange(kv_len, device=device)[None, None, None, :]
    return mask_mod(b, torch.zeros_like(b), q, kv)


class MaskMaker:
    """Builds masks of one kind for batches of one shape: sparse block masks on CUDA, dense ones elsewhere.

    The inputs of the mask function live in buffers that are overwritten for each batch, so that compiled code sees
    the same function every time and is compiled once.
    """

    def __init__(
        self, make: Callable[..., MaskMod], inputs: tuple[Tensor, ...], q_len: int, kv_len: int, sparse: bool
    ) -> None:
        self._buffers = tuple(torch.zeros_like(tensor) for tensor in inputs)
        self._mask_mod = make(*self._buffers)
        self._shape = (inputs[0].shape[0], q_len, kv_len)
        self._sparse = sparse
        self._create = torch.compile(create_block_mask) if sparse else None

    def __call__(self, *inputs: Tensor) -> BlockMask | Tensor:
        for buffer, tensor in zip(self._buffers, inputs, strict=True):
            buffer.copy_(tensor)
        bs, q_len, kv_len = self._shape
        device = self._buffers[0].device
        if self._create is None:
            return dense(self._mask_mod, bs, q_len, kv_len, device)
        mask = self._create(self._mask_mod, bs, None, q_len, kv_len, device=device.type)
        assert isinstance(mask, BlockMask)
        return mask
