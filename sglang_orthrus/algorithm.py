"""What SGLang asks of a speculative algorithm: predicates, server-argument defaults and refusals."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_orthrus.compat import require_supported_sglang
from sglang_orthrus.config import ARCHITECTURES, DualViewConfig, is_orthrus

logger = logging.getLogger(__name__)

NAME = "ORTHRUS"
ATTENTION_BACKENDS = ("flashinfer", "fa3", "triton")
CPU_ATTENTION_BACKENDS = ("torch_native",)
DEFAULT_MAX_RUNNING_REQUESTS = 48


class OrthrusAlgorithm(CustomSpecAlgo):
    """`--speculative-algorithm ORTHRUS`: one model drafts and verifies, over one KV pool.

    The first four methods are called by the scheduler but missing from `CustomSpecAlgo` in SGLang 0.5.23
    (`patches/0001`); their answers are those of a drafter without a model, a pool or hidden states of its own.
    """

    def carries_draft_hidden_states(self) -> bool:
        """Nothing but the anchor passes between rounds."""
        return False

    def need_topk(self) -> bool:
        """No draft tree is relayed."""
        return False

    def get_platform_worker_cls(self) -> type | None:
        """The same worker runs on every platform."""
        return None

    def create_future_map(
        self,
        device: Any,
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> Any:
        """The overlap scheduler's relay of anchors and lengths (`SpeculativeAlgorithm.create_future_map`)."""
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)

    def supports_grammar_overlap(self) -> bool:
        """The worker advances the grammar inside verify, through the scheduler's barrier."""
        return True

    def supports_prefill_shared_read_done(self) -> bool:
        """Prefill is the AR view alone: nothing reads its buffers after it."""
        return True

    def has_draft_kv(self) -> bool:
        """Draft K/V lie in the slots that verify then overwrites, so no page is reserved for them."""
        return False

    def handle_server_args(self, server_args: Any) -> None:
        """Fill in what the checkpoint decides; every write is recorded by SGLang as a declaration."""
        from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

        block_size = _dual_view(server_args).block_size
        if server_args.speculative_num_draft_tokens is None:
            server_args.speculative_num_draft_tokens = block_size
        # The KV reservation is the larger of steps * topk and the verify width; a draft always writes a whole block.
        server_args.speculative_num_steps = block_size
        server_args.speculative_eagle_topk = 1
        if server_args.max_running_requests is None:
            server_args.max_running_requests = DEFAULT_MAX_RUNNING_REQUESTS
        graphs = server_args.cuda_graph_config
        if server_args.device != "cpu" and graphs is not None and graphs.decode.backend != Backend.DISABLED:
            logger.warning("ORTHRUS runs its rounds eagerly: decode CUDA graphs are switched off.")
            server_args.cuda_graph_config = with_phase(graphs, Phase.DECODE, backend=Backend.DISABLED)


def validate_server_args(server_args: Any) -> None:
    """Refuse what ORTHRUS can't serve.

    Raises:
        ValueError: one sentence that names the flag, its value and what to do.
    """
    from sglang.srt.arg_groups.model_override_base import attention_backends_of

    require_supported_sglang()
    block_size = _dual_view(server_args).block_size

    width = server_args.speculative_num_draft_tokens
    if width is not None and not 2 <= width <= block_size:
        raise ValueError(
            f"--speculative-num-draft-tokens {width}: ORTHRUS verifies 2 to {block_size} tokens per round, the "
            "checkpoint's block_size at most; leave the flag out for the whole block."
        )
    supported = CPU_ATTENTION_BACKENDS if server_args.device == "cpu" else ATTENTION_BACKENDS
    for backend in attention_backends_of(server_args):
        if backend is not None and backend not in supported:
            raise ValueError(
                f"--attention-backend {backend}: ORTHRUS runs on {', '.join(supported)} with --device "
                f"{server_args.device}; choose one of these."
            )
    for flag, is_wanted, advice in _unsupported(server_args):
        if is_wanted:
            raise ValueError(f"{flag}: ORTHRUS does not support it; {advice}.")


def _unsupported(args: Any) -> tuple[tuple[str, bool, str], ...]:
    """Flag and value, whether it is set, what to do instead."""
    return (
        (f"--tp-size {args.tp_size}", args.tp_size > 1, "use --tp-size 1"),
        (f"--pp-size {args.pp_size}", args.pp_size > 1, "use --pp-size 1"),
        (f"--attn-dp-size {args.attn_dp_size}", args.attn_dp_size > 1, "use --attn-dp-size 1"),
        ("--enable-dp-attention", args.enable_dp_attention, "remove the flag"),
        (
            f"--tokenizer-worker-num {args.tokenizer_worker_num}",
            args.tokenizer_worker_num > 1,
            "use --tokenizer-worker-num 1, since SGLang loads no plugins in the extra workers",
        ),
        (
            f"--disaggregation-mode {args.disaggregation_mode}",
            args.disaggregation_mode != "null",
            "remove the flag",
        ),
        ("--enable-mixed-chunk", args.enable_mixed_chunk, "remove the flag"),
        ("--enable-two-batch-overlap", args.enable_two_batch_overlap, "remove the flag"),
        ("--enable-pdmux", args.enable_pdmux, "remove the flag"),
        ("--enable-torch-compile", args.enable_torch_compile, "remove the flag"),
        ("--enable-lora", bool(args.enable_lora), "merge the adapter into the checkpoint or remove the flag"),
        (
            f"--grammar-backend {args.grammar_backend}",
            args.grammar_backend == "outlines",
            "use xgrammar or llguidance, since outlines can't roll back rejected drafts",
        ),
    )


def _dual_view(server_args: Any) -> DualViewConfig:
    from sglang.srt.arg_groups.model_override_base import model_config_of

    hf_config = model_config_of(server_args).hf_config
    if not is_orthrus(hf_config):
        raise ValueError(
            f"--model-path {server_args.model_path}: its architectures are {hf_config.architectures}, and "
            f"--speculative-algorithm ORTHRUS serves {' and '.join(ARCHITECTURES)} only; use an Orthrus checkpoint "
            "such as chiennv/Orthrus-Qwen3-8B, or remove --speculative-algorithm."
        )
    return DualViewConfig.from_hf(hf_config)
