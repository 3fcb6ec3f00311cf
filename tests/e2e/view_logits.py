"""Run both views of a checkpoint through SGLang's own worker and KV pool, and save their logits.

A script, since SGLang's runtime is set up once per process: python -m tests.e2e.view_logits MODEL CASES OUT. CASES is
a JSON list of {"prefix": [ids], "block": [ids]}: all of them form one batch.
"""

from __future__ import annotations

import json
import sys
from array import array
from pathlib import Path
from typing import Any

import torch
from sglang.benchmark import one_batch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.plugins import load_plugins
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import PortArgs, prepare_server_args
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sglang_orthrus.core import OrthrusState
from sglang_orthrus.round.worker import OrthrusWorker


def start_worker(model: str, *flags: str) -> OrthrusWorker:
    """The workers of a scheduler process, set up in its order; on the CPU in fp32 unless flags say otherwise."""
    load_plugins()
    flags = flags or ("--device", "cpu", "--dtype", "float32")
    args = prepare_server_args(["--model-path", model, "--speculative-algorithm", "ORTHRUS", *flags])
    ports = PortArgs.init_new(args)
    ranks = one_batch.SpawnRanks(world_rank=0, gpu_id=0)
    one_batch.publish(args, role="scheduler", ranks=ranks)
    one_batch._init_process_global_configs()
    config = one_batch.ModelConfig.from_server_args(args)
    one_batch.bootstrap.init_parallel_runtime(server_args=args, device=args.device, dist_port=ports.nccl_port)
    one_batch.bootstrap.init_layer_runtime(model_config=config)

    target = TpModelWorker(server_args=args, gpu_id=0, nccl_port=ports.nccl_port)
    worker_class = SpeculativeAlgorithm.from_string("ORTHRUS").create_worker(args)
    worker: OrthrusWorker = worker_class(server_args=args, gpu_id=0, nccl_port=ports.nccl_port, target_worker=target)
    target.alloc_memory_pool()
    target.init_attention_backends()
    worker.init_attention_backends()
    target.init_cuda_graphs()
    worker.init_cuda_graphs()
    return worker


def prefill(worker: OrthrusWorker, prompts: list[list[int]]) -> tuple[ScheduleBatch, torch.Tensor]:
    """One prefill batch. -> the batch, logits of each prompt's last row [bs, vocabulary]."""
    requests = []
    for index, ids in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_new_tokens=1)
        params.normalize(None)
        request = Req(str(index), "", array("q", ids), params)
        request.full_untruncated_fill_ids = request.origin_input_ids
        request.logprob_start_len = -1
        request.extend_end = len(ids)
        requests.append(request)
    _, logits, batch = one_batch.extend(requests, worker.model_runner)
    return batch, logits


def run_round(worker: OrthrusWorker, batch: ScheduleBatch, blocks: torch.Tensor) -> dict[str, Any]:
    """Draft from the blocks' first column, then verify the blocks themselves. blocks: [bs, width]."""
    bs, width = blocks.shape
    slots = batch.token_to_kv_pool_allocator.alloc(bs * width).view(bs, width)
    for row, length in enumerate(batch.seq_lens.tolist()):
        batch.req_to_token_pool.req_to_token[batch.req_pool_indices[row], length : length + width] = slots[row]
    batch.spec_info = OrthrusState(blocks[:, 0], batch.seq_lens)
    begun = worker._passes.lay_out(batch, width)
    model = worker.model_runner.model
    drafted = worker._passes.draft(begun)
    draft = model.logits(drafted.hidden_states[:, :-1])
    prepared = worker._passes.prepare_verify(begun, drafted)
    verify = model.logits(worker._passes.verify(prepared, blocks).hidden_states)
    return {"draft": draft.view(bs, width - 1, -1), "verify": verify.view(bs, width, -1)}


def main(model: str, cases_file: str, out: str) -> None:
    cases = json.loads(Path(cases_file).read_text())
    with torch.inference_mode():
        worker = start_worker(model)
        batch, last = prefill(worker, [case["prefix"] for case in cases])
        logits = run_round(worker, batch, torch.tensor([case["block"] for case in cases]))
    torch.save({"prefill": last.clone(), **{name: value.clone() for name, value in logits.items()}}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
