"""Where a round's time goes on a CPU, and how long a server takes to start: nano, one request after another.

    python -m benchmarks.speed.profile_round

py-spy (SGLang brings it) samples the scheduler process; it may need root. Times of steps and rounds are the sweep's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.greedy import collect, load_prompts
from benchmarks.common.provenance import provenance
from benchmarks.common.setups import ONE_WIDTH
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server

RESULT = Path(__file__).with_name("results") / "profile-cpu.json"
SECONDS = 20
# The innermost frame that matches names a sample's part of the round.
PARTS = {
    "forward passes": ("forward (sglang_orthrus/models/orthrus.py",),
    "forward set-up": (
        "init_new (sglang/srt/model_executor/forward_batch_info.py",
        "init_forward_metadata (sglang_orthrus/cpu/attention.py",
    ),
    "rest of the worker": ("(sglang_orthrus/round/worker.py", "(sglang_orthrus/passes/runner.py"),
    "idle": ("sleep_on_idle", "maybe_sleep", "poll (zmq"),
}


def sample(server: Server) -> list[str]:
    """py-spy's raw lines for the scheduler while it serves."""
    prompts = load_prompts(NANO, 36)
    collect(server, prompts, 1)
    with tempfile.NamedTemporaryFile(suffix=".txt") as out:
        command = [
            *(str(Path(sys.executable).with_name("py-spy")), "record", "--format", "raw", "--rate", "200"),
            *("--duration", str(SECONDS), "--pid", str(scheduler_pid(server)), "--output", out.name),
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                collect(server, prompts, 1)
        if process.returncode:
            raise SystemExit(f"py-spy ended with status {process.returncode}; does it need root?")
        return Path(out.name).read_text().splitlines()


def scheduler_pid(server: Server) -> int:
    """The process that runs the model: the server's child that is named so."""
    main = next(p for p in psutil.process_iter(["cmdline"]) if str(server.port) in (p.info["cmdline"] or []))
    return next(child.pid for child in main.children(recursive=True) if "scheduler" in " ".join(child.cmdline()))


def shares(stacks: Sequence[str]) -> dict[str, float]:
    """Part of a round -> share of the busy samples. stacks: "frame;frame;... count", outermost frame first."""
    counts: Counter[str] = Counter()
    for line in stacks:
        frames, _, count = line.rpartition(" ")
        if "event_loop" in frames:
            counts[part_of(frames.split(";"))] += int(count)
    counts.pop("idle", None)
    return {name: round(count / counts.total(), 4) for name, count in counts.most_common()}


def part_of(frames: Sequence[str]) -> str:
    """Which of PARTS a stack belongs to."""
    for frame in reversed(frames):
        for part, markers in PARTS.items():
            if any(marker in frame for marker in markers):
                return part
    return "scheduler and its output"


def run() -> dict[str, Any]:
    """Start, serve, sample."""
    server = Server(NANO, *ORTHRUS_ARGS, "--dtype", "float32", env=ONE_WIDTH)
    started = time.perf_counter()
    try:
        server.start()
        start_up = time.perf_counter() - started
        return {
            "start_up_s": round(start_up, 1),
            "shares": shares(sample(server)),
            "provenance": provenance(),
        }
    finally:
        server.stop()


def main() -> int:
    """Run, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    result = run()
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
