"""Both views of an Orthrus Qwen3 checkpoint in plain PyTorch (fp32, CPU), and the paper's greedy round loop.

Written from the method's description, independent of SGLang and of the package: they are tested against it.
One sequence at a time; clarity before speed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

AR, DIFF = "", "_diff"


@dataclass
class Trace:
    """A greedy generation: its tokens, and what each draft-verify round did."""

    tokens: list[int] = field(default_factory=list)
    accept_lens: list[int] = field(default_factory=list)  # per round: accepted drafts, no bonus token
    draft_gaps: list[float] = field(default_factory=list)  # per round: least top-2 gap of a deciding draft

    @property
    def rounds(self) -> int:
        """Number of verify passes."""
        return len(self.accept_lens)


@dataclass
class State:
    """AR-view keys and values of a committed prefix, per layer [kv_heads, length, head_dim]."""

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def length(self) -> int:
        return self.keys[0].shape[1]

    def crop(self, length: int) -> None:
        """Forget everything from position `length` on."""
        self.keys = [k[:, :length] for k in self.keys]
        self.values = [v[:, :length] for v in self.values]


def top2_gap(logits: Tensor) -> Tensor:
    """Distance between the best and the second-best logit. [..., V] -> [...]."""
    best = logits.topk(2, dim=-1).values
    return best[..., 0] - best[..., 1]


class Reference:
    """An Orthrus checkpoint directory (config.json, *.safetensors), upcast to fp32."""

    def __init__(self, path: str | Path) -> None:
        folder = Path(path)
        config = json.loads((folder / "config.json").read_text())
        self.layers: int = config["num_hidden_layers"]
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config["head_dim"]
        self.eps: float = config["rms_norm_eps"]
        self.block: int = config["block_size"]
        self.mask_id: int = config["mask_token_id"]
        theta = config["rope_theta"] if "rope_theta" in config else config["rope_parameters"]["rope_theta"]
        self.frequencies = 1.0 / theta ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        self.weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self.weights |= {name: tensor.float() for name, tensor in load_file(file).items()}
        tied = config["tie_word_embeddings"]
        self.head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]

    def new_state(self) -> State:
        """The empty prefix."""
        empty = torch.empty(self.kv_heads, 0, self.head_dim)
        return State([empty] * self.layers, [empty] * self.layers)

    def extend(self, state: State, ids: Sequence[int]) -> Tensor:
        """Run `ids` through the AR view after `state`, which grows by them. -> logits [len(ids), V]."""
        return self._forward(state, ids, AR)

    def draft_logits(self, state: State, anchor_id: int, width: int | None = None) -> Tensor:
        """The diffusion view over [anchor, MASK, ...] after `state`, which stays as it is. -> [width, V].

        Row j predicts the token after position `state.length + j`.
        """
        return self._forward(state, [anchor_id] + [self.mask_id] * ((width or self.block) - 1), DIFF)

    def ar_logits(self, ids: Sequence[int]) -> Tensor:
        """Teacher-forced AR logits. -> [len(ids), V]."""
        return self.extend(self.new_state(), ids)

    def diff_logits(self, prefix_ids: Sequence[int], anchor_id: int, width: int | None = None) -> Tensor:
        """Diffusion logits of the block that `anchor_id` opens after `prefix_ids`. -> [width, V]."""
        state = self.new_state()
        if prefix_ids:
            self.extend(state, prefix_ids)
        return self.draft_logits(state, anchor_id, width)

    def generate(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        stop_ids: Collection[int] = (),
        context_len: int | None = None,
        width: int | None = None,
    ) -> Trace:
        """Greedy decoding in draft-verify rounds.

        The prefill yields the first token. Every round drafts a block of `width` tokens (the trained width by default),
        and commits the drafts that the AR view agrees with and one more. The text ends with a
        stop token (kept), after `max_new_tokens`, or where prompt and answer fill `context_len`.
        """
        if context_len is not None:
            max_new_tokens = min(max_new_tokens, context_len - len(prompt_ids))
        trace = Trace()
        state = self.new_state()
        anchor = int(self.extend(state, prompt_ids)[-1].argmax())
        trace.tokens.append(anchor)
        while len(trace.tokens) < max_new_tokens and trace.tokens[-1] not in stop_ids:
            committed = state.length
            diffusion = self.draft_logits(state, anchor, width)[: (width or self.block) - 1]
            drafts = diffusion.argmax(-1)
            target = self.extend(state, [anchor, *drafts.tolist()]).argmax(-1)
            accepted = int((drafts == target[:-1]).cumprod(0).sum())
            state.crop(committed + 1 + accepted)
            trace.accept_lens.append(accepted)
            trace.draft_gaps.append(float(top2_gap(diffusion[: accepted + 1]).min()))
            for token in target[: accepted + 1].tolist():
                trace.tokens.append(token)
                if token in stop_ids or len(trace.tokens) == max_new_tokens:
                    break
            anchor = int(target[accepted])
        return trace

    @torch.inference_mode()
    def _forward(self, state: State, ids: Sequence[int], view: str) -> Tensor:
        """One pass. The AR view is causal and extends `state`; the diffusion view sees its whole block."""
        start, rows = state.length, len(ids)
        angles = torch.outer(torch.arange(start, start + rows).float(), self.frequencies)
        cos, sin = angles.cos(), angles.sin()
        mask = torch.zeros(rows, start + rows)
        if view == AR:
            mask[:, start:] = torch.full((rows, rows), float("-inf")).triu(1)
        hidden = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            normed = self._norm(hidden, prefix + "input_layernorm.weight")
            q, k, v = (
                (normed @ self.weights[f"{prefix}self_attn.{name}_proj{view}.weight"].T)
                .view(rows, -1, self.head_dim)
                .transpose(0, 1)
                for name in "qkv"
            )
            q = _rotate(self._norm(q, f"{prefix}self_attn.q_norm{view}.weight"), cos, sin)
            k = _rotate(self._norm(k, f"{prefix}self_attn.k_norm{view}.weight"), cos, sin)
            k = torch.cat([state.keys[layer], k], dim=1)
            v = torch.cat([state.values[layer], v], dim=1)
            if view == AR:
                state.keys[layer], state.values[layer] = k, v
            attended = self._attend(q, k, v, mask)
            hidden = hidden + attended @ self.weights[f"{prefix}self_attn.o_proj{view}.weight"].T
            normed = self._norm(hidden, prefix + "post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(normed @ self.weights[prefix + "mlp.gate_proj.weight"].T)
            up = normed @ self.weights[prefix + "mlp.up_proj.weight"].T
            hidden = hidden + (gate * up) @ self.weights[prefix + "mlp.down_proj.weight"].T
        return self._norm(hidden, "model.norm.weight") @ self.head.T

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q: [heads, rows, d]; k, v: [kv_heads, columns, d]; mask: [rows, columns] -> [rows, heads * d]."""
        group = self.heads // self.kv_heads
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) / self.head_dim**0.5 + mask
        out = scores.softmax(-1) @ v.repeat_interleave(group, 0)
        return out.transpose(0, 1).flatten(1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weights[name]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split pairing. x: [heads, rows, d]; cos, sin: [rows, d / 2]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
