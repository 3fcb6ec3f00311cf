"""What SGLang asks of a speculative algorithm: predicates and server-argument defaults."""

from __future__ import annotations

from typing import Any

from sglang.srt.speculative.spec_registry import CustomSpecAlgo

from sglang_orthrus.compat.ledger import EXTENSION_POINT, depends_on
from sglang_orthrus.server_args.refusals import (
    ATTENTION_BACKENDS,
    Refused,
    attention_backends,
    dual_view,
    flag_refusals,
    is_given,
    validate_server_args,
)

__all__ = ["ATTENTION_BACKENDS", "NAME", "OrthrusAlgorithm", "Refused", "flag_refusals", "validate_server_args"]

NAME = "ORTHRUS"


@depends_on(
    "sglang.srt.speculative.spec_registry:CustomSpecAlgo",
    "name",
    "factory",
    "supports_overlap",
    "validate_server_args",
    what="subclassed; overrides supports_grammar_overlap, supports_prefill_shared_read_done, has_draft_kv, "
    "supports_mixed_chunk, handle_server_args",
    why="the spec_class argument of SpeculativeAlgorithm.register expects a subclass, but the module is private",
    until=EXTENSION_POINT,
)
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

    @depends_on(
        "sglang.srt.managers.overlap_utils:FutureMap",
        "device",
        "spec_algo",
        "req_to_token_pool",
        "needs_cpu_seq_lens",
        "needs_confidence_relay",
        what="constructed",
        why="the scheduler asks the algorithm for it, and CustomSpecAlgo has no answer",
        until="CustomSpecAlgo has create_future_map (patches/0001)",
    )
    def create_future_map(
        self,
        device: Any,
        req_to_token_pool: Any,
        needs_cpu_seq_lens: bool = True,
        needs_confidence_relay: bool = False,
    ) -> Any:
        """The overlap scheduler's relay of anchors and lengths, as `SpeculativeAlgorithm` makes it."""
        from sglang.srt.managers.overlap_utils import FutureMap

        return FutureMap(device, self, req_to_token_pool, needs_cpu_seq_lens, needs_confidence_relay)

    def supports_grammar_overlap(self) -> bool:
        """A round asks grammars after the former one's result was taken in: see `OrthrusWorker`."""
        return True

    def supports_mixed_chunk(self) -> bool:
        """Running requests may take one token each from a prefill: see `MixedSteps`."""
        return True

    def supports_prefill_shared_read_done(self) -> bool:
        """Prefill is the AR view alone: nothing reads its buffers after it."""
        return True

    def has_draft_kv(self) -> bool:
        """Draft K/V lie in the slots that verify then overwrites, so no page is reserved for them."""
        return False

    def handle_server_args(self, server_args: Any) -> None:
        """Fill in what the checkpoint decides, and a backend that ORTHRUS runs on where SGLang has chosen another.

        SGLang records every write as a declaration.
        """
        block_size = dual_view(server_args).block_size
        if server_args.speculative_num_draft_tokens is None:
            server_args.speculative_num_draft_tokens = block_size
        # The KV reservation is the larger of steps * topk and the largest width.
        server_args.speculative_num_steps = block_size
        server_args.speculative_eagle_topk = 1
        if server_args.boundary_reduction == "auto":
            # As for Qwen3, which SGLang tells by names that an Orthrus checkpoint need not have.
            server_args.boundary_reduction = "ar"
        for field, backend in attention_backends(server_args).items():
            if server_args.device == "cuda" and backend not in ATTENTION_BACKENDS and not is_given(server_args, field):
                setattr(server_args, field, ATTENTION_BACKENDS[0])
