"""The two losses: next-token cross-entropy for the AR view, forward KL from AR to diffusion for the drafts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.train_nano.model import Mask, OrthrusLM, own_keys
from examples.train_nano.pack import ANSWER, PROMPT


class Inputs(NamedTuple):
    """A batch on the device, each [bs, length], int64 (see `pack.Rows`)."""

    ids: Tensor
    docs: Tensor
    positions: Tensor
    kinds: Tensor


class Anchors(NamedTuple):
    """Sampled block starts: `at` [bs, n] positions in the row (ascending), `rows` [bs, n, block-1] which rows count."""

    at: Tensor
    rows: Tensor


def next_token_weights(inputs: Inputs, prompt_weight: float) -> Tensor:
    """The weight of predicting position t+1 from position t, [bs, length-1]: 1 in answers, less in prompts."""
    same = inputs.docs[:, 1:] == inputs.docs[:, :-1]
    kind = inputs.kinds[:, 1:]
    return same * ((kind == ANSWER).float() + prompt_weight * (kind == PROMPT).float())


def ar_loss(model: OrthrusLM, inputs: Inputs, weights: Tensor, mask: Mask) -> Tensor:
    """Weighted mean of the next-token cross-entropy."""
    hidden = model.hidden(inputs.ids, inputs.positions, "ar", own_keys, mask)
    logits = model.logits(hidden[:, :-1]).flatten(0, 1).float()
    loss = F.cross_entropy(logits, inputs.ids[:, 1:].flatten(), reduction="none")
    return (loss * weights.flatten()).sum() / weights.sum().clamp(min=1)


def ar_correct(model: OrthrusLM, inputs: Inputs, mask: Mask) -> Tensor:
    """Whether the greedy prediction of token t+1 at position t is right, [bs, length-1] booleans."""
    hidden = model.hidden(inputs.ids, inputs.positions, "ar", own_keys, mask)
    return model.logits(hidden[:, :-1]).argmax(-1) == inputs.ids[:, 1:]


def sample_anchors(inputs: Inputs, n: int, block_size: int, generator: torch.Generator | None) -> Anchors:
    """Draws `n` anchors per row without replacement among answer tokens that have a successor in the answer.

    In serving the first anchor is the answer's first token, so no prompt token ever is one. Row i of a block predicts
    token a+i+1; it counts if that token is still in the answer (its end-of-turn token included). Where a row has fewer
    candidates, the rest are anchored at 0 and none of their rows count. Needs one answer per conversation.
    """
    bs, length = inputs.ids.shape
    in_answer = inputs.kinds == ANSWER
    has_next = in_answer[:, :-1] & in_answer[:, 1:] & (inputs.docs[:, :-1] == inputs.docs[:, 1:])
    scores = torch.rand((bs, length - 1), device=inputs.ids.device, generator=generator)
    best = torch.where(has_next, scores, -1.0).topk(n, dim=1)
    at = torch.where(best.values >= 0, best.indices, 0).sort(dim=1).values
    offsets = torch.arange(1, block_size, device=at.device)
    label = at[:, :, None] + offsets
    inside = (label < length).flatten(1)
    label = label.clamp(max=length - 1).flatten(1)
    doc = inputs.docs.gather(1, at).repeat_interleave(block_size - 1, dim=1)
    rows = inside & (inputs.docs.gather(1, label) == doc) & in_answer.gather(1, label)
    rows = rows.view(bs, n, block_size - 1) & in_answer.gather(1, at)[:, :, None]
    return Anchors(at, rows)


class Teacher(NamedTuple):
    """What the frozen AR view gives: final hidden states [bs, length, hidden] and keys, values per layer."""

    hidden: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def teach(model: OrthrusLM, inputs: Inputs, mask: Mask) -> Teacher:
    """Runs the AR view over packed rows and records its keys and values."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def record(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys.append(k)
        values.append(v)
        return k, v

    hidden = model.hidden(inputs.ids, inputs.positions, "ar", record, mask)
    return Teacher(hidden, keys, values)


def block_inputs(model: OrthrusLM, inputs: Inputs, at: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and positions [bs, n * block] of the blocks [anchor, MASK x (block-1)]."""
    bs, n = at.shape
    block = model.config.block_size
    ids = torch.full((bs, n, block), model.config.mask_token_id, device=at.device)
    ids[:, :, 0] = inputs.ids.gather(1, at)
    offsets = torch.arange(block, device=at.device)
    positions = inputs.positions.gather(1, at)[:, :, None] + offsets
    return ids.flatten(1), positions.flatten(1)


def draft_hidden(model: OrthrusLM, inputs: Inputs, teacher: Teacher, at: Tensor, mask: Mask) -> Tensor:
    """The diffusion view's hidden states for rows 0..block-2 of each block, [bs, n * (block-1), hidden]."""
    bs, n = at.shape
    block = model.config.block_size
    ids, positions = block_inputs(model, inputs, at)

    def past_and_own(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((teacher.keys[layer], k), 2), torch.cat((teacher.values[layer], v), 2)

    hidden = model.hidden(ids, positions, "diff", past_and_own, mask)
    return hidden.view(bs, n, block, -1)[:, :, :-1].flatten(1, 2)


def teacher_rows(teacher: Teacher, at: Tensor, block_size: int) -> Tensor:
    """AR hidden states at a+i for rows i = 0..block-2 of each block, [bs, n * (block-1), hidden]."""
    offsets = torch.arange(block_size - 1, device=at.device)
    index = (at[:, :, None] + offsets).flatten(1).clamp(max=teacher.hidden.shape[1] - 1)
    return teacher.hidden.gather(1, index[:, :, None].expand(-1, -1, teacher.hidden.shape[2]))


def diff_loss(model: OrthrusLM, inputs: Inputs, teacher: Teacher, anchors: Anchors, mask: Mask, decay: float) -> Tensor:
    """Forward KL(p_AR(row a+i) || p_diff(block row i)), the mean over rows that count, weighted by decay**i."""
    block = model.config.block_size
    drafts = model.logits(draft_hidden(model, inputs, teacher, anchors.at, mask)).float()
    targets = model.logits(teacher_rows(teacher, anchors.at, block)).float().detach()
    log_q, log_p = drafts.log_softmax(-1), targets.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    weight = decay ** torch.arange(block - 1, device=kl.device)
    rows = (anchors.rows * weight).flatten(1)
    return (kl * rows).sum() / rows.sum().clamp(min=1)


def draft_runs(model: OrthrusLM, inputs: Inputs, teacher: Teacher, anchors: Anchors, mask: Mask) -> Tensor:
    """Leading drafts per anchor that equal the AR view's greedy token, [bs, n] (0..block-1), teacher-forced."""
    block = model.config.block_size
    drafts = model.logits(draft_hidden(model, inputs, teacher, anchors.at, mask)).argmax(-1)
    targets = model.logits(teacher_rows(teacher, anchors.at, block)).argmax(-1)
    agree = (drafts == targets).view(anchors.rows.shape) & anchors.rows
    return agree.long().cumprod(-1).sum(-1)
