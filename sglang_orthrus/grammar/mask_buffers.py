"""The blocks of constrained requests and their masks on the host, and how they get to the device.

Letters: Q verify width of a round, W words of a mask row; a slot for each of a batch's R constrained requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sglang_orthrus.grammar.cursor import ALL_ALLOWED, Ids, Masks


@dataclass(frozen=True, slots=True)
class Slot:
    """One request's part of a round's blocks, kept as views: slicing tensors takes longer than a token of the walk.

    Attributes:
        block: [Q] int64, the anchor's slot, then the drafts.
        drafts: [Q-1], the same.
        masks: [Q, W] int32.
        bits: [Q, W], the same.
        are_filled: [Q], which rows may hold masks of this or earlier rounds; the rest allow all.
    """

    block: torch.Tensor
    drafts: Ids
    masks: torch.Tensor
    bits: Masks
    are_filled: npt.NDArray[np.bool_]

    def allow_all(self) -> None:
        """Wipe the masks."""
        # By NumPy: PyTorch would share so small a job among OpenMP threads.
        self.bits[self.are_filled] = ALL_ALLOWED
        self.are_filled[:] = False


class HostBlocks(NamedTuple):
    """The blocks of one round, all of one width, and their masks.

    Attributes:
        ids: [R, Q] int64.
        masks: [R * Q, W] int32.
        slots: [R] views of both.
    """

    ids: torch.Tensor
    masks: torch.Tensor
    slots: Sequence[Slot]

    @property
    def width(self) -> int:
        """Q."""
        return self.ids.shape[1]

    def set_drafts(self, drafts: Ids) -> None:
        """drafts: [R, Q-1]."""
        self.ids.numpy()[:, 1:] = drafts


class BlockBuffers:
    """One set for every round, so the next one is to be written when the copies of this one are done.

    Blocks lie one behind the other, whatever their width: each row belongs to another slot in a round of another width.

    Args:
        max_width: of any round.
        device: of the model.
    """

    def __init__(self, max_width: int, device: str | torch.device) -> None:
        self._max_width = max_width
        self._device = torch.device(device)
        is_cpu = self._device.type == "cpu"
        self._copies = None if is_cpu else torch.get_device_module(self._device).Stream(self._device)
        self._ids = torch.zeros(0, dtype=torch.int64)
        self._masks = torch.zeros(0, 0, dtype=torch.int32)
        self._are_filled = np.zeros(0, np.bool_)
        self._slots: defaultdict[int, list[Slot]] = defaultdict(list)  # by width

    def take(self, count: int, width: int, grammar: Any, vocab_size: int) -> HostBlocks:
        """Room for a round. There is made more where needed, pinned where that speeds up copies.

        Args:
            count: R.
            width: Q, at most the largest.
            grammar: any that is to fill masks.
            vocab_size: of the logits.
        """
        assert 1 <= width <= self._max_width, f"a block of {width}, where {self._max_width} is the largest"
        # As for the largest width, so that a wider round needs no new buffers.
        num_rows = count * self._max_width
        if num_rows > len(self._ids):
            self._grow(max(num_rows, 2 * len(self._ids)), grammar, vocab_size)
        slots = self._slots[width]
        while len(slots) < count:
            slots.append(self._slot(len(slots), width))
        size = count * width
        return HostBlocks(self._ids[:size].view(count, width), self._masks[:size], slots[:count])

    def _grow(self, num_rows: int, grammar: Any, vocab_size: int) -> None:
        masks = grammar.allocate_vocab_mask(vocab_size, num_rows, "cpu")
        assert masks.shape[1] * 32 >= vocab_size, "an id of the logits may lie beyond the masks"
        self._masks = self._pinned(masks)
        self._ids = self._pinned(torch.zeros(num_rows, dtype=torch.int64))
        self._are_filled = np.zeros(num_rows, np.bool_)
        self._slots.clear()

    def _slot(self, number: int, width: int) -> Slot:
        rows = slice(number * width, (number + 1) * width)
        block, masks = self._ids[rows], self._masks[rows]
        return Slot(block, block.numpy()[1:], masks, masks.numpy(), self._are_filled[rows])

    def room_on_device(self, blocks: HostBlocks) -> torch.Tensor:
        """For the blocks, [R, Q] int64, made ahead: a GPU waits for the drafts."""
        return torch.empty(blocks.ids.shape, dtype=torch.int64, device=self._device)

    def drafts_on_device(self, blocks: HostBlocks, room: torch.Tensor) -> torch.Tensor:
        """[R, Q-1] int64, a view of the room that was made for the blocks."""
        return room.copy_(blocks.ids, non_blocking=True)[:, 1:]

    def masks_on_device(self, blocks: HostBlocks) -> torch.Tensor:
        """[R * Q, W] int32. Copied beside the verify pass: 32 requests have 20 MB of them."""
        if self._copies is None:
            return blocks.masks
        streams = torch.get_device_module(self._device)
        with streams.stream(self._copies):
            copy = blocks.masks.to(self._device, non_blocking=True)
        current = streams.current_stream()
        current.wait_stream(self._copies)
        copy.record_stream(current)
        return copy

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._copies is None or tensor.is_pinned() else tensor.pin_memory()
