"""The ledger of what attention backends, KV scales and memory sizes use of SGLang's internals."""

from __future__ import annotations

from sglang_orthrus.compat.ledger import Touch

MEMORY_TOUCHES: tuple[Touch, ...] = (
    Touch(
        "sglang.srt.layers.attention.hybrid_attn_backend:HybridAttnBackend._select_backend",
        ("forward_mode",),
        "called for the backend that verifies, where prefill and decode have unlike ones",
        "FlashInfer is fitted to rounds on the instance that runs them",
        "an attention backend says which one runs a forward mode",
    ),
    Touch(
        "sglang.srt.layers.attention.hybrid_attn_backend:HybridAttnBackend",
        ("prefill_backend", "decode_backend"),
        "its two backends are read, needs_cpu_seq_lens is set to what the one that verifies says",
        "it also asks the one that runs in no round, and before they are fitted",
        "as above",
    ),
    Touch(
        "flashinfer.prefill:BatchPrefillWithPagedKVCacheWrapper.plan",
        ("fixed_split_size", "disable_split_kv"),
        "called with disable_split_kv for passes over blocks under deterministic inference, and for graphs by its "
        "module with uniform_q_len",
        "SGLang leaves the splits of verify passes to FlashInfer, which decides by the whole batch",
        "SGLang fixes them as it does for prefill and decode",
    ),
    Touch(
        "sglang.srt.layers.radix_attention:RadixAttention",
        ("num_heads", "head_dim", "scaling", "num_kv_heads", "layer_id", "attn_type"),
        "subclassed for the diffusion view; the scales of K and V are the AR layer's",
        "both views store to one cache, and SGLang sets the scales of the layer that it knows",
        "never: it is the seam",
    ),
    Touch(
        "sglang.srt.model_executor.model_runner:ModelRunner.prewarm_sampling",
        (),
        "called, and its result replaced on the runner",
        "SGLang leaves as much memory as it says when it sizes the KV pool after capture (as the DFLASH worker does)",
        "never: speculative workers share it",
    ),
    Touch(
        "sglang.srt.model_executor.model_runner:SamplingPrewarmResult",
        ("sampling_headroom_bytes",),
        "constructed",
        "as above",
        "never: speculative workers share it",
    ),
    Touch(
        "sglang.srt.model_executor.runner_utils.pool:disable_graph_pool_borrow",
        ("reason",),
        "called, since with borrowing SGLang leaves no memory for sampling",
        "a round samples between two replays, where storage of graphs can't be borrowed",
        "never: speculative workers share it",
    ),
    Touch(
        "sglang.srt.utils.common:get_available_gpu_memory",
        ("device", "gpu_id", "empty_cache"),
        "called before and after graphs of wider drafts are captured",
        "they count in SGLang's report of memory (as the UNO worker's do)",
        "never: speculative workers share it",
    ),
    Touch(
        "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo",
        ("temperatures", "top_ps", "top_ks", "min_ps", "acc_additive_penalties", "sampling_seed"),
        "constructed for a rehearsal",
        "choosing tokens reads it (as the DFLASH worker does)",
        "never: speculative workers share it",
    ),
)
