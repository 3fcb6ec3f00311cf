"""Run rounds as graphs, split graphs and eagerly through SGLang's own worker, and save what they say.

A script, since SGLang's runtime is set up once per process: python -m tests.e2e.graph_rounds MODEL CASES OUT [FLAGS].
CASES is a JSON list of batches, each a list of prefixes (token ids); a batch's last token of each is its anchor. On a
CPU a graph is the recorded call, run again on the same buffers: everything is checked but the recording of kernels.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner import decode_cuda_graph_runner
from sglang.srt.runtime_context import get_exec

from sglang_orthrus.choice import Drafts, TokenChoice
from sglang_orthrus.graph_runner import OrthrusGraphRunner
from sglang_orthrus.spec_input import OrthrusState
from sglang_orthrus.verify import Verdict
from sglang_orthrus.worker import OrthrusWorker
from tests.e2e.view_logits import prefill, start_worker

CAPTURED = [1, 2, 4]


class RecordedCalls:
    """SGLang's graph backend without a GPU: what is captured is the call."""

    def __init__(self, runner: Any, **_: Any) -> None:
        self._calls: dict[Any, Callable[[], Any]] = {}

    @contextmanager
    def capture_session(self, stream: Any) -> Iterator[None]:
        yield

    def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], **_: Any) -> None:
        for _ in range(2):
            forward_fn()
        self._calls[shape_key] = forward_fn

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self._calls

    @contextmanager
    def replay_session(self) -> Iterator[None]:
        yield

    def replay(self, shape_key: Any, static_forward_batch: Any) -> Any:
        return self._calls[shape_key]()


@contextmanager
def recorded_calls(worker: OrthrusWorker) -> Iterator[None]:
    """What the graph runner needs of CUDA, on a CPU."""

    @contextmanager
    def graph_capture(stream: Any = None) -> Iterator[Any]:
        yield SimpleNamespace(stream=None)

    module = decode_cuda_graph_runner
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "graph_capture", graph_capture))
        stack.enter_context(mock.patch.object(module, "get_or_create_global_graph_capture_stream", lambda: None))
        stack.enter_context(mock.patch.object(module, "resolve_decode_backend", RecordedCalls))
        # SGLang's own CPU graphs are of decode steps alone.
        stack.enter_context(mock.patch.object(ForwardMode, "is_cpu_graph", ForwardMode.is_cuda_graph))
        no_marker = mock.patch.object(OrthrusGraphRunner, "_record_in_graph_metadata_prep_done", lambda _: None)
        stack.enter_context(no_marker)
        for backend in worker._runner.attention_backends:
            backend.init_cuda_graph_state = lambda *_: None
            backend.get_cuda_graph_seq_len_fill_value = lambda: 1
            backend.init_forward_metadata_out_graph = lambda fb, in_capture=False, b=backend: b.init_forward_metadata(
                fb
            )
        yield


def capture(worker: OrthrusWorker) -> None:
    """Capture the graphs of a worker, as SGLang does on a GPU."""
    runner = worker.model_runner
    get_exec().graph.cuda_graph_config.decode.bs[:] = CAPTURED
    runner.graph_shared_output = GraphSharedOutput(device=torch.device("cpu"), max_rows=1)
    runner.decode_cuda_graph_runner = OrthrusGraphRunner(runner)
    worker.init_cuda_graphs()


def start_round(batch: ScheduleBatch, anchors: torch.Tensor, width: int) -> None:
    """What the scheduler does before a round: slots for a block of every request, and the anchors."""
    bs = anchors.shape[0]
    slots = batch.token_to_kv_pool_allocator.alloc(bs * width).view(bs, width)
    for row, length in enumerate(batch.seq_lens.tolist()):
        batch.req_to_token_pool.req_to_token[batch.req_pool_indices[row], length : length + width] = slots[row]
    batch.spec_info = OrthrusState(anchors, batch.seq_lens)


@contextmanager
def watched_choice(worker: OrthrusWorker) -> Iterator[list[torch.Tensor]]:
    """Block and predictions of the round that is run meanwhile."""
    judge = TokenChoice.judge
    seen: list[torch.Tensor] = []

    def watched(
        choice: TokenChoice, block: torch.Tensor, drafts: Drafts, hidden_states: torch.Tensor, *rest: Any
    ) -> Verdict:
        seen.extend((block, worker.model_runner.model.best_tokens(hidden_states)))
        return judge(choice, block, drafts, hidden_states, *rest)

    with mock.patch.object(TokenChoice, "judge", watched):
        yield seen


def rounds(worker: OrthrusWorker, batch: ScheduleBatch) -> dict[str, Any]:
    """The same round in each way: block and predictions, [bs, Q]."""
    layout = worker._runner.layout(batch)
    found: dict[str, Any] = {}
    fused = worker._runner.round(batch, layout)
    found["graph"] = None if fused is None else [part.tolist() for part in fused]
    for name in ("split", "eager"):
        with ExitStack() as stack:
            if name == "eager":
                stack.enter_context(mock.patch.object(worker.model_runner, "decode_cuda_graph_runner", None))
                stack.enter_context(mock.patch.object(worker._runner, "_draft_graphs", None))
            seen = stack.enter_context(watched_choice(worker))
            *_, path = worker._two_passes(batch, layout, None)
        found[name] = [part.tolist() for part in seen]
        found[f"{name} path"] = path.value
    return found


def main(model: str, cases_file: str, out: str, *flags: str) -> None:
    batches: list[list[list[int]]] = json.loads(Path(cases_file).read_text())
    found = []
    with torch.inference_mode():
        worker = start_worker(model, *flags)
        width = worker.model_runner.model.dual_view.block_size
        with recorded_calls(worker):
            capture(worker)
            for prefixes in batches:
                batch, _ = prefill(worker, [prefix[:-1] for prefix in prefixes])
                batch.has_grammar = False
                start_round(batch, torch.tensor([prefix[-1] for prefix in prefixes]), width)
                found.append(rounds(worker, batch))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
