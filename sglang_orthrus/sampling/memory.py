"""What choosing tokens takes of a GPU's memory, found out before the server takes requests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.model_executor.model_runner import SamplingPrewarmResult
from sglang.srt.model_executor.runner_utils.pool import disable_graph_pool_borrow, graph_pool_borrow_enabled
from sglang.srt.runtime_context import get_exec, get_schedule
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_orthrus.compat.ledger import SHARED_BY_WORKERS, depends_on
from sglang_orthrus.compat.memory import largest_graph
from sglang_orthrus.sampling.batch import BatchSampler
from sglang_orthrus.sampling.drafts import draft_tokens
from sglang_orthrus.sampling.logit_adjustments import Adjustments
from sglang_orthrus.sampling.penalties import TokenCounts
from sglang_orthrus.sampling.request_groups import SAMPLED_ROWS
from sglang_orthrus.sampling.verification import verify_drafts

logger = logging.getLogger(__name__)

# What needs the most copies of a group's logits: the filters of either sampling backend, behind penalties. Greedy
# groups and log probabilities need fewer.
_KINDS: tuple[dict[str, float], ...] = ({"top_p": 0.9}, {"top_p": 0.9, "min_p": 0.05})
_SEEDED_KINDS = _KINDS[:1]  # min-p is refused there


class _FlatHead:
    """A head without weights, which may not be loaded yet: its logits take the memory of the model's."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def logits(self, hidden_states: torch.Tensor, *, in_fp32: bool = True) -> torch.Tensor:
        logits = hidden_states.new_zeros(hidden_states.shape[:-1].numel(), self._vocab_size)
        return logits.float() if in_fp32 else logits


@dataclass(eq=False)
class _Request:
    """What choosing reads of a request."""

    sampling_params: SamplingParams
    custom_logit_processor: None = None
    return_logprob: bool = False
    is_retracted: bool = False

    def finished(self) -> bool:
        return False


@dataclass
class _Batch:
    """What choosing reads of a batch."""

    reqs: list[_Request]
    sampling_info: Any
    seq_lens: torch.Tensor
    device: torch.device


@depends_on(
    "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo",
    "temperatures",
    "top_ps",
    "top_ks",
    "min_ps",
    "acc_additive_penalties",
    "sampling_seed",
    what="constructed for a rehearsal",
    why="sampling reads it (the DFLASH worker constructs it, too)",
    until=SHARED_BY_WORKERS,
)
@torch.no_grad()
def choose_once(hidden_states: torch.Tensor, vocab_size: int, sampling_backend: str, *, are_seeded: bool) -> None:
    """Draft and verify one full group of requests, once for every costly kind.

    Args:
        hidden_states: [n, Q, hidden], whose tokens are chosen.
        vocab_size: V.
        sampling_backend: SGLang's.
        are_seeded: as under deterministic inference.
    """
    num, width = hidden_states.shape[:2]
    device = hidden_states.device
    for kind in _SEEDED_KINDS if are_seeded else _KINDS:
        params = SamplingParams(temperature=0.8, frequency_penalty=0.1, repetition_penalty=1.1, **kind)
        params.normalize(None)
        info = SamplingBatchInfo(
            temperatures=torch.full((num, 1), 0.8, device=device),
            top_ps=torch.full((num,), params.top_p, device=device),
            top_ks=torch.full((num,), params.top_k, dtype=torch.int32, device=device),
            min_ps=torch.full((num,), params.min_p, device=device),
            is_all_greedy=False,
            is_any_greedy=False,
            need_top_p_sampling=True,
            need_top_k_sampling=False,
            need_min_p_sampling=params.min_p > 0,
            vocab_size=vocab_size,
            acc_additive_penalties=torch.zeros(num, 1, device=device),  # only asked whether it is there
            sampling_seed=torch.zeros(num, dtype=torch.int64, device=device) if are_seeded else None,
        )
        batch: Any = _Batch([_Request(params) for _ in range(num)], info, torch.ones(num, device=device).long(), device)
        counts = TokenCounts(vocab_size, device)
        counts.start(batch.reqs)
        anchors = batch.seq_lens.clone()
        adjustments = Adjustments(batch, counts, {})
        sampler = BatchSampler(_FlatHead(vocab_size), batch, anchors, adjustments, width, sampling_backend)
        verify_drafts(sampler, draft_tokens(sampler, hidden_states[:, :-1]), hidden_states)


def choosing_bytes(
    width: int, vocab_size: int, sampling_backend: str, dtype: torch.dtype, device: str, *, are_seeded: bool
) -> int:
    """The most that choosing takes at a time on top of the model, on this device's current stream.

    Args:
        width: Q.
        dtype: of the model.
        vocab_size, sampling_backend, are_seeded: as above.
        device: a GPU.

    Raises:
        torch.OutOfMemoryError: if there is not as much.
    """
    # Hidden states of another size than the model's, which are next to nothing here.
    hidden_states = torch.zeros(max(1, SAMPLED_ROWS // width), width, 8, dtype=dtype, device=device)
    # The first pass builds kernels and makes the workspaces that libraries keep.
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        choose_once(hidden_states, vocab_size, sampling_backend, are_seeded=are_seeded)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@depends_on(
    "sglang.srt.model_executor.model_runner:ModelRunner.prewarm_sampling",
    what="its result is replaced on the runner",
    why="SGLang leaves as much memory as it names when it sizes the KV pool after capture",
    until=SHARED_BY_WORKERS,
)
@depends_on(
    "sglang.srt.model_executor.model_runner:SamplingPrewarmResult",
    "sampling_headroom_bytes",
    what="constructed",
    why="it is the form of that result",
    until=SHARED_BY_WORKERS,
)
@depends_on(
    "sglang.srt.model_executor.runner_utils.pool:disable_graph_pool_borrow",
    "reason",
    what="called, since with borrowing SGLang leaves no memory for sampling",
    why="a round samples between two replays, where the storage of graphs cannot be borrowed",
    until=SHARED_BY_WORKERS,
)
def reserve(model_runner: Any, widths: Sequence[int], sampling_backend: str) -> SamplingPrewarmResult:
    """Have SGLang leave what choosing takes when it sizes the KV pool after capture; else see that it is there.

    Args:
        model_runner: SGLang's, on a GPU; keeps the result.
        widths: every Q that a round may have. A full group of narrow blocks has more requests, each with its penalties.
        sampling_backend: SGLang's.

    Raises:
        RuntimeError: if not as much memory is left.
    """
    schedule = get_schedule()
    vocab_size = model_runner.model.config.vocab_size
    are_seeded = get_exec().deterministic.enable_deterministic_inference
    try:
        peak = max(
            choosing_bytes(
                width, vocab_size, sampling_backend, model_runner.dtype, model_runner.device, are_seeded=are_seeded
            )
            for width in widths
        )
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"--mem-fraction-static {schedule.mem_fraction_static} leaves too little memory to choose tokens in "
            "rounds; use a smaller value."
        ) from error
    # Counts of penalised requests come on top: as many as may run, by default those of the largest graph.
    num_requests = schedule.max_running_requests or largest_graph()
    peak += num_requests * vocab_size * 4
    if graph_pool_borrow_enabled():
        disable_graph_pool_borrow("ORTHRUS chooses tokens between two graphs, in memory of its own")
    model_runner.sampling_prewarm_result = SamplingPrewarmResult(sampling_headroom_bytes=peak)
    logger.info("ORTHRUS chooses tokens in at most %.2f GB.", peak / 2**30)
    return model_runner.sampling_prewarm_result
