"""Orthrus on SGLang's own Qwen3: one model, two sets of attention projections over the same KV cache.

The autoregressive (AR) view is stock `Qwen3ForCausalLM`. The diffusion view shares everything with it but the
attention projections and q/k norms (`*_diff`) and attends without a causal mask inside its block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessorOutput
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.models.qwen3 import Qwen3Attention, Qwen3ForCausalLM

from sglang_orthrus import ranks
from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.model import qwen3_attention_class
from sglang_orthrus.config import DualViewConfig
from sglang_orthrus.core import HEAD_ROWS, OrthrusBlockInput, View, view_of
from sglang_orthrus.models.checkpoint import check_tensors, diff_tensor_names, plain_name
from sglang_orthrus.models.qkv_kernel import caches_of, place_qkv
from sglang_orthrus.models.quantization import for_diffusion_view

# Checkpoints, and the configuration of quantised ones, name the parts.
_FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "qkv_proj_diff": ["q_proj_diff", "k_proj_diff", "v_proj_diff"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
_SCALES = ("k_scale", "v_scale", "k_scale_float", "v_scale_float")


@depends_on(
    "sglang.srt.layers.radix_attention:RadixAttention",
    "num_heads",
    "head_dim",
    "scaling",
    "num_kv_heads",
    "layer_id",
    "attn_type",
    what="subclassed for the diffusion view; the scales of K and V are the AR layer's",
    why="both views store to one cache, and SGLang sets the scales of the layer that it knows",
    until="never: a model's attention layers are of this class",
)
class DiffusionAttention(RadixAttention):
    """The diffusion view's attention over the K/V of an AR layer: no causal mask, and that layer's scales.

    Both views read what either stores, so K and V have one pair of scales. SGLang sets those of the AR layer, from
    `--quantization-param-path` or a weight update, at any time.

    Args:
        ar: the AR view's attention of the layer.
    """

    def __init__(self, ar: RadixAttention) -> None:
        # ENCODER_ONLY is how every backend is told to drop the causal mask and still read K/V from the pool.
        super().__init__(
            ar.tp_q_head_num,
            ar.head_dim,
            ar.scaling,
            ar.tp_k_head_num,
            ar.layer_id,
            attn_type=AttentionType.ENCODER_ONLY,
        )
        # Registered as a module it would be listed twice.
        object.__setattr__(self, "_ar", ar)
        for name in _SCALES:
            delattr(self, name)

    def __getattr__(self, name: str) -> Any:
        if name in _SCALES:
            return getattr(self._ar, name)
        return super().__getattr__(name)


@depends_on(
    "sglang.srt.models.qwen3:Qwen3Attention.forward",
    "positions",
    "hidden_states",
    "forward_batch",
    what="overridden: for blocks on a GPU norm, RoPE and the store of K and V are one kernel",
    why="they are four kernels per layer and pass",
    until="Qwen3 fuses them on CUDA as it does on ROCm",
)
class OrthrusAttention(Qwen3Attention):
    """Qwen3 attention with a second set of projections under the released names (`q_proj_diff`, ...).

    Both sets write to the same KV slots: their `RadixAttention` layers share one layer id.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kwargs["quant_config"] = for_diffusion_view(kwargs.get("quant_config"), _FUSED)
        twin = Qwen3Attention(*args, **kwargs)
        twin.attn = DiffusionAttention(self.attn)
        # Registered as a module the twin would list every parameter a second time.
        object.__setattr__(self, "_twin", twin)
        self.qkv_proj_diff, self.o_proj_diff = twin.qkv_proj, twin.o_proj
        self.q_norm_diff, self.k_norm_diff = twin.q_norm, twin.k_norm
        self.attn_diff = twin.attn

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, hidden], through the projections of the pass's view."""
        own = self._twin if view_of(forward_batch) is View.DIFFUSION else self
        is_block = isinstance(forward_batch.spec_info, OrthrusBlockInput)
        caches = caches_of(own, hidden_states) if is_block else None
        if caches is None:
            return Qwen3Attention.forward(own, positions, hidden_states, forward_batch)
        qkv, _ = own.qkv_proj(hidden_states)
        rope = own.rotary_emb.cos_sin_cache
        q = place_qkv(qkv, *caches, own.q_norm, own.k_norm, rope, positions, forward_batch.out_cache_loc)
        _, k, v = qkv.split([own.q_size, own.kv_size, own.kv_size], dim=-1)
        attended = own.attn(q, k, v, forward_batch, save_kv_cache=False)
        output, _ = own.o_proj(attended)
        return output


@depends_on(
    "sglang.srt.models.qwen3:Qwen3ForCausalLM",
    "config",
    "quant_config",
    "prefix",
    what="subclassed; overrides forward, load_weights",
    why="the AR view is this model, with its weights' names",
    until="never: SGLang's models are extended so",
)
class OrthrusLM(Qwen3ForCausalLM):
    """Dual-view Qwen3. Without our algorithm it serves its AR view, which is the base model.

    Raises:
        ValueError: if the configuration lacks `block_size` or `mask_token_id`, or the weights' `*_diff` tensors do
            not fit the layers.
    """

    packed_modules_mapping = _FUSED

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        dual_view = DualViewConfig.from_hf(config)
        with qwen3_attention_class(OrthrusAttention):
            super().__init__(config, quant_config=quant_config, prefix=prefix)
        self.dual_view = dual_view
        self._is_loaded = False

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        get_embedding: bool = False,
        pp_proxy_tensors: Any = None,
    ) -> LogitsProcessorOutput:
        """One pass in the view that the batch names. input_ids, positions: [tokens].

        A pass over blocks returns `hidden_states` [tokens, hidden] and no logits: its caller knows which rows it needs
        and asks for those with `logits` or `best_tokens`.
        """
        if not isinstance(forward_batch.spec_info, OrthrusBlockInput):
            return super().forward(input_ids, positions, forward_batch, input_embeds, get_embedding, pp_proxy_tensors)
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return LogitsProcessorOutput(next_token_logits=None, hidden_states=hidden_states)

    @depends_on(
        "sglang.srt.layers.logits_processor:LogitsMetadata",
        "forward_mode",
        what="constructed to call the head on chosen rows",
        why="SGLang calls the head inside the forward pass, on all rows",
        until="the model has a public head",
    )
    @torch.no_grad()
    def logits(self, hidden_states: torch.Tensor, *, in_fp32: bool = True) -> torch.Tensor:
        """The head on rows of a block: [..., hidden] -> [rows, vocabulary], contiguous.

        in_fp32: as SGLang gives logits to its sampler; else, on a single rank, of the type that the head computes in,
            which says the same in fewer bytes.
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not in_fp32 and not ranks.are_several():
            return self._head(rows)[0].contiguous()
        # A row of its own kind for SGLang's head: every row is wanted, into no shared buffer.
        metadata = LogitsMetadata(ForwardMode.TARGET_VERIFY)
        return self.logits_processor(None, rows, self.lm_head, metadata).next_token_logits

    @torch.no_grad()
    def best_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The greedy choice after every row: [..., hidden] -> [...] int64.

        At most `HEAD_ROWS` rows of logits exist at a time: 128 blocks of 32 rows would take 2.5 GB of them.
        """
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        best = [_best_of_all(*self._head(group)) for group in rows.split(HEAD_ROWS)]
        return torch.cat(best).view(hidden_states.shape[:-1])

    @depends_on(
        "sglang.srt.layers.logits_processor:LogitsProcessor._compute_lm_head",
        "hidden_states",
        "lm_head",
        what="called for logits in the type that the head computes in",
        why="the public call copies them to fp32, twice the memory, which argmax does not need",
        until="the model has a public head",
    )
    def _head(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """This rank's share of the logits, and the id of its first column: [rows, hidden] -> [rows, share].

        Rounded as `logits` rounds them; a view without the head's padding.
        """
        logits: torch.Tensor = self.logits_processor._compute_lm_head(rows, self.lm_head)
        first = ranks.offset(logits.shape[1])
        return logits[:, : max(self.config.vocab_size - first, 0)], first

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load both views; Qwen3's own name mapping covers `*_diff`.

        The first load must bring every `*_diff` tensor of the layers. Later ones update what they bring.
        """
        if self._is_loaded:
            super().load_weights(weights)
            return
        parameters = {name for name, _ in self.named_parameters()}
        super().load_weights(_checked(weights, self.config.num_hidden_layers, parameters))
        self._is_loaded = True


class OrthrusForCausalLM(OrthrusLM):
    """The same model under the other architecture name in use."""


def _best_of_all(logits: torch.Tensor, first: int) -> torch.Tensor:
    """The best token of every row over the shares of all ranks, the first of equals: [rows, share] -> [rows] int64.

    Follows `LogitsProcessor.deferred_argmax`, which needs Triton. first: id of the first column.
    """
    _without_nan_inplace(logits)
    if not ranks.are_several():
        return logits.argmax(dim=-1)
    # Both in one gather: fp64 holds logits and ids exactly.
    own = logits.new_full((len(logits), 2), -torch.inf, dtype=torch.float64)
    if logits.shape[1]:
        best = logits.max(dim=-1)
        own[:, 0], own[:, 1] = best.values, best.indices + first
    found = ranks.gathered(own)
    chosen = found[:, :, 0].argmax(dim=0, keepdim=True)
    return found[:, :, 1].gather(0, chosen).squeeze(0).long()


def _without_nan_inplace(logits: torch.Tensor) -> torch.Tensor:
    """As SGLang's sampler does it where that is switched on (`sanitize_nan_logits`); argmax chooses a NaN.

    Without its warning, which needs the host and so cannot be part of a graph.
    """
    if envs.SGLANG_SANITIZE_NAN_LOGITS.get():
        torch.nan_to_num_(logits, nan=-1e30, posinf=1e30, neginf=-1e30)
    return logits


def _checked(
    weights: Iterable[tuple[str, torch.Tensor]], num_layers: int, parameters: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the weights on as they stream in; complain before the loader meets an unknown `*_diff` name.

    parameters: names of the model's own, which follow from the configuration.
    """
    expected, names, stream = diff_tensor_names(num_layers), set[str](), iter(weights)
    for name, tensor in stream:
        names.add(name)
        if "_diff." in name and plain_name(name) not in expected:
            names.update(rest for rest, _ in stream)
            break
        # SGLang leaves out a bias that GPTQ wrote and the model lacks.
        if "_diff." in name and _fused_name(name) not in parameters and not name.endswith(".bias"):
            raise ValueError(
                f"{name}: by the checkpoint's quantization_config this layer has no such tensor. It has to leave out "
                "the *_diff layers if they are not quantised, and only then; see docs/quantization.md."
            )
        yield name, tensor
    check_tensors(names, num_layers)


def _fused_name(name: str) -> str:
    """The name of the model's parameter that holds a checkpoint's tensor."""
    layer, _, parameter = name.rpartition(".")
    path, _, module = layer.rpartition(".")
    fused = next((fused for fused, parts in _FUSED.items() if module in parts), module)
    return f"{path}.{fused}.{parameter}"


EntryClass = [OrthrusLM, OrthrusForCausalLM]
