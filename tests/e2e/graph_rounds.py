"""Run rounds as graphs, split graphs and eagerly through SGLang's own worker, and save what they say.

A script, since SGLang's runtime is set up once per process: python -m tests.e2e.graph_rounds MODEL CASES OUT [FLAGS].
CASES is a JSON list of batches, each a list of prefixes (token ids), whose last tokens are the anchors. Without a GPU,
captured functions stand in for CUDA graphs (`tests.e2e.graph_replay`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.plugins import load_plugins

from sglang_orthrus.core import OrthrusState, RoundBatch
from sglang_orthrus.round.worker import OrthrusWorker
from tests.e2e import graph_replay
from tests.e2e.view_logits import prefill, start_worker


def start_round(batch: ScheduleBatch, anchors: torch.Tensor, width: int) -> None:
    """What the scheduler does before a round: slots for a block of every request, and the anchors."""
    bs = anchors.shape[0]
    slots = batch.token_to_kv_pool_allocator.alloc(bs * width).view(bs, width)
    for row, length in enumerate(batch.seq_lens.tolist()):
        batch.req_to_token_pool.req_to_token[batch.req_pool_indices[row], length : length + width] = slots[row]
    batch.spec_info = OrthrusState(anchors, batch.seq_lens)


@contextmanager
def eagerly(worker: OrthrusWorker) -> Iterator[None]:
    """No graph is used, though there are some."""
    with mock.patch.object(worker.model_runner, "decode_cuda_graph_runner", None):
        yield


def gaps(worker: OrthrusWorker, hidden_states: torch.Tensor) -> list[list[float]]:
    """Distance of the two best logits in every row of every request: [bs, rows, hidden] -> [bs, rows]."""
    bs, rows, _ = hidden_states.shape
    best = worker.model_runner.model.logits(hidden_states).topk(2).values
    result: list[list[float]] = (best[:, 0] - best[:, 1]).view(bs, rows).tolist()
    return result


def two_passes(worker: OrthrusWorker, batch: RoundBatch) -> tuple[list[Any], str]:
    """A greedy round without a graph for all of it: block and predictions, and how it ran."""
    model = worker.model_runner.model
    draft = worker._passes.draft(batch)
    drafts = model.best_tokens(draft.hidden_states[:, :-1])
    block = torch.cat((batch.blocks.ids[:, :1], drafts), dim=1)
    verify = worker._passes.verify(worker._passes.prepare_verify(batch, draft), block)
    predictions = model.best_tokens(verify.hidden_states)
    path = "split" if draft.replayed and verify.replayed else "eager"
    return [block.tolist(), predictions.tolist()], path


def rounds(worker: OrthrusWorker, scheduled: ScheduleBatch) -> dict[str, Any]:
    """The same round in each way: block and predictions, [bs, Q]; and how undecided the eager one was."""
    batch = worker._passes.lay_out(scheduled, worker.speculative_num_draft_tokens)
    found: dict[str, Any] = {}
    fused = worker._passes.fused(batch)
    found["graph"] = None if fused is None else [part.tolist() for part in fused]
    found["split"], found["split path"] = two_passes(worker, batch)
    with eagerly(worker):
        found["eager"], found["eager path"] = two_passes(worker, batch)
        draft = worker._passes.draft(batch)
        block = batch.blocks.ids.new_tensor(found["eager"][0])
        prepared = worker._passes.prepare_verify(batch, draft)
        found["draft gaps"] = gaps(worker, draft.hidden_states[:, :-1])
        found["gaps"] = gaps(worker, worker._passes.verify(prepared, block).hidden_states)
    return found


def main(model: str, cases_file: str, out: str, *flags: str) -> None:
    batches: list[list[list[int]]] = json.loads(Path(cases_file).read_text())
    found = []
    if not torch.cuda.is_available():
        load_plugins()
        graph_replay.register()
    with torch.inference_mode():
        worker = start_worker(model, *flags)
        width = worker.model_runner.model.dual_view.block_size
        for prefixes in batches:
            batch, _ = prefill(worker, [prefix[:-1] for prefix in prefixes])
            batch.has_grammar = False
            start_round(batch, torch.tensor([prefix[-1] for prefix in prefixes], device=worker.device), width)
            found.append(rounds(worker, batch))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
