"""The ledger of what sampling, penalties and log probabilities use of SGLang's internals."""

from __future__ import annotations

from sglang_orthrus.compat.ledger import Touch

_NEVER = "never: every sampler shares it"

SAMPLING_TOUCHES: tuple[Touch, ...] = (
    Touch(
        "sglang.srt.layers.sampler:create_sampler",
        (),
        "what it made is replaced on the model runner (`compat.choose_as_if_alone`)",
        "a sampler backend is chosen by a server argument, which decides about filters, too",
        "SGLang's sampler chooses a path per row",
    ),
    Touch(
        "sglang.srt.layers.sampler:Sampler._sample_from_probs",
        ("probs", "sampling_info", "positions", "simple_sampling_case"),
        "overridden, so that a request's first token does not depend on its neighbours' filters",
        "it picks one path for the whole batch",
        "as above",
    ),
    Touch(
        "sglang.srt.layers.sampler:Sampler._preprocess_logits",
        ("logits", "sampling_info"),
        "overridden, so that options which together allow no token give way",
        "a row without a token ends its scheduler",
        "it leaves every row a token",
    ),
    Touch(
        "sglang.srt.layers.sampler:top_k_top_p_min_p_sampling_from_probs_torch",
        ("probs", "top_ks", "top_ps", "min_ps", "need_min_p_sampling", "sampling_seed", "positions"),
        "called for seeded rows with filters",
        "the same function gives the same tokens",
        _NEVER,
    ),
    Touch(
        "sglang.srt.layers.sampler:sampling_from_probs_torch",
        ("probs", "sampling_seed", "positions"),
        "called for seeded rows without filters",
        "as above",
        _NEVER,
    ),
    Touch(
        "sglang.srt.layers.sampler:apply_custom_logit_processor",
        ("logits", "sampling_batch_info"),
        "called with every row of a block as a request of its own",
        "as SGLang's speculative workers do",
        _NEVER,
    ),
    Touch(
        "sglang.srt.sampling.sampling_batch_info:ProcessorEntry",
        ("processor", "rows", "indices"),
        "constructed for some rows of a batch",
        "it is the form of custom processors in a batch",
        _NEVER,
    ),
    Touch(
        "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo.copy_for_forward",
        (),
        "what it returns says by acc_additive_penalties and acc_scaling_penalties whether any request is penalised; "
        "their values, one constant per block and a round late, are not used",
        "the penalizers themselves stay with the scheduler",
        "SGLang penalises per position",
    ),
    Touch(
        "sglang.srt.sampling.sampling_params:TOP_K_ALL",
        (),
        "compared with top_k",
        "it is how a request says that it has none",
        _NEVER,
    ),
    Touch(
        "sglang.kernels.ops.sampling:softmax",
        ("logits",),
        "called on rows that are drawn without a seed",
        "SGLang's sampler uses it there",
        _NEVER,
    ),
    Touch(
        "sglang.srt.utils.async_probe:sanitize_nan_logits",
        ("logits", "msg"),
        "called before a token is chosen",
        "as SGLang's sampler does",
        _NEVER,
    ),
    Touch(
        "sglang.srt.utils.common:async_h2d",
        ("args", "dtype", "device"),
        "copies request options to the device",
        "a plain copy waits for the device",
        _NEVER,
    ),
    Touch(
        "sglang.srt.layers.logprob_processor:get_top_logprobs",
        ("logprobs", "top_logprobs_nums", "no_copy_to_cpu"),
        "called for a piece of a block's rows",
        "compute_spec_logprobs wants the logits of all rows at once: 2.5 GB for 128 blocks",
        "it works in pieces",
    ),
    Touch(
        "sglang.srt.layers.logprob_processor:get_token_ids_logprobs",
        ("logprobs", "token_ids_logprobs", "no_copy_to_cpu"),
        "as above",
        "as above",
        "as above",
    ),
)
