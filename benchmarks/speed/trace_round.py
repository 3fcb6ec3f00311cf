"""Where the time of a pass goes on a GPU: kernels by kind, idle time, launches and waits, from SGLang's own profiler.

    python -m benchmarks.speed.trace_round --model /tmp/wide-8b [--concurrency 1 8 32] [--plain] [--constrained]

A pass is a decode step of plain SGLang (`--plain`: the AR-only export) or a draft-and-verify round. Ten of them are
traced while all requests decode, constrained if that is wanted by a grammar that allows all but the text's end, so that
passes go the way of constrained ones for as long as it takes. Tracing slows the host down, so idle time is an upper
bound; kernels run as always.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import requests

from benchmarks.common.provenance import RESULTS, provenance
from benchmarks.speed.prompts import PromptPool
from benchmarks.speed.sweep import GPU, ORTHRUS, PLAIN
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar

PASSES = 10
NEW_TOKENS = 16384
LONGEST, NAME_LENGTH = 40, 120
SHORT_GAP = 10  # microseconds; what lies between two kernels that are queued, with room to spare
ENDLESS = r"root ::= [^\0] root"  # EBNF
# The first kind whose words a kernel's name contains.
KINDS = {
    "attention": ("BatchPrefill", "BatchDecode", "flash", "MergeStates", "VariableLength", "_fwd_", "decode_attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "gemv", "splitK"),
    "argmax": ("ArgMax", "argmax"),
    "copies": ("Memcpy", "Memset", "copy", "Cat"),
}
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
LAUNCHES = ("cudaGraphLaunch", "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")


def kind_of(kernel: str) -> str:
    """Which of KINDS a kernel belongs to."""
    return next((kind for kind, words in KINDS.items() if any(word in kernel for word in words)), "other")


def gaps(intervals: Iterable[tuple[float, float]]) -> list[float]:
    """Lengths of the holes in the union of (start, end) intervals."""
    ordered = sorted(intervals)
    reached = accumulate((end for _, end in ordered), max)
    return [start - before for (start, _), before in zip(ordered[1:], reached, strict=False) if start > before]


def summarise(events: Sequence[dict[str, Any]], passes: int) -> dict[str, Any]:
    """Milliseconds and calls per pass. events: of a Chrome trace that holds `passes` passes."""
    timed = [event for event in events if event.get("ph") == "X"]
    on_gpu = [event for event in timed if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    kinds: Counter[str] = Counter()
    names: Counter[str] = Counter()
    times = Counter(event["name"] for event in on_gpu)
    for event in on_gpu:
        names[event["name"]] += event["dur"]
    for name, total in names.items():
        kinds[kind_of(name)] += total
    intervals = [(event["ts"], event["ts"] + event["dur"]) for event in on_gpu]
    span = max(end for _, end in intervals) - min(start for start, _ in intervals)
    idle = gaps(intervals)
    calls = Counter(event["name"] for event in timed if event.get("cat") in ("cuda_runtime", "cuda_driver"))

    def per_pass(microseconds: float) -> float:
        return round(microseconds / 1000 / passes, 4)

    return {
        "passes": passes,
        "span_ms": per_pass(span),
        "busy_ms": per_pass(span - sum(idle)),
        "idle_ms": per_pass(sum(idle)),
        "idle_in_short_gaps_ms": per_pass(sum(gap for gap in idle if gap <= SHORT_GAP)),
        "kinds_ms": {kind: per_pass(time) for kind, time in kinds.most_common()},
        "kernels": round(len(on_gpu) / passes, 1),
        "longest": [
            {"kernel": name[:NAME_LENGTH], "calls": round(times[name] / passes, 1), "ms": per_pass(total)}
            for name, total in names.most_common(LONGEST)
        ],
        "launches": {name: round(calls[name] / passes, 1) for name in LAUNCHES if calls[name]},
        "waits": {name: round(calls[name] / passes, 1) for name in WAITS if calls[name]},
    }


def trace(server: Server, prompts: Sequence[Any], folder: Path, grammar: dict[str, str]) -> list[dict[str, Any]]:
    """The events of PASSES passes in which all prompts are being answered. grammar: sampling parameters."""
    folder.mkdir()

    def ask(prompt: Any) -> None:
        sampling = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True, **grammar}
        server.post("/generate", {"input_ids": list(prompt.ids), "sampling_params": sampling, "rid": prompt.name})

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(ask, prompt) for prompt in prompts]
        time.sleep(1.0)  # all prompts are prefilled by then, and the answers are far from their ends
        wanted = {"output_dir": str(folder), "num_steps": PASSES, "activities": ["CPU", "GPU"], "with_stack": False}
        requests.post(f"{server.url}/start_profile", json=wanted, timeout=120).raise_for_status()
        deadline = time.monotonic() + 120
        while not (found := list(folder.rglob("*.trace.json.gz"))) and time.monotonic() < deadline:
            time.sleep(0.2)
        requests.post(f"{server.url}/abort_request", json={"abort_all": True}, timeout=60).raise_for_status()
        for answer in answers:
            answer.result()
    _wait_until_written(found[0])
    with gzip.open(found[0]) as stream:
        events: list[dict[str, Any]] = json.load(stream)["traceEvents"]
    return events


def _wait_until_written(file: Path) -> None:
    """A profile takes seconds to be written."""
    size = -1
    while size != (size := file.stat().st_size):
        time.sleep(2.0)


def run(model: Path, concurrencies: Sequence[int], is_plain: bool, is_constrained: bool) -> dict[str, Any]:
    """Trace one server at every concurrency."""
    grammar = {"ebnf": ENDLESS} if is_constrained else {}
    contender = PLAIN if is_plain else ORTHRUS
    pool = PromptPool(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served = export_ar(model, folder / "ar") if is_plain else model
        env = {**(plain_env() if is_plain else {}), **GPU.setup.env}
        with Server(served, *GPU.setup.args, *GPU.args, *contender.args, env=env, timeout=900) as server:
            traced = {
                str(number): summarise(trace(server, pool.take(number), folder / f"trace-{number}", grammar), PASSES)
                for number in concurrencies
            }
    label = f"{contender.label}{'-constrained' if is_constrained else ''}"
    return {"server": label, "concurrency": traced, "provenance": provenance()}


def main() -> int:
    """Run, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--constrained", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = run(arguments.model, arguments.concurrency, arguments.plain, arguments.constrained)
    out = arguments.out or RESULTS / f"trace-{result['server']}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["concurrency"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
