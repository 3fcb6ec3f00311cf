"""Samples are counted for the innermost part that they lie in."""

from __future__ import annotations

from benchmarks.speed.profile_round import shares

LOOP = "run_scheduler_process (scheduler.py:1);event_loop_overlap (scheduler.py:2)"
WORKER = f"{LOOP};_round (sglang_orthrus/round/worker.py:3)"


def test_shares_are_of_the_busy_samples() -> None:
    stacks = [
        f"{WORKER};forward (sglang_orthrus/models/orthrus.py:4);linear (torch/nn.py:5) 60",
        f"{WORKER};init_new (sglang/srt/model_executor/forward_batch_info.py:6) 20",
        f"{WORKER};argmax (torch.py:7) 10",
        f"{LOOP};process_batch_result (scheduler.py:8) 10",
        f"{LOOP};maybe_sleep_on_idle (scheduler.py:9) 500",
        "other_thread (x.py:1) 700",
    ]
    assert shares(stacks) == {
        "forward passes": 0.6,
        "forward set-up": 0.2,
        "rest of the worker": 0.1,
        "scheduler and its output": 0.1,
    }
