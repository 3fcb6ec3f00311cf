"""The blocks of constrained requests and their masks on the host, and how they get to the device.

Letters: Q verify width, W words of a mask row; a slot for each of a batch's R constrained requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_orthrus.grammar.cursor import ALL_ALLOWED, Ids, Masks


@dataclass(slots=True)
class Slot:
    """One request's part of the buffers, kept as views: slicing tensors takes longer than a token of the walk.

    Attributes:
        block: [Q] int64, the anchor's slot, then the drafts.
        drafts: [Q-1], the same.
        masks: [Q, W] int32.
        bits: [Q, W], the same.
        num_filled: so many leading rows may hold masks of earlier rounds; the rest allow all.
    """

    block: torch.Tensor
    drafts: Ids
    masks: torch.Tensor
    bits: Masks
    num_filled: int = 0

    def allow_all(self) -> None:
        """Wipe the masks."""
        # By NumPy: PyTorch would share so small a job among OpenMP threads.
        self.bits[: self.num_filled] = ALL_ALLOWED
        self.num_filled = 0


class BlockBuffers:
    """One set for every round, so the next one is to be written when the copies of this one are done.

    Attributes:
        blocks: [slots, Q] int64.
        masks: [slots * Q, W] int32.
        slots: views of both.
    """

    def __init__(self, width: int, device: str | torch.device) -> None:
        self._width = width
        self._device = torch.device(device)
        is_cpu = self._device.type == "cpu"
        self._copies = None if is_cpu else torch.get_device_module(self._device).Stream(self._device)
        self.blocks = torch.zeros(0, width, dtype=torch.int64)
        self.masks = torch.zeros(0, 0, dtype=torch.int32)
        self.slots: Sequence[Slot] = ()

    def take(self, count: int, grammar: Any, vocab_size: int) -> Sequence[Slot]:
        """The first `count` slots; there are made more where needed, pinned where that speeds up copies.

        grammar: any that is to fill masks; vocab_size: of the logits.
        """
        if count > len(self.slots):
            num_slots = max(count, 2 * len(self.slots))
            masks = grammar.allocate_vocab_mask(vocab_size, num_slots * self._width, "cpu")
            assert masks.shape[1] * 32 >= vocab_size, "an id of the logits may lie beyond the masks"
            self.masks = self._pinned(masks)
            self.blocks = self._pinned(torch.zeros(num_slots, self._width, dtype=torch.int64))
            self.slots = [
                Slot(block, block.numpy()[1:], own, own.numpy())
                for block, own in zip(self.blocks, self.masks.split(self._width), strict=True)
            ]
        return self.slots[:count]

    def set_drafts(self, drafts: Ids) -> None:
        """Of the first slots: [count, Q-1]."""
        self.blocks.numpy()[: len(drafts), 1:] = drafts

    def room_on_device(self, count: int) -> torch.Tensor:
        """For the blocks of the first slots, [count, Q] int64, made ahead: a GPU waits for the drafts."""
        return torch.empty(count, self._width, dtype=torch.int64, device=self._device)

    def drafts_on_device(self, room: torch.Tensor) -> torch.Tensor:
        """Of the first slots: [count, Q-1] int64, a view of the room that was made for their blocks."""
        return room.copy_(self.blocks[: len(room)], non_blocking=True)[:, 1:]

    def masks_on_device(self, count: int) -> torch.Tensor:
        """Of the first slots: [count * Q, W] int32. Copied beside the verify pass: 32 requests have 20 MB of them."""
        masks = self.masks[: count * self._width]
        if self._copies is None:
            return masks
        streams = torch.get_device_module(self._device)
        with streams.stream(self._copies):
            copy = masks.to(self._device, non_blocking=True)
        current = streams.current_stream()
        current.wait_stream(self._copies)
        copy.record_stream(current)
        return copy

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._copies is None or tensor.is_pinned() else tensor.pin_memory()
