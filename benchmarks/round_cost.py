"""What a round costs on this machine's CPU: nano's round time against plain SGLang's step time, and where it goes.

    python -m benchmarks.round_cost

Plain SGLang is measured first and last, so that drift shows. Every request streams; a chunk is a step or a round, and
the time between two chunks is taken while all requests of the setting are running. Tokens per cycle include the bonus
token. The share of a round outside its forward passes is sampled with py-spy, if it is installed and permitted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import psutil
import requests

from benchmarks.parity import Prompt, load_prompts
from benchmarks.provenance import provenance
from sglang_orthrus.checkpoint import export_ar
from sglang_orthrus.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.server import Server, plain_env

RESULT = Path(__file__).with_name("results") / "round-cost-cpu.json"
BATCH_SIZES = (1, 8)
NEW_TOKENS = 192
REPEATS = 3
PROFILE_SECONDS = 10
# The innermost frame that matches names a sample's part of the round.
PARTS = {
    "OrthrusLM.forward": ("forward (sglang_orthrus/models/orthrus.py",),
    "forward set-up": (
        "init_new (sglang/srt/model_executor/forward_batch_info.py",
        "init_forward_metadata (sglang_orthrus/cpu/attention.py",
    ),
    "rest of the worker": ("(sglang_orthrus/worker.py", "(sglang_orthrus/model_runner.py"),
    "idle": ("sleep_on_idle", "maybe_sleep", "poll (zmq"),
}


def times_between_chunks(server: Server, prompts: Sequence[Prompt]) -> tuple[list[float], float]:
    """Seconds between two chunks while all requests run, and tokens per chunk over their answers' later chunks."""
    together = Barrier(len(prompts))
    with ThreadPoolExecutor(len(prompts)) as pool:
        arrivals = list(pool.map(lambda prompt: stream(server, prompt, together), prompts))
    start = max(times[0][0] for times in arrivals)
    end = min(times[-1][0] for times in arrivals)
    gaps = [
        later - earlier
        for times in arrivals
        for (earlier, _), (later, _) in pairwise(times)
        if start <= earlier and later <= end
    ]
    tokens = sum(times[-1][1] - times[0][1] for times in arrivals)
    return gaps, tokens / sum(len(times) - 1 for times in arrivals)


def stream(server: Server, prompt: Prompt, together: Barrier) -> list[tuple[float, int]]:
    """(time, tokens so far) of every chunk of a greedy answer of NEW_TOKENS tokens."""
    body = {
        "input_ids": list(prompt.ids),
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        "stream": True,
    }
    together.wait()
    arrivals = []
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=300) as response:
        for line in response.iter_lines(chunk_size=1):
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                arrivals.append((time.perf_counter(), chunk["meta_info"]["completion_tokens"]))
    return arrivals


def measure(server: Server, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Median milliseconds between chunks and tokens per chunk, by batch size."""
    result = {}
    for batch_size in BATCH_SIZES:
        times_between_chunks(server, prompts[:batch_size])
        runs = [times_between_chunks(server, prompts[:batch_size]) for _ in range(REPEATS)]
        gaps = [gap for found, _ in runs for gap in found]
        result[str(batch_size)] = {
            "median_ms": round(1000 * statistics.median(gaps), 2),
            "chunks": len(gaps),
            "tokens_per_chunk": round(statistics.mean(tokens for _, tokens in runs), 2),
        }
    return result


def profile(server: Server, prompts: Sequence[Prompt]) -> dict[str, float] | None:
    """Shares of the scheduler's time, without its idle time, while one request after another runs."""
    sampler = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if sampler is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".txt") as out:
        command = [sampler, "record", "--format", "raw", "--rate", "200", "--duration", str(PROFILE_SECONDS)]
        with subprocess.Popen(
            [*command, "--pid", str(scheduler_pid(server)), "--output", out.name], stdout=subprocess.DEVNULL
        ) as process:
            while process.poll() is None:
                for prompt in prompts:
                    stream(server, prompt, Barrier(1))
        stacks = Path(out.name).read_text().splitlines()
    return shares(stacks) if process.returncode == 0 else None


def scheduler_pid(server: Server) -> int:
    """The process that runs the model: the server's child that is named so."""
    main = next(p for p in psutil.process_iter(["cmdline"]) if str(server.port) in (p.info["cmdline"] or []))
    return next(child.pid for child in main.children(recursive=True) if "scheduler" in " ".join(child.cmdline()))


def shares(stacks: Sequence[str]) -> dict[str, float]:
    """Part of a round -> share of samples. stacks: py-spy's raw lines, "frame;frame;... count" from the outermost."""
    counts: Counter[str] = Counter()
    for line in stacks:
        frames, _, count = line.rpartition(" ")
        if "event_loop" in frames:
            counts[part_of(frames.split(";"))] += int(count)
    busy = sum(counts.values()) - counts.pop("idle", 0)
    return {name: round(count / busy, 4) for name, count in counts.most_common()}


def part_of(frames: Sequence[str]) -> str:
    """Which of PARTS a stack belongs to."""
    for frame in reversed(frames):
        for part, markers in PARTS.items():
            if any(marker in frame for marker in markers):
                return part
    return "scheduler and its output"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start_up(server: Server) -> float:
    """Start the server and return the seconds until it answered."""
    started = time.perf_counter()
    server.start()
    return round(time.perf_counter() - started, 1)


def run() -> dict[str, Any]:
    """Plain SGLang, ORTHRUS, plain SGLang."""
    prompts = [prompt for prompt in load_prompts(NANO, 36) if prompt.family in ("json", "tools")]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        exported = export_ar(NANO, Path(folder) / "ar")
        for label in ("plain", "orthrus", "plain_again"):
            args = ORTHRUS_ARGS if label == "orthrus" else ()
            server = Server(NANO if args else exported, *args, env={} if args else plain_env())
            try:
                result[label] = {"start_up_s": start_up(server), "batch": measure(server, prompts)}
                say(f"{label}: {result[label]}")
                if args:
                    result[label]["profile"] = profile(server, prompts)
            finally:
                server.stop()
    result["round_over_step"] = {
        size: round(
            result["orthrus"]["batch"][size]["median_ms"]
            / statistics.mean(result[label]["batch"][size]["median_ms"] for label in ("plain", "plain_again")),
            2,
        )
        for size in map(str, BATCH_SIZES)
    }
    return result | {"provenance": provenance()}


def main() -> int:
    """Run, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    result = run()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
