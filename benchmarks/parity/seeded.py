"""Seeded parity: ORTHRUS, in mixed batches, against plain SGLang serving every request alone; and what seeds cost.

    python -m benchmarks.parity.seeded [--prompts 200] [--max-new-tokens 64] [--slice I/N] [--out FILE]
    python -m benchmarks.parity.seeded --merge FILE... [--out FILE]

Under `--enable-deterministic-inference`, held-out prompts x 3 seeds x temperatures 0.6 and 1.0 x filters (none, top_p,
top_k, both), with greedy requests among them. ORTHRUS has eight requests of different kinds in flight; plain SGLang
one at a time, since its own seeded output depends on the neighbours. Answers equal token by token, but for a first
difference where rounding decides (`seeded_rules.margin` below 1e-4), at most one in 200 answers.

Then the same requests without seeds: tokens per cycle of rejection sampling beside those of the common noise.
Tokens per cycle = (tokens - 1) / rounds, as the first token comes from the prefill; the bonus token is included.

On two cores a prompt takes half a minute, so a run can be made in slices, on as many cores as there are, and merged.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.greedy import Prompt, load_prompts, progress
from benchmarks.common.provenance import RESULTS, provenance
from benchmarks.common.reference import Reference, top2_gap
from benchmarks.common.setups import SETUPS
from benchmarks.common.slices import Slice
from benchmarks.parity.seeded_merge import ROUNDS, conclude, merge
from benchmarks.parity.seeded_rules import margin
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.models.checkpoint import export_ar

SEEDED = ("--enable-deterministic-inference",)
SEEDS = (0, 7, 123456789)
TEMPERATURES = (0.6, 1.0)
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "both": {"top_k": 20, "top_p": 0.95},
}
IN_FLIGHT = 8
REJECTION = "rejection sampling"


@dataclass(frozen=True)
class Case:
    """One request."""

    prompt: Prompt
    label: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a server gave; rounds is 0 without speculation."""

    tokens: tuple[int, ...]
    rounds: int


def cases(prompts: Sequence[Prompt], seeds: Sequence[int] = SEEDS) -> list[Case]:
    """Every combination, in an order that mixes them, and a greedy request for every prompt."""
    found = [Case(prompt, "greedy", {"temperature": 0}) for prompt in prompts]
    for prompt in prompts:
        for temperature in TEMPERATURES:
            for name, filters in FILTERS.items():
                for seed in seeds:
                    options = {"temperature": temperature, "sampling_seed": seed, **filters}
                    found.append(Case(prompt, f"{name}, temperature {temperature}", options))
    random.Random(0).shuffle(found)
    return found


def ask(server: Server, max_new_tokens: int, case: Case) -> Answer:
    """One request's answer."""
    sampling = {"max_new_tokens": max_new_tokens, **case.options}
    reply = server.post("/generate", {"input_ids": list(case.prompt.ids), "sampling_params": sampling})
    return Answer(tuple(reply["output_ids"]), reply["meta_info"].get("spec_verify_ct", 0))


def collect(server: Server, requests: Sequence[Case], in_flight: int, max_new_tokens: int, label: str) -> list[Answer]:
    """All answers, in order."""
    with ThreadPoolExecutor(in_flight) as pool:
        answers = pool.map(partial(ask, server, max_new_tokens), requests)
        return list(progress(answers, len(requests), label))


def first_difference(reference: Reference, case: Case, expected: Answer, actual: Answer) -> dict[str, Any] | None:
    """Where two answers part, and how far from it rounding was; None if they are equal."""
    if expected.tokens == actual.tokens:
        return None
    pairs = enumerate(zip(expected.tokens, actual.tokens, strict=False))
    index = next((index for index, (one, other) in pairs if one != other), None)
    if index is None:
        return {"case": case.label, "prompt": case.prompt.name, "index": None, "margin": None}
    tokens = expected.tokens[index], actual.tokens[index]
    logits = reference.ar_logits([*case.prompt.ids, *expected.tokens[:index]])[-1]
    position = len(case.prompt.ids) + index - 1
    is_greedy = case.options["temperature"] == 0
    distance = float(top2_gap(logits)) if is_greedy else margin(logits, case.options, position, tokens)
    return {"case": case.label, "prompt": case.prompt.name, "index": index, "tokens": tokens, "margin": distance}


def tokens_and_rounds(requests: Sequence[Case], answers: Sequence[Answer]) -> dict[str, list[int]]:
    """By kind of request: tokens that rounds gave, and the rounds."""
    result: dict[str, list[int]] = {}
    for case, answer in zip(requests, answers, strict=True):
        found = result.setdefault(case.label, [0, 0])
        found[0] += len(answer.tokens) - 1
        found[1] += answer.rounds
    return result


def answer_all(requests: Sequence[Case], max_new_tokens: int, first_port: int | None) -> dict[str, list[Answer]]:
    """What every server says. They run at the same time: a server that has one request at a time leaves cores idle."""
    setup = SETUPS["cpu"]
    ports = iter(range(first_port, first_port + 6)) if first_port is not None else None

    def collect_from(name: str, model: Path, in_flight: int, args: Sequence[str], env: dict[str, str]) -> list[Answer]:
        # Ports are drawn at random otherwise, and dozens of servers that start together would draw one twice.
        nccl = ("--nccl-port", str(next(ports))) if ports is not None else ()
        port = next(ports) if ports is not None else None
        with Server(model, *args, *setup.args, *nccl, port=port, env=env) as server:
            return collect(server, requests, in_flight, max_new_tokens, name)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        plain = export_ar(NANO, Path(folder) / "ar")
        futures = {
            "plain": pool.submit(collect_from, "plain", plain, 1, SEEDED, plain_env()),
            "seeded": pool.submit(collect_from, "seeded", NANO, IN_FLIGHT, (*ORTHRUS_ARGS, *SEEDED), {}),
            REJECTION: pool.submit(collect_from, REJECTION, NANO, IN_FLIGHT, ORTHRUS_ARGS, {}),
        }
        return {name: future.result() for name, future in futures.items()}


def run(count: int, max_new_tokens: int, part: Slice, first_port: int | None) -> dict[str, Any]:
    """All servers, and the comparison."""
    prompts = part.of(load_prompts(NANO, count)[:count])
    requests = cases(prompts)
    answers = answer_all(requests, max_new_tokens, first_port)
    plain = answers["plain"]
    reference = Reference(NANO)
    pairs = zip(requests, plain, answers["seeded"], strict=True)
    # Of a greedy request the answer is known by heart: of how many sampled ones is it another?
    greedy = {case.prompt.name: answer for case, answer in zip(requests, plain, strict=True) if case.label == "greedy"}
    others = sum(answer.tokens != greedy[case.prompt.name].tokens for case, answer in zip(requests, plain, strict=True))
    return conclude(
        {
            "prompts of the whole run": count,
            "max new tokens": max_new_tokens,
            "slices": part.of_slices,
            "slice": part.number,
            "prompts": len(prompts),
            "answers": len(requests),
            "answers that are not the greedy one": others,
            "tokens": sum(len(answer.tokens) for answer in plain),
            "differences": [found for pair in pairs if (found := first_difference(reference, *pair)) is not None],
            ROUNDS: {name: tokens_and_rounds(requests, answers[name]) for name in ("seeded", REJECTION)},
            "provenance": provenance(),
        }
    )


def main() -> int:
    """Run or merge, print, write the JSON; exit status 1 if parity does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200, help="of the whole run")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--slice", type=Slice.parse, default=Slice(0, 1), metavar="I/N", help="every N-th prompt from I"
    )
    parser.add_argument("--first-port", type=int, help="of six in a row; free ones are drawn by default")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="results of all slices; runs nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "seeded-parity-cpu.json")
    arguments = parser.parse_args()
    if arguments.merge:
        result = merge([json.loads(path.read_text()) for path in arguments.merge])
    else:
        result = run(arguments.prompts, arguments.max_new_tokens, arguments.slice, arguments.first_port)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
