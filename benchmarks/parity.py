"""Greedy parity: ORTHRUS against plain SGLang on the AR-only export, and against the plain-PyTorch round loop.

    python -m benchmarks.parity [--prompts 200]

For held-out prompts of every family, at batch sizes 1 and 8, with the overlap scheduler on and off, in fp32:

- token ids equal those of plain SGLang, except at near ties (`parity_rules.NEAR_TIE`), at most 1 prompt in 200;
- the number of rounds equals the reference loop's, except where a draft of it was nearly undecided;
- a teacher-forced prefill of plain SGLang ranks every token of every answer first.

Tokens per cycle = (tokens - 1) / rounds, as the first token comes from the prefill; the bonus token is included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from benchmarks.parity_rules import (
    NEAR_TIE,
    Answer,
    Divergence,
    Rounds,
    Tally,
    compare_rounds,
    find_divergence,
)
from sglang_orthrus.checkpoint import export_ar
from sglang_orthrus.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.server import Server, plain_env
from tests.reference import Reference, Trace, top2_gap

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from train_nano.chat_format import sample_prompt  # noqa: E402
from train_nano.corpus import FAMILIES, held_out  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "parity-cpu.json"
FP32 = ("--dtype", "float32")
NO_OVERLAP = ("--disable-overlap-schedule",)
BATCH_SIZES = (1, 8)
MAX_NEW_TOKENS = 448
VERSIONS_OF = ("sglang", "torch", "transformers", "sglang-orthrus")


@dataclass(frozen=True)
class Prompt:
    """A held-out prompt; `name` is its family and index."""

    name: str
    family: str
    ids: tuple[int, ...]


def load_prompts(model: Path, count: int) -> list[Prompt]:
    """`count` prompts or a few more, spread evenly over all families."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompts = []
    for family in FAMILIES:
        for index, sample in enumerate(held_out(family, math.ceil(count / len(FAMILIES)))):
            ids = tokenizer.encode(sample_prompt(sample), add_special_tokens=False).ids
            prompts.append(Prompt(f"{family}/{index}", family, tuple(ids)))
    return prompts


def stop_ids(model: Path) -> set[int]:
    """Ids that end a text, from the configuration and the generation configuration."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            value = json.loads((model / name).read_text())["eos_token_id"]
            found |= set(value if isinstance(value, list) else [value])
    return found


def collect(server: Server, prompts: Sequence[Prompt], batch_size: int) -> list[Answer]:
    """Greedy answers, with `batch_size` requests in flight: they join and leave as they please."""
    server.get("/flush_cache")
    with ThreadPoolExecutor(batch_size) as pool:
        return list(progress(pool.map(partial(ask, server), prompts), len(prompts), f"batch {batch_size}"))


def ask(server: Server, prompt: Prompt) -> Answer:
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS}
    reply = server.post("/generate", {"input_ids": list(prompt.ids), "sampling_params": sampling})
    return Answer(tuple(reply["output_ids"]), reply["meta_info"].get("spec_verify_ct", 0))


def trace_all(reference: Reference, prompts: Sequence[Prompt], stops: set[int]) -> list[Trace]:
    """The reference loop on every prompt."""
    traces = (reference.generate(prompt.ids, MAX_NEW_TOKENS, stops) for prompt in prompts)
    return list(progress(traces, len(prompts), "reference"))


def judge(
    reference: Reference,
    prompts: Sequence[Prompt],
    traces: Sequence[Trace],
    plain: Sequence[Answer],
    answers: Sequence[Answer],
) -> Tally:
    """Compare one setting's answers with plain SGLang's, and their rounds with the reference's."""
    tally = Tally()
    for prompt, trace, expected, answer in zip(prompts, traces, plain, answers, strict=True):

        def gap_after(common: Sequence[int], prompt: Prompt = prompt) -> float:
            return float(top2_gap(reference.ar_logits([*prompt.ids, *common])[-1]))

        divergence = find_divergence(expected.tokens, answer.tokens, gap_after)
        rounds = compare_rounds(trace.tokens, trace.rounds, trace.draft_gaps, answer)
        if divergence is None and rounds is Rounds.INCOMPARABLE:
            # Both servers agree with each other and not with the reference: that must be a near tie, too.
            divergence = find_divergence(trace.tokens, answer.tokens, gap_after)
        tally.add(prompt.name, divergence, rounds)
    return tally


def teacher_forced(server: Server, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Tally:
    """Prefill prompt and answer on plain SGLang: every token of the answer must rank first."""
    tally = Tally()
    for prompt, answer in progress(zip(prompts, answers, strict=True), len(prompts), "prefill check"):
        reply = server.post(
            "/generate",
            {
                "input_ids": [*prompt.ids, *answer.tokens],
                "sampling_params": {"temperature": 0, "max_new_tokens": 1},
                "return_logprob": True,
                "logprob_start_len": len(prompt.ids) - 1,
                "top_logprobs_num": 2,
            },
        )
        ranked = reply["meta_info"]["input_top_logprobs"][-len(answer.tokens) :]
        tally.add(prompt.name, first_not_ranked_first(answer.tokens, ranked))
    return tally


def first_not_ranked_first(tokens: Sequence[int], ranked: Sequence[Any]) -> Divergence | None:
    """ranked[i]: the two best (logprob, id, text) for the place of tokens[i]."""
    for index, (token, (best, second)) in enumerate(zip(tokens, ranked, strict=True)):
        if token != best[1]:
            return Divergence(index, best[1], token, best[0] - second[0] if token == second[1] else math.inf)
    return None


def tokens_per_cycle(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> dict[str, float]:
    """Per family and over all, weighted by rounds."""
    result = {}
    for family in ("all", *dict.fromkeys(prompt.family for prompt in prompts)):
        chosen = [a for p, a in zip(prompts, answers, strict=True) if family in ("all", p.family)]
        rounds = sum(answer.rounds for answer in chosen)
        result[family] = round(sum(len(answer.tokens) - 1 for answer in chosen) / max(rounds, 1), 3)
    return result


def progress(items: Iterable[Any], total: int, label: str) -> Iterable[Any]:
    return tqdm(items, total=total, desc=label, disable=None)


def provenance() -> dict[str, Any]:
    """What produced a result: code, versions, machine, command, date."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "commit": git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else ""),
        "versions": {name: version(name) for name in VERSIONS_OF} | {"python": platform.python_version()},
        "argv": sys.argv[1:],
        "cpu": cpu.partition(":")[2].strip(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def report(tally: Tally) -> dict[str, Any]:
    """A tally as JSON."""
    return {
        "passed": tally.passed,
        "prompts": tally.prompts,
        "identical": tally.prompts - len(tally.divergences),
        "divergences": {
            name: asdict(divergence) | {"near_tie": divergence.near_tie}
            for name, divergence in tally.divergences.items()
        },
        "rounds": dict(tally.rounds),
    }


def run(model: Path, count: int) -> dict[str, Any]:
    """Every setting; the result says what was found, and whether it passed."""
    prompts = load_prompts(model, count)
    reference = Reference(model)
    traces = trace_all(reference, prompts, stop_ids(model))
    answers: dict[str, list[Answer]] = {}
    for label, extra in (("overlap", ()), ("no-overlap", NO_OVERLAP)):
        with Server(model, *ORTHRUS_ARGS, *FP32, *extra) as server:
            for batch_size in BATCH_SIZES:
                answers[f"{label}, batch {batch_size}"] = collect(server, prompts, batch_size)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_ar(model, Path(folder) / "ar")
        with Server(exported, *FP32, env=plain_env()) as server:
            plain = {batch_size: collect(server, prompts, batch_size) for batch_size in BATCH_SIZES}
            prefill = teacher_forced(server, prompts, answers["overlap, batch 1"])
    tallies = {
        label: judge(reference, prompts, traces, plain[int(label.split()[-1])], given)
        for label, given in answers.items()
    } | {"teacher-forced prefill": prefill}
    return {
        "passed": all(tally.passed for tally in tallies.values()),
        "near_tie_below": NEAR_TIE,
        "prompts": len(prompts),
        "tokens": sum(len(answer.tokens) for answer in answers["overlap, batch 1"]),
        "tokens_per_cycle": tokens_per_cycle(prompts, answers["overlap, batch 1"]),
        "settings": {label: report(tally) for label, tally in tallies.items()},
        "provenance": provenance(),
    }


def main() -> int:
    """Run, print, write the JSON; exit status 1 if parity does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = run(arguments.model, arguments.prompts)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
