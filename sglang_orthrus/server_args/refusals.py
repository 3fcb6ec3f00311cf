"""Which server arguments ORTHRUS refuses, and what it says about each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.compat.versions import require_supported_sglang
from sglang_orthrus.config import (
    ARCHITECTURES,
    QUANT_METHODS,
    DraftMode,
    DualViewConfig,
    is_orthrus,
    slow_mask_seconds,
    speed_floor,
    widths_from_env,
)
from sglang_orthrus.server_args.flag_rules import REFUSED_IF_DERIVED, RULES

ATTENTION_BACKENDS = ("flashinfer", "fa3", "triton")
CPU_ATTENTION_BACKENDS = ("torch_native",)
# Of the hierarchical cache, by field: what `cpu/host_pool.py` copies.
CPU_HOST_POOLS = {"hicache_io_backend": ("kernel",), "hicache_mem_layout": ("page_first", "layer_first")}


class Refused(ValueError):
    """Server arguments that ORTHRUS can't serve. The message is the first refusal; `sentences` are all of them."""

    def __init__(self, sentences: Sequence[str]) -> None:
        super().__init__(sentences[0])
        self.sentences = tuple(sentences)


def validate_server_args(server_args: Any) -> None:
    """Refuse what ORTHRUS can't serve.

    Raises:
        Refused: with one sentence for each flag, which names it, its value and what to do.
    """
    sentences = [
        *_checkpoint_refusals(server_args),
        *_quantization_refusals(server_args),
        *_attention_refusals(server_args),
        *_rank_refusals(server_args),
        *_host_pool_refusals(server_args),
        *flag_refusals(server_args),
        *environment_refusals(),
    ]
    if sentences:
        raise Refused(sentences)


def flag_refusals(args: Any) -> Iterator[str]:
    """One sentence for each flag that is refused whatever the checkpoint; `args` need not be resolved."""
    for rule in RULES:
        value = getattr(args, rule.field)
        if value not in rule.served and (rule.field in REFUSED_IF_DERIVED or is_given(args, rule.field, rule.served)):
            yield f"{_flag(rule.field, value)}: {rule.reason}; {rule.advice}."


@depends_on(
    "sglang.srt.arg_groups.pipeline:run_resolution_pipeline",
    "server_args",
    what="the _raw_input that it keeps is read",
    why="a resolved field does not say whether the user or SGLang has set it",
    until="ServerArgs tells",
)
def is_given(args: Any, field: str, served: Sequence[Any] = (None,)) -> bool:
    """Whether the user gave a field another value than these; SGLang may have derived the one that it has now."""
    given: dict[str, Any] | None = getattr(args, "_raw_input", None)
    return (getattr(args, field) if given is None else given[field]) not in served


def environment_refusals() -> Iterator[str]:
    """One sentence for each environment variable that is refused."""
    from sglang.srt.environ import envs

    for variable, served in (
        (envs.SGLANG_ENABLE_METADATA_GLUE_GRAPH, False),
        (envs.SGLANG_RAGGED_VERIFY_MODE, "static"),
    ):
        if variable.get() != served:
            setting = f"{variable.name}={os.environ.get(variable.name)}"
            yield f"{setting}: ORTHRUS does not support it; unset the environment variable."
    for read in (DraftMode.from_env, slow_mask_seconds, speed_floor):
        try:
            read()
        except ValueError as error:
            yield str(error)


def _checkpoint_refusals(args: Any) -> Iterator[str]:
    try:
        require_supported_sglang()
    except ValueError as error:
        yield str(error)
    try:
        block_size = dual_view(args).block_size
    except ValueError as error:
        yield str(error)
        return
    width = args.speculative_num_draft_tokens
    if width is not None and not 2 <= width <= block_size:
        yield (
            f"--speculative-num-draft-tokens {width}: ORTHRUS drafts and verifies 2 to {block_size} tokens per round, "
            "the checkpoint's block_size at most; leave the flag out for the whole block."
        )
        return
    try:
        widths_from_env(width or block_size)
    except ValueError as error:
        yield str(error)


def _attention_refusals(args: Any) -> Iterator[str]:
    served = {"cpu": CPU_ATTENTION_BACKENDS, "cuda": ATTENTION_BACKENDS}.get(args.device)
    if served is None:
        return  # the device itself is refused
    backends = attention_backends(args)
    for field, backend in backends.items():
        if backend is not None and backend not in served and is_given(args, field):
            yield (
                f"{_flag(field, backend)}: with --device {args.device} ORTHRUS runs on {' or '.join(served)}; "
                f"use --attention-backend {served[0]}."
            )
    if args.device == "cuda" and "triton" in backends.values():
        yield from _triton_refusals(args)


def _rank_refusals(args: Any) -> Iterator[str]:
    """Tensor-parallel ranks that would have to share key-value heads."""
    if args.tp_size == 1:
        return
    heads = _hf_config(args).num_key_value_heads
    if heads % args.tp_size:
        fitting = " or ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
        yield (
            f"{_flag('tp_size', args.tp_size)}: the checkpoint's {heads} key-value heads can't be shared out evenly, "
            f"and ORTHRUS copies none; use --tp-size {fitting}."
        )


def _quantization_refusals(args: Any) -> Iterator[str]:
    """A checkpoint quantised by other methods than those that were tried, and any on a CPU."""
    method = _declared_quantization(args).get("quant_method")
    checkpoint = f"--model-path {args.model_path}: the checkpoint is quantised ({method})"
    if args.device == "cpu":
        advice = "the CPU platform has no kernels for that; use a GPU, or a checkpoint that is not quantised"
        if method is not None:
            yield f"{checkpoint}, and {advice}."
        elif is_given(args, "quantization"):
            yield f"{_flag('quantization', args.quantization)}: {advice}."
    elif method is not None and method not in QUANT_METHODS:
        yield f"{checkpoint}, and ORTHRUS serves {', '.join(QUANT_METHODS)}; use a checkpoint in one of these forms."


def _host_pool_refusals(args: Any) -> Iterator[str]:
    """Transfers and layouts of the hierarchical cache that have no PyTorch version."""
    if args.device != "cpu":
        return
    for field, served in CPU_HOST_POOLS.items():
        if is_given(args, field, served):
            yield (
                f"{_flag(field, getattr(args, field))}: with --device cpu the hierarchical cache has "
                f"{' or '.join(served)} only; remove the flag."
            )


def _triton_refusals(args: Any) -> Iterator[str]:
    """Its kernel attends to a block's own K and V as they were before they were rounded to the pool's type."""
    reason = "on triton a round would attend to K and V that are not rounded as plain SGLang's are"
    advice = "use --attention-backend flashinfer or fa3, or --kv-cache-dtype bfloat16"
    if args.kv_cache_dtype.startswith("fp8"):
        yield f"{_flag('kv_cache_dtype', args.kv_cache_dtype)}: {reason}; {advice}."
    elif args.kv_cache_dtype == "auto" and _declares_fp8_kv(args):
        yield f"--model-path {args.model_path}: the checkpoint asks for an fp8 KV cache, and {reason}; {advice}."


def _declares_fp8_kv(args: Any) -> bool:
    """Whether `--kv-cache-dtype auto` means fp8, as SGLang reads the checkpoint."""
    declared = _declared_quantization(args)
    scheme = declared.get("kv_cache_scheme") or {}
    is_fp8_scheme = (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    algorithm = declared.get("kv_cache_quant_algo") or declared.get("quantization", {}).get("kv_cache_quant_algo")
    return str(algorithm).upper() == "FP8" or is_fp8_scheme


def _declared_quantization(args: Any) -> dict[str, Any]:
    """What the checkpoint says of its quantization; empty if it is not quantised."""
    config = _hf_config(args)
    declared = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    return dict(declared or {})


@depends_on(
    "sglang.srt.arg_groups.model_override_base:attention_backends_of",
    "cfg",
    what="reads the resolved attention backends",
    why="nothing else lets the prefill and decode flags fall back to the common one",
    until="never: it only reads",
)
def attention_backends(args: Any) -> dict[str, str | None]:
    """The attention backends, by the field that chose each."""
    from sglang.srt.arg_groups.model_override_base import attention_backends_of

    fields = ("prefill_attention_backend", "decode_attention_backend")
    return {
        field if getattr(args, field) else "attention_backend": backend
        for field, backend in zip(fields, attention_backends_of(args), strict=True)
    }


def _flag(field: str, value: Any) -> str:
    """A field and its value as on the command line."""
    name = f"--{field.replace('_', '-')}"
    if value is True:
        return name
    return f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple | dict) else value}"


def dual_view(server_args: Any) -> DualViewConfig:
    """The diffusion view of the checkpoint that the arguments name.

    Raises:
        ValueError: if it is not an Orthrus checkpoint, or not a complete one.
    """
    hf_config = _hf_config(server_args)
    if not is_orthrus(hf_config):
        raise ValueError(
            f"--model-path {server_args.model_path}: its architectures are {hf_config.architectures}, and "
            f"--speculative-algorithm ORTHRUS serves {' and '.join(ARCHITECTURES)} only; use an Orthrus checkpoint "
            "such as chiennv/Orthrus-Qwen3-8B, or remove --speculative-algorithm."
        )
    return DualViewConfig.from_hf(hf_config)


@depends_on(
    "sglang.srt.arg_groups.model_override_base:model_config_of",
    "server_args",
    what="reads the checkpoint's configuration while arguments are resolved",
    why="the validation hook gets the arguments alone",
    until="never: it only reads",
)
def _hf_config(args: Any) -> Any:
    """The checkpoint's configuration, Hugging Face's."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    return model_config_of(args).hf_config
