"""Greedy draft-and-verify decoding of a batch in plain PyTorch (paper section 3.3), with a dense key-value cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from examples.train_nano.model import OrthrusLM, View


@dataclass(slots=True)
class Generation:
    """One answer: its token ids (with the end token, if it was reached) and how many tokens each round yielded.

    The first token comes from prefill and belongs to no round.
    """

    ids: list[int] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    finished: bool = False


class Decoder:
    """A batch of sequences over one cache [layers, 2, bs, kv_heads, capacity, head_dim]."""

    def __init__(self, model: OrthrusLM, bs: int, capacity: int) -> None:
        config = model.config
        weight = model.model.embed_tokens.weight
        self.model, self.block = model, config.block_size
        shape = (config.num_hidden_layers, 2, bs, config.num_key_value_heads, capacity, config.head_dim)
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.columns = torch.arange(capacity, device=weight.device)
        self.index = torch.arange(bs, device=weight.device)

    def _forward(self, ids: Tensor, start: Tensor, view: View) -> Tensor:
        """Hidden states [bs, n, hidden] of `ids` [bs, n] at positions start, start+1, ... (start [bs]).

        The AR view is causal and writes its keys and values at these positions; the diffusion view sees the cache
        before `start` and all of its own block, and writes nothing.
        """
        positions = start[:, None] + torch.arange(ids.shape[1], device=ids.device)
        if view == "ar":
            mask = self.columns <= positions[:, :, None]
        else:
            past = (self.columns < start[:, None])[:, None].expand(-1, ids.shape[1], -1)
            mask = torch.cat((past, past.new_ones(*ids.shape, ids.shape[1])), 2)

        def keys(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            cached_k, cached_v = self.cache[layer]
            if view == "diff":
                return torch.cat((cached_k, k), 2), torch.cat((cached_v, v), 2)
            at = (self.index[:, None], slice(None), positions)
            cached_k[at], cached_v[at] = k.transpose(1, 2), v.transpose(1, 2)
            return cached_k, cached_v

        return self.model.hidden(ids, positions, view, keys, mask[:, None])

    def prefill(self, prompts: Tensor, lengths: Tensor) -> Tensor:
        """The first greedy token [bs] after prompts [bs, longest], right-padded, of the given lengths [bs]."""
        hidden = self._forward(prompts, torch.zeros_like(lengths), "ar")
        return self.model.logits(hidden[self.index, lengths - 1]).argmax(-1)

    def draft(self, anchor: Tensor, start: Tensor) -> Tensor:
        """Greedy drafts [bs, block-1] for the tokens after `anchor` [bs], which sits at position `start` [bs]."""
        ids = torch.full((len(anchor), self.block), self.model.config.mask_token_id, device=anchor.device)
        ids[:, 0] = anchor
        return self.model.logits(self._forward(ids, start, "diff")[:, :-1]).argmax(-1)

    def verify(self, anchor: Tensor, drafts: Tensor, start: Tensor) -> Tensor:
        """The AR view's greedy tokens [bs, block] after anchor and each draft."""
        ids = torch.cat((anchor[:, None], drafts), 1)
        return self.model.logits(self._forward(ids, start, "ar")).argmax(-1)


@torch.no_grad()
def generate(
    model: OrthrusLM, prompts: list[list[int]], max_new: int, stop_ids: frozenset[int], speculate: bool = True
) -> list[Generation]:
    """Greedy answers of at most `max_new` tokens; without `speculate`, one AR token per round."""
    device = model.model.embed_tokens.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    decoder = Decoder(model, len(prompts), longest + max_new + 2 * model.config.block_size)
    anchor, start = decoder.prefill(padded, lengths), lengths
    results = [Generation() for _ in prompts]
    for result, token in zip(results, anchor.tolist(), strict=True):
        _extend(result, [token], max_new, stop_ids)
    while not all(result.finished for result in results):
        drafts = decoder.draft(anchor, start) if speculate else anchor.new_zeros((len(prompts), 0))
        tokens = decoder.verify(anchor, drafts, start)
        accepted = (drafts == tokens[:, :-1]).long().cumprod(1).sum(1)
        for result, row, count in zip(results, tokens.tolist(), accepted.tolist(), strict=True):
            if not result.finished:
                result.rounds.append(_extend(result, row[: count + 1], max_new, stop_ids))
        # Finished rows stand still, so that they never outgrow the cache.
        running = torch.tensor([not result.finished for result in results], device=device)
        anchor = torch.where(running, tokens[decoder.index, accepted], anchor)
        start = torch.where(running, start + accepted + 1, start)
    return results


def _extend(result: Generation, tokens: list[int], max_new: int, stop_ids: frozenset[int]) -> int:
    """Appends tokens up to a stop token or the limit; returns how many."""
    before = len(result.ids)
    for token in tokens:
        result.ids.append(token)
        if token in stop_ids or len(result.ids) >= max_new:
            result.finished = True
            break
    return len(result.ids) - before
