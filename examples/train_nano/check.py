"""Before a long run on an accelerator: both stages compiled, compared with dense masks, and timed."""

from __future__ import annotations

import argparse
import time

import torch

from examples.train_nano.model import NanoConfig, OrthrusLM
from examples.train_nano.optim import make_optimizers
from examples.train_nano.probe import held_out_rows, to_device
from examples.train_nano.stream import Place, RowStream
from examples.train_nano.train import Stage, verified

WARM_UP = 5


def _check_stage(name: str, args: argparse.Namespace, num_rows: int, stream: RowStream) -> None:
    begin = time.monotonic()
    device = torch.device(args.device)
    model = OrthrusLM(NanoConfig().tiny() if args.smoke else NanoConfig()).to(device)
    rows = held_out_rows(args.tokenizer, num_rows, args.length)
    inputs = to_device(rows, device)
    stage = Stage(name, model, args, inputs)
    weights = stage.trainable()
    optimizers = make_optimizers(weights, 1e-3, args.optimizer == "muon", device)
    error = verified(stage, inputs)
    print(f"{name}: compiled after {time.monotonic() - begin:.0f} s; differs from dense by {error:.4f}", flush=True)
    stage.probe(rows, inputs)
    print(f"  probe compiled after {time.monotonic() - begin:.0f} s", flush=True)
    losses = []
    steps = 3 if args.smoke else 40
    start = time.monotonic()
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            _synchronise(device)
            start = time.monotonic()
        loss = stage.loss(to_device(stream.next().rows, device), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    first, last = float(losses[0]), float(losses[-1])
    seconds = (time.monotonic() - start) / steps
    print(f"  {num_rows * args.length / seconds / 1e6:.2f}M row tokens/s, {seconds * 1000:.1f} ms per step")
    print(f"  loss {first:.3f} -> {last:.3f}; waited {stream.waited:.1f} s for data")
    if device.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
        torch.cuda.reset_peak_memory_stats()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _measure_data(args: argparse.Namespace, stream: RowStream, num_rows: int) -> None:
    """Data alone, after the batches made so far are used up."""
    start = time.monotonic()
    while time.monotonic() - start < 5:
        stream.next()
    start, made = time.monotonic(), 0
    while time.monotonic() - start < 5:
        stream.next()
        made += num_rows * args.length
    rate = made / (time.monotonic() - start)
    print(f"data alone: {rate / 1e6:.2f}M tokens/s from {args.workers // 2} workers", flush=True)


def check(args: argparse.Namespace) -> None:
    """Runs the check; raises AssertionError if compiled and dense computations disagree."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    counts = {"ar": args.rows or 64, "diff": args.rows or 32}
    streams = {
        name: RowStream(args.tokenizer, args.seed, rows, args.length, args.workers // 2, Place())
        for name, rows in counts.items()
    }
    try:
        for name, num_rows in counts.items():
            _check_stage(name, args, num_rows, streams[name])
        if args.workers:
            _measure_data(args, streams["ar"], counts["ar"])
    finally:
        for stream in streams.values():
            stream.close()
    print("check passed", flush=True)
