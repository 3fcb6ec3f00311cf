"""Plain SGLang, ORTHRUS and NGRAM speculation on one checkpoint, side by side, with SGLang's own load generator.

    python -m benchmarks.speed.sweep cpu
    python -m benchmarks.speed.sweep gpu --model /tmp/wide-8b [--out FILE] [--resume]     # FlashInfer; gpu-fa3: FA3

One server is resident at a time; plain SGLang is measured first and again last. All get the same prompts, attention
backend, memory and graph sizes. Before a speculating server is timed, its answers to a few prompts are compared with
plain SGLang's, and ORTHRUS must give them, but for near ties. At every setting these runs are measured:

- *serve*: a closed loop of prompts answered to their end: throughput, time to first token, tokens per cycle;
- *decode*: answers of fixed length: times of steps and rounds while all requests decode;
- at concurrency 1 also requests with pauses in between: time to first token of a server that is idle.

Every finished setting is written at once. `--resume` continues the file where it ends, if model, arguments, source
and GPU are the same; otherwise it refuses. `--servers` and `--settings` measure a part. docs/benchmarks_method.md
explains the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from platform import node
from typing import Any

from benchmarks.common.equality import Answer, Tally, find_divergence
from benchmarks.common.greedy import MAX_NEW_TOKENS, Prompt, collect
from benchmarks.common.provenance import RESULTS, ROOT, provenance
from benchmarks.common.setups import SETUPS, Setup
from benchmarks.speed.measures import decode_measures, median_ttft_ms, serve_measures
from benchmarks.speed.prompts import FAMILIES, PromptPool
from benchmarks.speed.published import released_shape
from benchmarks.speed.report import report, table
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar

FORMAT = 1
# SGLang then keeps the time of every `--decode-log-interval` passes.
_RECORD_ENV = {"SGLANG_RECORD_STEP_TIME": "1"}
_RECORD_ARGS = ("--decode-log-interval", "8")
# Requests to a server that has nothing else to do, the former one's last pass included.
SINGLE_REQUESTS, SINGLE_TOKENS, SINGLE_PAUSE = 8, 4, 0.1


class SweepError(RuntimeError):
    """The sweep cannot go on; the message says why."""


@dataclass(frozen=True)
class Contender:
    """A server of the sweep.

    Attributes:
        args: its arguments beside those that all have.
        plugin: whether it serves the dual-view checkpoint with the plugin; otherwise the AR-only export without.
        must_agree: whether the sweep ends if its answers are not plain SGLang's.
        skipped: why it does not run at all.
    """

    label: str
    args: tuple[str, ...] = ()
    plugin: bool = False
    must_agree: bool = True
    skipped: str = ""


@dataclass(frozen=True)
class Setting:
    """A point of the sweep.

    Attributes:
        context: tokens of every prompt; None for the prompts as they are.
        requests: of the serve run.
        decodes: requests of the decode run, of `decode_tokens` tokens each.
    """

    name: str
    concurrency: int
    context: int | None
    requests: int
    decodes: int
    decode_tokens: int


@dataclass(frozen=True)
class Mode:
    """What a sweep consists of.

    Attributes:
        setup: near-tie rule, precision and attention backend.
        args: what all servers get beside it.
        check_prompts: answered by every server before it is timed.
    """

    name: str
    setup: Setup
    args: tuple[str, ...]
    contenders: tuple[Contender, ...]
    settings: tuple[Setting, ...]
    check_prompts: int


def by_concurrency(sizes: Sequence[int], at_least: int, waves: int, decode_tokens: int) -> tuple[Setting, ...]:
    """Prompts as they are. Each run has enough requests for `waves` rounds of them, and no fewer than `at_least`."""
    return tuple(
        Setting(f"c{size}", size, None, max(at_least, waves * size), max(4, size), decode_tokens) for size in sizes
    )


def by_context(lengths: Sequence[int], requests: int, decode_tokens: int) -> tuple[Setting, ...]:
    """One request at a time behind a history."""
    return tuple(Setting(f"ctx{length}", 1, length, requests, 2, decode_tokens) for length in lengths)


PLAIN, PLAIN_AGAIN = Contender("plain"), Contender("plain_again")
ORTHRUS = Contender("orthrus", ORTHRUS_ARGS, plugin=True)
NGRAM = Contender("ngram", ("--speculative-algorithm", "NGRAM"), must_agree=False)
NGRAM_ON_CPU = replace(
    NGRAM, skipped="SGLang 0.5.23's NGRAM worker needs sgl_kernel's CUDA library (libcuda.so.1) even with --device cpu"
)

CPU = Mode(
    "cpu",
    SETUPS["cpu"],
    ("--max-total-tokens", "32768", "--max-running-requests", "8"),
    (PLAIN, ORTHRUS, NGRAM_ON_CPU, PLAIN_AGAIN),
    by_concurrency((1, 4, 8), 20, 3, 192) + by_context((512, 2048), 5, 192),
    check_prompts=10,
)
GPU = Mode(
    "gpu",
    replace(SETUPS["flashinfer-bf16"], args=("--dtype", "bfloat16", "--attention-backend", "flashinfer")),
    (
        *("--mem-fraction-static", "0.8", "--max-running-requests", "128"),
        # SGLang's own list is longer for speculation than without it.
        *("--cuda-graph-bs-decode", "1", "2", "4", "8", "12", "16", "24", "32", "48", "64", "96", "128"),
        # Capturing prefills takes minutes. All servers prefill alike without it.
        *("--cuda-graph-backend-prefill", "disabled"),
    ),
    (PLAIN, ORTHRUS, NGRAM, PLAIN_AGAIN),
    by_concurrency((1, 2, 4, 8, 16, 32, 64, 128), 30, 2, 256)
    + by_context((512, 1024, 2048, 4096, 8192, 16384, 32768, 40000), 3, 256),
    check_prompts=20,
)
# SGLang's own choice on Hopper.
GPU_FA3 = replace(
    GPU,
    name="gpu-fa3",
    setup=replace(SETUPS["fa3-bf16"], args=("--dtype", "bfloat16", "--attention-backend", "fa3")),
)
MODES = {mode.name: mode for mode in (CPU, GPU, GPU_FA3)}


@dataclass(frozen=True)
class Selection:
    """Which part of a mode to measure now; empty for all of it."""

    servers: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()

    def todo(self, mode: Mode, contender: Contender, result: Mapping[str, Any]) -> list[Setting]:
        """Settings that this server has not finished."""
        if contender.skipped or (self.servers and contender.label not in self.servers):
            return []
        done = result["servers"].get(contender.label, {}).get("points", {})
        wanted = self.settings or {setting.name for setting in mode.settings}
        return [setting for setting in mode.settings if setting.name in wanted and setting.name not in done]


def run(mode: Mode, model: Path, out: Path, resume: bool = False, selection: Selection | None = None) -> dict[str, Any]:
    """Measure what is missing in `out`, and return its content.

    Raises:
        SweepError: if `out` belongs to another sweep, or answers differ from plain SGLang's.
    """
    selection = selection or Selection()
    result = start_result(mode, model, out, resume)
    pool = PromptPool(model)
    with tempfile.TemporaryDirectory() as folder:
        exported: Path | None = None
        for contender in mode.contenders:
            settings = selection.todo(mode, contender, result)
            if contender.skipped:
                result["servers"][contender.label] = {"skipped": contender.skipped}
            if not settings:
                continue
            if not contender.plugin:
                exported = exported or export_ar(model, Path(folder) / "ar")
            served = model if contender.plugin or exported is None else exported
            measure_server(mode, contender, served, settings, pool, result, out)
    write(result, out)
    return result


def start_result(mode: Mode, model: Path, out: Path, resume: bool) -> dict[str, Any]:
    """An empty result, or the one to go on with."""
    current = provenance()
    arguments = describe(mode, model)
    key = {"arguments": arguments, "source": source_digest(), **resume_key(current)}
    if not (resume and out.exists()):
        return {"format": FORMAT, "key": key, "arguments": arguments, "provenance": current, "servers": {}}
    result: dict[str, Any] = json.loads(out.read_text())
    differing = differences(result["key"], key)
    if differing:
        raise SweepError(f"{out} is of another sweep and cannot be resumed; these differ: {', '.join(differing)}")
    result.setdefault("resumed", []).append(current["date"])
    return result


def describe(mode: Mode, model: Path) -> dict[str, Any]:
    """Everything that decides what is measured, as JSON. The model counts by content, not by place."""
    config = (model / "config.json").read_bytes()
    index = next((path.read_bytes() for path in model.glob("*.index.json")), b"")
    described = {
        "mode": mode.name,
        "model": {
            "sha256": hashlib.sha256(config + index).hexdigest(),
            "released_shape": released_shape(json.loads(config)),
        },
        "setup": {"args": mode.setup.args, "env": dict(mode.setup.env), "near_tie_below": mode.setup.tie_below},
        "args": (*mode.args, *_RECORD_ARGS),
        "families": FAMILIES,
        "answers_up_to": MAX_NEW_TOKENS,
        "contenders": [asdict(contender) for contender in mode.contenders],
        "settings": [asdict(setting) for setting in mode.settings],
        "check_prompts": mode.check_prompts,
    }
    plain_json: dict[str, Any] = json.loads(json.dumps(described))
    return plain_json


def resume_key(current: Mapping[str, Any]) -> dict[str, Any]:
    """What of the provenance must not change. Result files alone make a tree dirty, so that mark does not count."""
    return {"commit": current["commit"].removesuffix("-dirty"), "gpu": current["gpu"], "versions": current["versions"]}


def source_digest() -> str:
    """Of the code that is measured and that measures."""
    files = sorted(path for folder in ("sglang_orthrus", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the entries that differ."""
    found = []
    for name in sorted({*old, *new}):
        ours, theirs = old.get(name), new.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            found += differences(ours, theirs, f"{prefix}{name}.")
        elif ours != theirs:
            found.append(f"{prefix}{name}")
    return found


def measure_server(
    mode: Mode,
    contender: Contender,
    model: Path,
    settings: Sequence[Setting],
    pool: PromptPool,
    result: dict[str, Any],
    out: Path,
) -> None:
    """Start the server, check its answers, measure each setting and write it."""
    args = (*mode.setup.args, *mode.args, *contender.args)
    env = {**({} if contender.plugin else plain_env()), **mode.setup.env, **_RECORD_ENV}
    say(f"{contender.label}: starting; load average {os.getloadavg()[0]:.1f}")
    started = time.monotonic()
    with Server(model, *args, *_RECORD_ARGS, env=env, timeout=900) as server:
        record = result["servers"].setdefault(contender.label, {"points": {}, "starts": []})
        record["args"] = list(args)
        record["starts"].append(
            {"date": now(), "seconds": round(time.monotonic() - started, 1), "machine": nvidia_smi("uuid") or node()}
        )
        record["memory"] = server_state(server)["memory_usage"]
        check(mode, contender, server, pool.take(mode.check_prompts), result)
        for setting in settings:
            record["points"][setting.name] = point = measure(server, model, setting, pool)
            write(result, out)
            say(f"{contender.label} {setting.name}: {summary(point)}")


def check(mode: Mode, contender: Contender, server: Server, prompts: Sequence[Prompt], result: dict[str, Any]) -> None:
    """Compare answers with plain SGLang's first run, which it keeps for that.

    Raises:
        SweepError: if they differ by more than near ties and must not.
    """
    answers = collect(server, prompts, 1)
    if contender == PLAIN:
        result["expected"] = [keep(answer) for answer in answers]
    if "expected" not in result:
        raise SweepError(f"{contender.label}: there are no answers of plain SGLang to compare with; run it first")
    tally = compare(prompts, result["expected"], answers, mode.setup)
    result["servers"][contender.label]["check"] = {
        "passed": tally.passed,
        "prompts": tally.prompts,
        "divergences": {name: asdict(divergence) for name, divergence in tally.divergences.items()},
    }
    if contender.must_agree and not tally.passed:
        raise SweepError(
            f"{contender.label} does not give plain SGLang's answers, so it is not timed: {tally.divergences}"
        )


def keep(answer: Answer) -> dict[str, Any]:
    """An answer and its top-2 gaps as JSON."""
    gaps = [round(best - second, 6) for (best, _), (second, _), *_ in answer.ranked]
    return {"tokens": list(answer.tokens), "gaps": gaps}


def compare(
    prompts: Sequence[Prompt], expected: Sequence[Mapping[str, Any]], answers: Sequence[Answer], setup: Setup
) -> Tally:
    """By the rules of `benchmarks.parity`."""
    tally = Tally(setup.prompts_per_excuse)
    for prompt, kept, answer in zip(prompts, expected, answers, strict=True):
        gap_after = partial(kept_gap, kept["gaps"])
        tally.add(prompt.name, find_divergence(kept["tokens"], answer.tokens, gap_after, setup.tie_below))
    return tally


def kept_gap(gaps: Sequence[float], common: Sequence[int]) -> float:
    """The top-2 gap of the token after the common beginning."""
    return gaps[len(common)]


def measure(server: Server, model: Path, setting: Setting, pool: PromptPool) -> dict[str, Any]:
    """The runs of a setting."""
    # Imports SGLang, which takes seconds.
    from benchmarks.speed.load import Load, run_load

    started = time.monotonic()
    prompts = pool.take(setting.requests, setting.context)
    metrics, requests = run_load(server.url, model, Load(prompts, setting.concurrency, MAX_NEW_TOKENS, to_the_end=True))
    idle_ttft_ms = None
    if setting.concurrency == 1:
        singles = pool.take(SINGLE_REQUESTS, setting.context)
        _, alone = run_load(server.url, model, Load(singles, 1, SINGLE_TOKENS, to_the_end=False, pause=SINGLE_PAUSE))
        idle_ttft_ms = median_ttft_ms(alone)
    before = len(step_seconds(server, setting.concurrency))
    _, decoded = run_load(
        server.url,
        model,
        Load(prompts[: setting.decodes], setting.concurrency, setting.decode_tokens, to_the_end=False),
    )
    recorded = step_seconds(server, setting.concurrency)[before:]
    return {
        "serve": serve_measures(metrics, requests) | {"idle_ttft_ms": idle_ttft_ms},
        "decode": decode_measures(decoded, setting.concurrency, recorded),
        "gpu_mib": gpu_mib(),
        "date": now(),
        "seconds": round(time.monotonic() - started, 1),
        "load_average": round(os.getloadavg()[0], 2),
    }


def step_seconds(server: Server, batch_size: int) -> list[float]:
    """The scheduler's own times per pass for batches of this size, since it started."""
    times: Mapping[str, list[float]] = server_state(server).get("step_time_dict") or {}
    return next((found for size, found in times.items() if int(size) == batch_size), [])


def server_state(server: Server) -> dict[str, Any]:
    """The scheduler's part of /server_info."""
    state: dict[str, Any] = server.get("/server_info").json()["internal_states"][0]
    return state


def nvidia_smi(field: str) -> str | None:
    """What nvidia-smi says of the first visible GPU; None without it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    command += [f"--id={visible}"] if visible else []
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def gpu_mib() -> int | None:
    """Memory in use on the first visible GPU."""
    used = nvidia_smi("memory.used")
    return int(used) if used and used.isdecimal() else None


def summary(point: Mapping[str, Any]) -> str:
    serve, decode = point["serve"], point["decode"]
    return (
        f"{serve['output_throughput']:.0f} tok/s, TTFT {serve['median_ttft_ms']:.0f} ms, "
        f"{decode['pass_ms']} ms a pass, {serve['tokens_per_cycle']} tokens a cycle, {point['seconds']} s"
    )


def write(result: dict[str, Any], out: Path) -> None:
    """The result with its report, in one go: a reader never finds half a file."""
    result["report"] = report(result)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--model", type=Path, default=NANO, help="a dual-view checkpoint; the bundled one by default")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/sweep-MODE.json")
    parser.add_argument("--resume", action="store_true", help="go on where --out ends")
    parser.add_argument("--servers", nargs="+", default=(), help="measure these only")
    parser.add_argument("--settings", nargs="+", default=(), help="measure these only: c1, c2, ..., ctx512, ...")
    arguments = parser.parse_args()
    mode = MODES[arguments.mode]
    selection = Selection(frozenset(arguments.servers), frozenset(arguments.settings))
    out = arguments.out or RESULTS / f"sweep-{mode.name}.json"
    known = {one.label for one in mode.contenders} | {one.name for one in mode.settings}
    unknown = (selection.servers | selection.settings) - known
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    try:
        result = run(mode, arguments.model, out, arguments.resume, selection)
    except SweepError as error:
        say(f"error: {error}")
        return 1
    print(table(result["report"]))
    say(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
