"""Attention over the KV pool on CPU, for prefill, decode and blocks that are drafted or verified."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from sglang_orthrus.compat.ledger import depends_on


class _Span(NamedTuple):
    """One request's query rows and what they see.

    Attributes:
        rows: the rows of the flattened queries; the last one sits at position len(slots) - 1.
        slots: [context] KV slots of positions 0..context-1, the span's own included.
        causal_mask: [len(rows), context] additive; None if the rows are the whole context.
    """

    rows: slice
    slots: torch.Tensor
    causal_mask: torch.Tensor | None


_UNTIL_IT_VERIFIES = "it serves TARGET_VERIFY"


@depends_on(
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.__init__",
    "model_runner",
    what="extended",
    why="the backend cannot verify a block: extend_prefix_lens is None there",
    until=_UNTIL_IT_VERIFIES,
)
@depends_on(
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend",
    "q",
    "k",
    "v",
    "layer",
    "forward_batch",
    "save_kv_cache",
    what="overridden",
    why="it cannot verify a block, and computes every query of a cached prefix again",
    until=_UNTIL_IT_VERIFIES,
)
@depends_on(
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.init_forward_metadata",
    "forward_batch",
    what="extended",
    why="a pass is planned once, not once per layer",
    until=_UNTIL_IT_VERIFIES,
)
@depends_on(
    "sglang.srt.mem_cache.memory_pool:KVWriteLoc",
    "loc",
    "swa_loc",
    what="constructed to write a block's K and V",
    why="the pool takes slots in this form",
    until="never: SGLang's own attention backends use it alike",
)
class OrthrusCpuAttnBackend(TorchNativeAttnBackend):
    """SGLang's `torch_native` backend, able to run a block of rows after a cached prefix.

    It adds `ForwardMode.TARGET_VERIFY`: row j of request i sees positions 0..C_i+j, or the whole block too where the
    layer is `ENCODER_ONLY` (the diffusion view). Prefill after a cached prefix takes the same path, since the parent
    computes the prefix's queries again (30 times slower for 20 tokens after 1000); decode is the parent's.

    Requests run one by one: padding them to one batch gains at most a tenth when their lengths are equal and costs
    three to ten times as much when they are not. So a request's result does not depend on its batch.
    """

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._mask_dtype: torch.dtype = model_runner.dtype
        self._spans: list[_Span] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan a pass: slots and masks of every request, shared by all layers."""
        super().init_forward_metadata(forward_batch)
        mode = forward_batch.forward_mode
        if mode.is_target_verify():
            width = forward_batch.input_ids.shape[0] // forward_batch.batch_size
            prefixes = forward_batch.seq_lens.tolist()
            self._spans = self._plan(forward_batch, prefixes, [width] * len(prefixes))
        elif mode.is_extend():
            self._spans = self._plan(
                forward_batch, forward_batch.extend_prefix_lens.tolist(), forward_batch.extend_seq_lens.tolist()
            )
        else:
            self._spans = []

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """Attend to the pool after writing this pass's K/V. q: [rows, heads * dim]; returns [rows, heads * v_dim]."""
        if layer.is_cross_attention or (layer.sliding_window_size or -1) > -1:
            if forward_batch.forward_mode.is_target_verify():
                raise NotImplementedError(
                    f"layer {layer.layer_id}: a block cannot be verified on CPU with cross or sliding-window attention"
                )
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None and v is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc), k, v)
        queries = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = queries.new_empty(queries.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        keys = pool.get_key_buffer(layer.layer_id)
        values = pool.get_value_buffer(layer.layer_id)
        is_causal = layer.attn_type != AttentionType.ENCODER_ONLY
        for rows, slots, causal_mask in self._spans:
            attended = scaled_dot_product_attention(
                _heads_first(queries[rows]),
                _heads_first(keys.index_select(0, slots).to(q.dtype)),
                _heads_first(values.index_select(0, slots).to(q.dtype)),
                attn_mask=causal_mask if is_causal else None,
                is_causal=is_causal and causal_mask is None,
                scale=layer.scaling,
                enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            )
            out[rows] = attended[0].transpose(0, 1)
        return out.view(out.shape[0], -1)

    def _plan(self, forward_batch: Any, prefix_lens: list[int], num_rows: list[int]) -> list[_Span]:
        req_to_token = self.req_to_token_pool.req_to_token
        spans = []
        start = 0
        requests = forward_batch.req_pool_indices.tolist()
        for request, prefix, count in zip(requests, prefix_lens, num_rows, strict=True):
            context = prefix + count
            assert context <= req_to_token.shape[1], (context, req_to_token.shape)
            mask = self._causal_mask(prefix, count) if prefix else None
            spans.append(_Span(slice(start, start + count), req_to_token[request, :context], mask))
            start += count
        assert start == forward_batch.input_ids.shape[0], (start, forward_batch.input_ids.shape)
        return spans

    def _causal_mask(self, prefix: int, count: int) -> torch.Tensor:
        """[count, prefix + count] additive: row j sees positions 0..prefix+j."""
        hidden = torch.full((count, prefix + count), float("-inf"), dtype=self._mask_dtype, device=self.device)
        return hidden.triu_(prefix + 1)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[rows, heads, dim] -> [1, heads, rows, dim]."""
    return x.transpose(0, 1)[None]
