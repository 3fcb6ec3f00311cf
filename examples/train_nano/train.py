"""Trains orthrus-nano in the paper's two stages.

    python -m examples.train_nano.train ar --out runs/ar --minutes 7.5
    python -m examples.train_nano.train diff --init runs/ar --out runs/diff --minutes 8.5
    python -m examples.train_nano.train check          # a minute on the accelerator before the real thing
    python -m examples.train_nano.train ar --smoke --out /tmp/ar   # tiny, on a CPU

Stage `ar` trains the AR view from scratch; stage `diff` freezes it and trains the `*_diff` weights on it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from examples.train_nano import checkpoint
from examples.train_nano.checkpoint import Progress
from examples.train_nano.losses import (
    Anchors,
    Inputs,
    ar_correct,
    ar_loss,
    diff_loss,
    draft_runs,
    next_token_weights,
    sample_anchors,
    teach,
)
from examples.train_nano.masks import MaskMaker, packed_blocks, packed_causal
from examples.train_nano.model import NanoConfig, OrthrusLM
from examples.train_nano.optim import make_optimizers
from examples.train_nano.probe import exact_shares, held_out_rows, run_means, to_device
from examples.train_nano.stream import Place, RowStream
from examples.train_nano.tokenizer import TOKENIZER_DIR
from examples.train_nano.verify import verify

PROCESS_START = time.monotonic()
STEPS_AHEAD = 3
SAVE_SECONDS = 6.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("ar", "diff", "check"))
    parser.add_argument("--out", type=Path, help="folder of the checkpoint to write")
    parser.add_argument("--init", type=Path, help="checkpoint whose weights to start from")
    parser.add_argument("--resume", action="store_true", help="continue the checkpoint in --out")
    parser.add_argument("--minutes", type=float, help="training time, compilation excluded; drives the schedule")
    parser.add_argument("--deadline", type=float, help="stop and save before this many seconds after the start")
    parser.add_argument("--steps", type=int, help="train this many steps instead of a time; drives the schedule")
    parser.add_argument("--stop-after", type=int, help="stop at this step, leaving the schedule as it is")
    parser.add_argument("--rows", type=int, help="rows per step (64 for ar, 32 for diff)")
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--anchors", type=int, default=128, help="diffusion blocks per row")
    parser.add_argument("--lr", type=float, help="peak learning rate (6e-3 for ar, 3e-3 for diff)")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the run that warms up")
    parser.add_argument("--prompt-weight", type=float, default=0.15, help="ar: loss weight of prompt tokens")
    parser.add_argument("--decay", type=float, default=0.97, help="diff: weight of block row i is decay**i")
    parser.add_argument("--workers", type=int, default=14, help="data processes; 0 makes data in this one")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--probe-seconds", type=float, default=60.0, help="time between looks at held-out rows")
    parser.add_argument("--save", choices=("full", "weights"), default="full", help="with or without optimizer state")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER_DIR)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--verify", action="store_true", help="first compare compiled with dense attention")
    parser.add_argument("--no-compile", action="store_true", help="run eagerly with dense masks")
    parser.add_argument("--smoke", action="store_true", help="tiny model and batches, about half a minute on a CPU")
    args = parser.parse_args(arguments)
    if args.stage != "check" and args.out is None:
        parser.error("--out is needed: where the checkpoint goes")
    if args.stage == "diff" and args.init is None and not args.resume:
        parser.error("diff needs --init (a checkpoint of stage ar) or --resume")
    if args.smoke:
        args.workers, args.rows, args.length, args.anchors = 0, args.rows or 4, 512, 16
        args.steps = args.steps or 40
    if args.minutes is None and args.steps is None:
        args.minutes = 7.5
    # CPUs have no FlexAttention backward: dense masks, eager.
    args.compile = args.device.startswith("cuda") and not args.no_compile
    return args


class Stage:
    """One stage's step and probe on one batch shape; everything that differs between the stages."""

    def __init__(self, stage: str, model: OrthrusLM, args: argparse.Namespace, example: Inputs) -> None:
        self.stage, self.model, self.args = stage, model, args
        self.device = example.ids.device
        length = example.ids.shape[1]
        block = model.config.block_size
        self.causal = MaskMaker(packed_causal, (example.docs,), length, length, args.compile)
        if stage == "diff":
            anchors = torch.zeros((example.ids.shape[0], args.anchors), dtype=torch.long, device=self.device)
            blocks = args.anchors * block
            make = self._packed_blocks
            self.blocks = MaskMaker(make, (example.docs, anchors), blocks, length + blocks, args.compile)
        compile_: Callable[[Any], Any] = torch.compile if args.compile else lambda function: function
        self.ar_loss, self.ar_correct = compile_(ar_loss), compile_(ar_correct)
        self.teach, self.diff_loss, self.draft_runs = compile_(teach), compile_(diff_loss), compile_(draft_runs)
        self.generator = torch.Generator(self.device)

    def _packed_blocks(self, docs: Tensor, anchors: Tensor) -> Any:
        return packed_blocks(docs, anchors, self.model.config.block_size)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bf16 on CUDA; fp32 elsewhere."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else contextlib.nullcontext()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The weights that this stage trains; all others are frozen."""
        chosen = {}
        for name, p in self.model.named_parameters():
            p.requires_grad_(("_diff" in name) == (self.stage == "diff"))
            if p.requires_grad:
                chosen[name] = p
        return chosen

    def anchors(self, inputs: Inputs, seed: int) -> Anchors:
        """The anchors of a batch: a function of the seed."""
        self.generator.manual_seed(seed)
        return sample_anchors(inputs, self.args.anchors, self.model.config.block_size, self.generator)

    def loss(self, inputs: Inputs, seed: int) -> Tensor:
        """The stage's loss, a scalar."""
        with self.autocast():
            mask = self.causal(inputs.docs)
            if self.stage == "ar":
                weights = next_token_weights(inputs, self.args.prompt_weight)
                loss: Tensor = self.ar_loss(self.model, inputs, weights, mask)
                return loss
            with torch.no_grad():
                teacher = self.teach(self.model, inputs, mask)
            anchors = self.anchors(inputs, seed)
            blocks = self.blocks(inputs.docs, anchors.at)
            loss = self.diff_loss(self.model, inputs, teacher, anchors, blocks, self.args.decay)
            return loss

    @torch.no_grad()
    def probe(self, rows: Any, inputs: Inputs) -> dict[str, float]:
        """Exact answers (ar) or tokens per cycle (diff) per family on held-out rows, teacher-forced."""
        with self.autocast():
            mask = self.causal(inputs.docs)
            if self.stage == "ar":
                return exact_shares(rows, self.ar_correct(self.model, inputs, mask).cpu().numpy())
            teacher = self.teach(self.model, inputs, mask)
            anchors = self.anchors(inputs, 0)
            runs = self.draft_runs(self.model, inputs, teacher, anchors, self.blocks(inputs.docs, anchors.at))
            valid = anchors.rows[:, :, 0].cpu().numpy()
            return run_means(rows, anchors.at.cpu().numpy(), valid, runs.cpu().numpy())


class Pace:
    """Keeps the host at most STEPS_AHEAD steps ahead of the accelerator and reads losses without stalling it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.slots: list[tuple[Tensor, Any]] = []

    def push(self, loss: Tensor) -> float | None:
        """Takes a step's loss; returns that of an earlier step once there is one."""
        if not self.cuda:
            return float(loss.detach())
        host = torch.empty((), pin_memory=True)
        host.copy_(loss.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.slots.append((host, event))
        if len(self.slots) <= STEPS_AHEAD:
            return None
        host, event = self.slots.pop(0)
        event.synchronize()
        return float(host)


def schedule(share: float, warmup: float) -> float:
    """Learning rate as a factor of its peak: linear up, then linear down to 0 at share 1."""
    if share < warmup:
        return max(share / warmup, 0.01)
    return max((1 - share) / (1 - warmup), 0.0)


def describe(scores: dict[str, float]) -> str:
    """One line of scores."""
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def run(args: argparse.Namespace) -> Progress:
    """Trains one stage and writes its checkpoint; returns the progress it wrote."""
    if args.resume:
        model, progress = checkpoint.load_model(args.out)
        if progress.stage != args.stage:
            raise ValueError(f"{args.out} is a checkpoint of stage {progress.stage}, not {args.stage}")
    else:
        torch.manual_seed(args.seed)
        progress = Progress(args.stage)
        if args.init:
            model, _ = checkpoint.load_model(args.init)
        else:
            model = OrthrusLM(NanoConfig().tiny() if args.smoke else NanoConfig())
    num_rows = args.rows or (64 if args.stage == "ar" else 32)
    place = Place(progress.chunk, progress.row)
    stream = RowStream(args.tokenizer, args.seed, num_rows, args.length, args.workers, place)
    try:
        return _train(args, model, progress, stream, num_rows)
    finally:
        stream.close()


def _train(
    args: argparse.Namespace, model: OrthrusLM, progress: Progress, stream: RowStream, num_rows: int
) -> Progress:
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    probe_rows = held_out_rows(args.tokenizer, num_rows, args.length)
    if args.stage == "diff" and not args.resume:
        # The teacher is the model as it will be exported.
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p.bfloat16())
        model.copy_views()
    model.to(device)
    probe_inputs = to_device(probe_rows, device)
    stage = Stage(args.stage, model, args, probe_inputs)
    weights = stage.trainable()
    peak = args.lr or (6e-3 if args.stage == "ar" else 3e-3)
    optimizers = make_optimizers(weights, peak, args.optimizer == "muon", device)
    if args.resume:
        checkpoint.load_optimizers(args.out, optimizers)
    names = ("stage", "minutes", "steps", "rows", "length", "anchors", "optimizer", "seed", "prompt_weight", "decay")
    progress.settings = {name: getattr(args, name) for name in names} | {"rows": num_rows, "lr": peak}
    count = sum(p.numel() for p in weights.values())
    print(f"stage {args.stage}: {count:,} trainable weights, {num_rows} x {args.length} tokens per step", flush=True)

    # Compiles everything before the clock starts.
    stage.loss(probe_inputs, 0).backward()
    model.zero_grad()
    before = stage.probe(probe_rows, probe_inputs)
    if args.verify:
        print(f"gradients differ from those with dense masks by {verified(stage, probe_inputs):.4f}", flush=True)
    setup = time.monotonic() - PROCESS_START
    print(f"ready after {setup:.0f} s; held out before training: {describe(before)}", flush=True)

    pace = Pace(device)
    start = time.monotonic() - progress.seconds
    last_probe = time.monotonic()
    budget = math.inf if args.minutes is None else args.minutes * 60
    if args.deadline is not None:
        budget = min(budget, args.deadline - SAVE_SECONDS - (start - PROCESS_START))
    if budget <= 0:
        raise ValueError(f"--deadline {args.deadline} leaves no time to train: raise it")
    total = args.steps or int(budget)
    done = progress.step if args.steps else int(progress.seconds)
    interval = 1 if sys.stderr.isatty() else 20
    bar = tqdm(total=total, initial=done, unit="step" if args.steps else "s", mininterval=interval)
    losses: list[float] = []
    while True:
        progress.seconds = time.monotonic() - start
        share = progress.step / args.steps if args.steps else progress.seconds / budget
        if share >= 1 or progress.seconds >= budget or progress.step == args.stop_after:
            break
        factor = schedule(share, args.warmup)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        batch = stream.next()
        loss = stage.loss(to_device(batch.rows, device), args.seed * 1_000_003 + progress.step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += num_rows * args.length
        progress.chunk, progress.row = batch.after
        value = pace.push(loss)
        if value is not None:
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {progress.step}: lower --lr")
            losses.append(value)
        bar.update((progress.step if args.steps else int(progress.seconds)) - bar.n)
        if progress.step % 50 == 0 and losses:
            rate = progress.tokens / max(progress.seconds, 1e-3)
            bar.set_postfix_str(
                f"loss {sum(losses[-50:]) / len(losses[-50:]):.4f} step {progress.step} {rate / 1e6:.2f}M tok/s "
                f"wait {stream.waited:.0f}s",
                refresh=False,
            )
        if time.monotonic() - last_probe > args.probe_seconds:
            last_probe = time.monotonic()
            _note(progress, stage.probe(probe_rows, probe_inputs), losses, stream)
    bar.close()
    scores = stage.probe(probe_rows, probe_inputs)
    _note(progress, scores, losses, stream)
    checkpoint.save(args.out, model, progress, optimizers, args.save == "full")
    print(f"saved {args.out} after {time.monotonic() - PROCESS_START:.0f} s", flush=True)
    return progress


def verified(stage: Stage, inputs: Inputs) -> float:
    """Compares with dense masks; stage diff on disturbed weights, since its gradient starts near zero."""
    kept = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    with torch.no_grad():
        for name, p in stage.model.named_parameters():
            if "_proj_diff" in name:
                p.add_(0.3 * p.std() * torch.randn_like(p))
    error = verify(stage, inputs)
    with torch.no_grad():
        for name, p in stage.model.named_parameters():
            p.copy_(kept[name])
    return error


def _note(progress: Progress, scores: dict[str, float], losses: list[float], stream: RowStream) -> None:
    """Records and prints a probe."""
    recent = losses[-200:]
    loss = sum(recent) / len(recent) if recent else float("nan")
    mean = sum(scores.values()) / len(scores)
    entry = {"step": progress.step, "seconds": round(progress.seconds, 1), "tokens": progress.tokens, "loss": loss}
    progress.history.append(entry | {"held_out": scores})
    tqdm.write(
        f"[{progress.seconds:5.0f} s] step {progress.step} loss {loss:.4f} {progress.tokens / 1e6:.0f}M tokens, "
        f"waited {stream.waited:.0f} s; mean {mean:.3f}: {describe(scores)}",
        file=sys.stdout,
    )
    sys.stdout.flush()


def main() -> None:
    """Command line."""
    args = parse()
    if args.stage == "check":
        from examples.train_nano.check import check

        check(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
