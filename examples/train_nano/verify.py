"""Compiled block-sparse attention against eager attention with dense masks, on the first two rows of a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.train_nano.losses import Anchors, Inputs, ar_loss, diff_loss, next_token_weights, teach
from examples.train_nano.masks import dense, packed_blocks, packed_causal
from examples.train_nano.model import OrthrusLM

if TYPE_CHECKING:
    from examples.train_nano.train import Stage

# In bf16 rounding alone makes a difference of a few percent.
TOLERANCE = 0.15
ROWS = 2


def _gradient(model: OrthrusLM, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient


def _ar_gradients(stage: Stage, inputs: Inputs, few: Inputs) -> tuple[Tensor, Tensor]:
    weights = next_token_weights(inputs, stage.args.prompt_weight)
    weights[ROWS:] = 0
    length = few.ids.shape[1]
    mask = dense(packed_causal(few.docs), ROWS, length, length, few.ids.device)
    got = _gradient(stage.model, stage.ar_loss(stage.model, inputs, weights, stage.causal(inputs.docs)))
    return got, _gradient(stage.model, ar_loss(stage.model, few, weights[:ROWS], mask))


def _diff_gradients(stage: Stage, inputs: Inputs, few: Inputs) -> tuple[Tensor, Tensor]:
    model, decay, block = stage.model, stage.args.decay, stage.model.config.block_size
    anchors = stage.anchors(inputs, 3)
    anchors.rows[ROWS:] = False
    two = Anchors(anchors.at[:ROWS], anchors.rows[:ROWS])
    length, width, device = few.ids.shape[1], stage.args.anchors * block, few.ids.device
    with torch.no_grad():
        teacher = stage.teach(model, inputs, stage.causal(inputs.docs))
        plain = teach(model, few, dense(packed_causal(few.docs), ROWS, length, length, device))
    blocks = stage.blocks(inputs.docs, anchors.at)
    mask = dense(packed_blocks(few.docs, two.at, block), ROWS, width, length + width, device)
    got = _gradient(model, stage.diff_loss(model, inputs, teacher, anchors, blocks, decay))
    return got, _gradient(model, diff_loss(model, few, plain, two, mask, decay))


def verify(stage: Stage, inputs: Inputs) -> float:
    """The relative difference of the loss's gradients; raises AssertionError beyond TOLERANCE."""
    few = Inputs(*(tensor[:ROWS] for tensor in inputs))
    with stage.autocast():
        got, expected = (_ar_gradients if stage.stage == "ar" else _diff_gradients)(stage, inputs, few)
    error = float((got - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise AssertionError(f"gradients of stage {stage.stage} differ from dense attention by {error:.3f}")
    return error
