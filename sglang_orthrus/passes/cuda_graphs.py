"""CUDA graphs of a round: all of it in one graph, or its two passes in one each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.arg_groups.cuda_graph_hook import generate_decode_cuda_graph_batch_sizes
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.cuda_graph_config import with_phase
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend
from sglang.srt.runtime_context import get_exec, get_spec

from sglang_orthrus.compat.ledger import depends_on
from sglang_orthrus.core import OrthrusBlockInput, Phase

Forward = Callable[..., LogitsProcessorOutput]
# Of a graph, before it is captured. The last one of the first graph tells how much memory graphs take.
WARM_UPS = 2
# Of a graph that drafts, if there are several widths. On an H200 (8B shape), a round of 1,024 rows takes 43 ms, six
# plain steps of 128 requests, and rounds of twice as many rows won at no batch size.
MOST_ROWS = 1024
# Of a graph of a whole round that drafts. A round of more rows takes a GPU longer than a host needs for two graphs.
MOST_FUSED_ROWS = 256
# Up to this batch size the largest width has graphs of every size: its rounds are the best there, and padding one
# request of eight costs a tenth. Of larger batches few are best at it.
SMALL_BATCH = 8


@depends_on(
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner",
    "model_runner",
    "attn_backend",
    "speculative_num_draft_tokens",
    what="subclassed; overrides capture, capture_one_shape, get_spec_info, can_run_graph, _resolve_lora_variant, "
    "_next_token_logits_buffer_capacity_rows",
    why="it has no spec input for plugins' algorithms, and one graph per batch size",
    until="it asks the algorithm for spec inputs and graph variants",
)
@depends_on(
    "sglang.srt.model_executor.cuda_graph_config:with_phase",
    "config",
    "phase",
    what="called for another list of batch sizes while a runner of one of several widths is made",
    why="the runner takes its batch sizes and the size of its buffers from the configuration",
    until="SGLang captures graphs of several widths",
)
@depends_on(
    "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend:FullCudaGraphBackend.capture_one",
    "forward_fn",
    what="known to call it twice before it captures it",
    why="a round's graph warms up the graphs of its passes",
    until="SGLang captures several graphs of a shape after one warm-up",
)
class OrthrusGraphRunner(DecodeCudaGraphRunner):
    """SGLang's decode graph runner with a graph per phase and batch size, over one set of buffers and one plan.

    A block of one token drafts nothing, so its round is the verify pass alone.

    Attributes:
        block: [max_bs, Q] int64, after a replayed ROUND the anchors and drafts.
        predictions: [max_bs, Q] int64, after a replayed ROUND the AR view's next token after each of them.
    """

    block: torch.Tensor
    predictions: torch.Tensor

    def __init__(self, model_runner: Any, **kwargs: Any) -> None:
        self._phase = Phase.VERIFY
        super().__init__(model_runner, **kwargs)  # captures

    def phases(self, size: int) -> tuple[Phase, ...]:
        """What there are graphs of for a batch size, the whole round first if it is among them."""
        width = self.captured_req_width
        fused = (Phase.ROUND,) if width == 1 or size * width <= MOST_FUSED_ROWS else ()
        drafts = (Phase.DRAFT,) if width > 1 else ()
        return (*fused, Phase.VERIFY, *drafts)

    def capture(self) -> None:
        """Capture every batch size; what a round leaves behind lies outside the memory that graphs share."""
        shape = (self.max_bs, self.captured_req_width)
        self.block = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.predictions = torch.zeros_like(self.block)
        super().capture()

    def capture_one_shape(
        self,
        size: int,
        forward: Forward,
        stream_idx: int | None = None,
        variant_label: str | None = None,
        attention_variant: str | None = None,
    ) -> None:
        """Capture every phase of a batch size. The first one is warmed up: it loads the kernels of the others."""
        for number, phase in enumerate(self.phases(size)):
            self._phase = phase
            run = self._round(forward) if phase is Phase.ROUND else forward
            if isinstance(self.backend, FullCudaGraphBackend):
                run = _skipping(run, WARM_UPS if number else 1)
            super().capture_one_shape(size, run, stream_idx, phase.value, attention_variant)

    def get_spec_info(self, num_tokens: int) -> OrthrusBlockInput:
        """The input of the phase that is captured."""
        return _captured_input(self._phase, self.captured_req_width)

    def can_run_graph(self, forward_batch: ForwardBatch) -> bool:
        """Whether a graph of the batch's phase covers its size."""
        block, size = forward_batch.spec_info, forward_batch.batch_size
        padded = next((captured for captured in self.capture_bs if captured >= size), size)
        is_block = isinstance(block, OrthrusBlockInput) and block.phase in self.phases(padded)
        return is_block and bool(super().can_run_graph(forward_batch))

    def _resolve_lora_variant(self, forward_batch: ForwardBatch) -> str:
        # SGLang's key of a graph includes a variant, and this method names the one that a batch replays.
        phase: Phase = forward_batch.spec_info.phase
        return phase.value

    def _next_token_logits_buffer_capacity_rows(self, max_num_tokens: int) -> int:
        # No graph leaves logits behind: see `OrthrusLM.forward`.
        return 1

    def _round(self, forward: Forward) -> Forward:
        width = self.captured_req_width
        best_tokens = self.model_runner.model.best_tokens

        def run(
            input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch, **kwargs: Any
        ) -> LogitsProcessorOutput:
            rows = forward_batch.batch_size
            block, predictions = self.block[:rows], self.predictions[:rows]

            def hidden_states(phase: Phase) -> torch.Tensor:
                forward_batch.spec_info = _captured_input(phase, width)
                output = forward(input_ids, positions, forward_batch, **kwargs)
                return output.hidden_states.unflatten(0, (-1, width))

            block.copy_(input_ids.view_as(block))
            if width > 1:
                block[:, 1:].copy_(best_tokens(hidden_states(Phase.DRAFT)[:, :-1]))
            # The replayed graph finds the mask tokens here again: every batch is copied in before its replay.
            input_ids.copy_(block.flatten())
            predictions.copy_(best_tokens(hidden_states(Phase.VERIFY)))
            return LogitsProcessorOutput(next_token_logits=None)

        return run


class LargestGraphRunner(OrthrusGraphRunner):
    """Graphs of the largest of several widths, of fewer batch sizes: every width takes time at start-up, and memory.

    Sizes that the user named are captured all.
    """

    def __init__(self, model_runner: Any, **kwargs: Any) -> None:
        graph = get_exec().graph
        config, sizes = graph.cuda_graph_config, graph.cuda_graph_config.decode.bs
        if sizes and graph.cuda_graph_bs_decode is None and not graph.disable_cuda_graph_padding:
            width = kwargs.get("speculative_num_draft_tokens") or get_spec().speculative_num_draft_tokens
            config = with_phase(config, "decode", bs=self._worthwhile(sizes, int(width)))
        with graph.override(cuda_graph_config=config):
            super().__init__(model_runner, **kwargs)

    def _worthwhile(self, sizes: Sequence[int], width: int) -> list[int]:
        small = [size for size in sizes if size <= SMALL_BATCH]
        return worthwhile(sorted({*small, *as_in_plain_decoding(sizes)}), width)


class NarrowGraphRunner(LargestGraphRunner):
    """Graphs of a narrower width."""

    def _worthwhile(self, sizes: Sequence[int], width: int) -> list[int]:
        return worthwhile(as_in_plain_decoding(sizes), width)


def worthwhile(sizes: Sequence[int], width: int) -> list[int]:
    """Those of ascending batch sizes whose rounds are short enough to win; at least one.

    Many rows keep a GPU busy: their rounds take as much longer as they are wider, and cannot win over narrower ones.
    """
    return [size for size in sizes if width == 1 or size * width <= MOST_ROWS] or list(sizes[:1])


@depends_on(
    "sglang.srt.arg_groups.cuda_graph_hook:generate_decode_cuda_graph_batch_sizes",
    "server_args",
    "max_bs",
    what="called for the batch sizes of a server without speculation",
    why="SGLang captures more sizes for one that speculates, and every width captures its own",
    until="SGLang captures graphs of several widths",
)
def as_in_plain_decoding(sizes: Sequence[int]) -> list[int]:
    """Those of ascending batch sizes that SGLang captures without speculation, and the largest.

    A batch is padded to the next size. Passes over some sizes are much slower than over the next smaller ones:
    powers of two fill a GPU's tiles. So padding has to be what it is in plain SGLang.
    """
    plain = SimpleNamespace(speculative_algorithm=None, disable_cuda_graph_padding=False)
    wanted = set(generate_decode_cuda_graph_batch_sizes(plain, sizes[-1]))
    return [size for size in sizes if size in wanted]


def _skipping(forward: Forward, count: int) -> Forward:
    """Leave out the first calls, which are warm-ups: they take most of the time of a capture."""
    left = count

    def run(*args: Any, **kwargs: Any) -> LogitsProcessorOutput:
        nonlocal left
        if left and not torch.cuda.is_current_stream_capturing():
            left -= 1
            return LogitsProcessorOutput(next_token_logits=None)
        return forward(*args, **kwargs)

    return run


def _captured_input(phase: Phase, width: int) -> OrthrusBlockInput:
    return OrthrusBlockInput(draft_token=None, positions=None, draft_token_num=width, phase=phase)
