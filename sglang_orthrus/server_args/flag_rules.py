"""Server arguments that are refused whatever the checkpoint, as a table. `docs/switches.md` has all arguments."""

from __future__ import annotations

from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A field of SGLang's `ServerArgs`, the values of it that ORTHRUS serves, why no other, and what to do."""

    field: str
    served: tuple[Any, ...]
    advice: str
    reason: str = "ORTHRUS does not support it"


_REMOVE = "remove the flag"
_NO_DRAFT_MODEL = "ORTHRUS drafts with the served model itself"
_BLOCK_DECIDES = "ORTHRUS drafts one block per round, as wide as the checkpoint says"
_UNTRIED = "ORTHRUS was not tried with it"
_OTHER_CACHE = "ORTHRUS was tried with SGLang's own KV pool and radix cache only"
_OTHER_ALGORITHM = "it belongs to another speculative algorithm"
_QUANTISED = "it does not know the names of the *_diff layers, or ORTHRUS was not tried with it"
_EXACT = "ORTHRUS accepts exactly the tokens that the autoregressive view would have chosen"

RULES = (
    Rule("device", (None, "cuda", "cpu"), "use cuda or cpu"),
    Rule("pp_size", (1,), "use --pp-size 1"),
    Rule("attn_dp_size", (1,), "use --attn-dp-size 1"),
    Rule("dcp_size", (1,), "use --dcp-size 1"),
    Rule("attn_cp_size", (1,), "use --attn-cp-size 1", _UNTRIED),
    Rule("nnodes", (1,), "use the GPUs of one host", _UNTRIED),
    Rule("enable_prefill_cp", (False,), _REMOVE, _UNTRIED),
    Rule("enable_layernorm_sp", (False,), _REMOVE, _UNTRIED),
    Rule("enable_kv_cache_sharding", (False,), _REMOVE, _UNTRIED),
    Rule("enable_attn_tp_input_scattered", (False,), _REMOVE, _UNTRIED),
    Rule("tokenizer_worker_num", (1,), "use --tokenizer-worker-num 1", "SGLang loads no plugins in the extra workers"),
    Rule("disaggregation_mode", ("null",), _REMOVE),
    Rule("enable_two_batch_overlap", (False,), _REMOVE),
    Rule("enable_pdmux", (False,), _REMOVE),
    Rule("enable_torch_compile", (False,), _REMOVE),
    Rule("hicache_storage_backend", (None,), _REMOVE, "ORTHRUS was tried with the host's memory only"),
    Rule("hicache_io_backend", ("kernel", "direct"), "use kernel or direct", _UNTRIED),
    Rule(
        "hicache_mem_layout",
        ("page_first", "layer_first", "page_first_direct"),
        "use page_first, layer_first or page_first_direct",
        _UNTRIED,
    ),
    Rule("radix_cache_backend", (None,), _REMOVE, _OTHER_CACHE),
    Rule("enable_session_radix_cache", (False,), _REMOVE, _OTHER_CACHE),
    Rule("enable_unified_memory", (False,), _REMOVE, _OTHER_CACHE),
    Rule("enable_page_major_kv_layout", (False,), _REMOVE, _OTHER_CACHE),
    Rule("enable_unified_cache_external_linker", (False,), _REMOVE, _OTHER_CACHE),
    Rule("enable_hisparse", (False,), _REMOVE, _OTHER_CACHE),
    Rule("enable_lmcache", (False,), _REMOVE, _OTHER_CACHE),
    Rule("enable_flexkv", (False,), _REMOVE, _OTHER_CACHE),
    Rule("prefill_only_disable_kv_cache", (False,), _REMOVE, "rounds read the KV pool"),
    Rule("cpu_offload_gb", (0,), _REMOVE, _UNTRIED),
    Rule("offload_group_size", (-1,), _REMOVE, _UNTRIED),
    Rule("enable_memory_saver", (False,), _REMOVE, _UNTRIED),
    Rule("enable_weights_cpu_backup", (False,), _REMOVE, _UNTRIED),
    Rule("enable_single_batch_overlap", (False,), _REMOVE, _UNTRIED),
    Rule("enable_lean_attention", (None, False), _REMOVE, _UNTRIED),
    Rule("enable_fp32_lm_head", (False,), _REMOVE, _UNTRIED),
    Rule("dllm_algorithm", (None,), _REMOVE, "an Orthrus checkpoint is served by its autoregressive view"),
    Rule("is_embedding", (False,), _REMOVE, "ORTHRUS generates text"),
    Rule("decoupled_spec_role", ("null",), _REMOVE, _NO_DRAFT_MODEL),
    Rule("enable_lora", (None, False), "merge the adapter into the checkpoint or remove the flag"),
    Rule("lora_paths", (None,), "merge the adapter into the checkpoint or remove the flag"),
    Rule(
        "grammar_backend",
        (None, "xgrammar", "llguidance", "none"),
        "use xgrammar or llguidance",
        "it can't roll back rejected drafts",
    ),
    # Two of SGLang's own are those of devices that are refused.
    Rule(
        "sampling_backend",
        (None, "flashinfer", "pytorch", "ascend", "intel_xpu"),
        "use flashinfer or pytorch",
        "rounds sample as SGLang's own sampler does",
    ),
    Rule(
        "quantization",
        (None, "fp8", "awq_marlin", "gptq_marlin", "compressed-tensors"),
        "use fp8, or a checkpoint in AWQ, GPTQ or compressed-tensors form and no flag",
        _QUANTISED,
    ),
    Rule("load_format", ("auto", "safetensors", "dummy"), "use --load-format auto", _QUANTISED),
    Rule("rl_on_policy_target", (None,), _REMOVE),
    Rule("enable_watermark", (False,), _REMOVE),
    Rule("model_impl", ("auto", "sglang"), "use --model-impl sglang", "only SGLang's own model has the two views"),
    Rule("speculative_draft_model_path", (None,), _REMOVE, _NO_DRAFT_MODEL),
    Rule("speculative_draft_model_quantization", (None,), _REMOVE, _NO_DRAFT_MODEL),
    Rule("speculative_draft_attention_backend", (None,), "use --attention-backend", _NO_DRAFT_MODEL),
    Rule("speculative_draft_window_size", (None,), _REMOVE, _NO_DRAFT_MODEL),
    Rule("speculative_draft_sink_size", (None,), _REMOVE, _NO_DRAFT_MODEL),
    Rule("speculative_draft_model_revision", (None,), _REMOVE, _NO_DRAFT_MODEL),
    Rule("speculative_draft_load_format", (None,), _REMOVE, _NO_DRAFT_MODEL),
    Rule("speculative_draft_kv_cache_dtype", (None,), _REMOVE, _NO_DRAFT_MODEL),
    Rule("speculative_token_map", (None,), _REMOVE, _NO_DRAFT_MODEL),
    Rule("speculative_num_steps", (None,), "leave it out, or set --speculative-num-draft-tokens", _BLOCK_DECIDES),
    Rule("speculative_eagle_topk", (None, 1), "leave it out", "ORTHRUS drafts a chain, not a tree"),
    Rule("speculative_adaptive", (False,), _REMOVE, _BLOCK_DECIDES),
    Rule("speculative_adaptive_config", (None,), _REMOVE, _BLOCK_DECIDES),
    Rule("speculative_use_block_verification", (False,), _REMOVE, _EXACT),
    Rule("speculative_dflash_block_size", (None,), _REMOVE, _OTHER_ALGORITHM),
    Rule("speculative_dspark_block_size", (None,), _REMOVE, _OTHER_ALGORITHM),
    Rule("speculative_ngram_external_corpus_path", (None,), _REMOVE, _OTHER_ALGORITHM),
    Rule("uno_lora_path", (None,), _REMOVE, _OTHER_ALGORITHM),
    Rule("enable_multi_layer_eagle", (False,), _REMOVE, _OTHER_ALGORITHM),
    Rule("speculative_accept_threshold_single", (1.0,), _REMOVE, _EXACT),
    Rule("speculative_accept_threshold_acc", (1.0,), _REMOVE, _EXACT),
    Rule("speculative_use_rejection_sampling", (False,), _REMOVE, _EXACT),
)


# What SGLang makes of the machine, and of --enable-dp-attention, the former name of --attn-dp-size.
REFUSED_IF_DERIVED = ("device", "attn_dp_size")
