"""What travels with a batch: the state between rounds and the inputs of one pass."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
from sglang.srt.speculative.dflash_info import DFlashVerifyInput
from sglang.srt.speculative.spec_info import SpecInput, SpecInputType

from sglang_orthrus.compat.ledger import depends_on


class View(Enum):
    """Which projections a forward pass uses."""

    AR = "ar"
    DIFFUSION = "diffusion"


class Phase(Enum):
    """What a forward pass over a block does; a CUDA graph may do all of a round."""

    DRAFT = "draft"
    VERIFY = "verify"
    ROUND = "round"


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
