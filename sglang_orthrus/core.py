"""The nouns that several rooms share: views and phases of a pass, blocks, verdicts, the state between rounds.

Letters: bs requests, C committed tokens of one, F trained block width, Q width of a round's blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import ClassVar, NamedTuple

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType
from sglang.srt.utils.common import async_h2d

from sglang_orthrus.compat.ledger import SHARED_BY_SAMPLERS, depends_on

# The model's head works on at most so many rows at a time: of a vocabulary of 151,936, 512 rows of logits in fp32 take
# 0.3 GB.
HEAD_ROWS = 512


class View(Enum):
    """Which projections a forward pass uses."""

    AR = "ar"
    DIFFUSION = "diffusion"


class Phase(Enum):
    """What a forward pass over a block does; a CUDA graph may do all of a round."""

    DRAFT = "draft"
    VERIFY = "verify"
    ROUND = "round"


class DraftBlock(NamedTuple):
    """Inputs of the draft pass for a batch; all tensors are int64 on the model's device.

    Attributes:
        ids: [bs, Q] the anchor, then the mask token.
        positions: [bs, Q] absolute positions, from each request's C.
        slots: [bs, Q] KV slots of those positions.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor


class Verdict(NamedTuple):
    """What a round commits, in SGLang's spec-V2 result layout; tensors on the model's device.

    Attributes:
        accept_lens: [bs] int32, tokens emitted this round, bonus included, in 1..Q; 0 of requests that were left out.
        tokens: [bs, Q] int64, row i holds the accepted drafts, then the bonus, then padding.
        bonus: [bs] int64, the last emitted token, which is the next round's anchor.
        new_seq_lens: [bs] committed lengths after the round, in the dtype of the prefix lengths.
    """

    accept_lens: torch.Tensor
    tokens: torch.Tensor
    bonus: torch.Tensor
    new_seq_lens: torch.Tensor


class DraftChange(IntEnum):
    """What a grammar made of a draft."""

    NONE = 0
    REPAIRED = 1
    FORCED = 2


@depends_on(
    "sglang.srt.speculative.dflash_info:DFlashVerifyInput",
    "draft_token",
    "positions",
    "draft_token_num",
    "capture_hidden_mode",
    what="subclassed as the input of every pass over blocks",
    why="attention backends and planners dispatch on its spec_input_type, an enum closed to plugins",
    until="SpecInputType is open, or backends dispatch on behaviour",
)
@dataclass
class OrthrusBlockInput(DFlashVerifyInput):
    """One pass over a block of every request, or both of a round.

    The attention backends dispatch on the type of `DFlashVerifyInput`, whose layout this is: `draft_token_num` query
    rows per request after its prefix, no custom mask. Causality comes from the view's own attention layers.

    Attributes:
        phase: decides the view, and which CUDA graph may run the pass.
    """

    phase: Phase = Phase.VERIFY
    capture_hidden_mode: CaptureHiddenMode = CaptureHiddenMode.NULL


def view_of(forward_batch: ForwardBatch) -> View:
    """The view of a forward pass; everything but our own draft pass (prefill, plain decode) is autoregressive."""
    spec_info = forward_batch.spec_info
    is_draft = isinstance(spec_info, OrthrusBlockInput) and spec_info.phase is Phase.DRAFT
    return View.DIFFUSION if is_draft else View.AR


@depends_on(
    "sglang.srt.speculative.spec_info:SpecInput",
    "spec_input_type",
    what="subclassed; overrides filter_batch and merge_batch",
    why="the scheduler keeps the state between rounds in it, and its relay asks for the type DFLASH_DRAFT",
    until="SpecInputType is open",
)
@dataclass
class OrthrusState(SpecInput):
    """State of the running requests between two rounds (SGLang's `UnoDraftInput` has the same role).

    Attributes:
        bonus_tokens: [bs] int64, each request's anchor: emitted, not yet in the cache.
        new_seq_lens: [bs] committed lengths.
        future_indices: set by the overlap scheduler; while set, the two tensors above live in its relay buffers.
    """

    bonus_tokens: torch.Tensor
    new_seq_lens: torch.Tensor
    future_indices: torch.Tensor | None = None

    # The scheduler's relay reads these of every algorithm; a single-model drafter has none.
    topk_p: ClassVar[None] = None
    topk_index: ClassVar[None] = None
    hidden_states: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__init__(SpecInputType.DFLASH_DRAFT)
        self.num_tokens_per_req = 1
        self.num_tokens_for_logprob_per_req = 1

    def filter_batch(self, new_indices: torch.Tensor, new_indices_cpu: list[int] | None = None) -> None:
        """Keep the rows of the requests that stay. new_indices: [kept] row numbers."""
        if self.future_indices is not None:
            self.future_indices = self.future_indices[new_indices]
            return
        self.bonus_tokens = self.bonus_tokens[new_indices]
        self.new_seq_lens = self.new_seq_lens[new_indices]

    def merge_batch(self, other: OrthrusState) -> None:
        """Append the rows of requests that join."""
        if self.future_indices is not None:
            assert other.future_indices is not None, "both states are relayed, or neither is"
            self.future_indices = torch.cat((self.future_indices, other.future_indices))
            return
        self.bonus_tokens = torch.cat((self.bonus_tokens, other.bonus_tokens))
        self.new_seq_lens = torch.cat((self.new_seq_lens, other.new_seq_lens))


def snapshot(batch: ScheduleBatch) -> ScheduleBatch:
    """A shallow copy, which nobody else writes to."""
    copied: ScheduleBatch = object.__new__(type(batch))
    vars(copied).update(vars(batch))
    return copied


class RoundBatch:
    """A decode batch as one round sees it: the scheduler goes on writing to its own, and passes write to copies.

    Attributes:
        scheduled: SGLang's batch when the round began, to be read only.
        blocks: of its requests, still to be drafted.
    """

    def __init__(self, batch: ScheduleBatch, blocks: DraftBlock) -> None:
        self.scheduled = snapshot(batch)
        self.blocks = blocks
        self._lens_on_host: torch.Tensor | None = batch.seq_lens_cpu

    @property
    def width(self) -> int:
        """Q, tokens of a block."""
        return self.blocks.ids.shape[1]

    @property
    def anchors(self) -> torch.Tensor:
        """[bs] int64, emitted and not in the cache yet."""
        return self.blocks.ids[:, 0]

    @property
    def prefix_lens(self) -> torch.Tensor:
        """[bs] committed lengths C."""
        return self.scheduled.seq_lens

    @property
    def known_lens(self) -> torch.Tensor | None:
        """The committed lengths on the host, if they are there."""
        return self._lens_on_host

    def wait_for_lens(self) -> None:
        """Bring the committed lengths to the host: waits for the device."""
        if self._lens_on_host is None:
            self._lens_on_host = self.prefix_lens.cpu()


@depends_on(
    "sglang.srt.utils.common:async_h2d",
    "args",
    "dtype",
    "device",
    what="called for copies to the device",
    why="a plain copy waits for the device",
    until=SHARED_BY_SAMPLERS,
)
def rows_index(rows: Sequence[int], device: torch.device | str) -> torch.Tensor | slice:
    """Ascending row numbers to index device tensors with: a slice if it can be one, as that copies nothing."""
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return slice(first, last + 1)
    return async_h2d(list(rows), dtype=torch.int64, device=device)
