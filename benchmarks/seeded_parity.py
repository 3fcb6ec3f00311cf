"""Seeded parity: ORTHRUS, in mixed batches, against plain SGLang serving every request alone; and what seeds cost.

    python -m benchmarks.seeded_parity [--prompts 200] [--max-new-tokens 64]

Under `--enable-deterministic-inference`, held-out prompts x 3 seeds x temperatures 0.6 and 1.0 x filters (none, top_p,
top_k, both), with greedy requests among them. ORTHRUS has eight requests of different kinds in flight; plain SGLang
one at a time, since its own seeded output depends on the neighbours. Answers equal token by token, but for a first
difference where rounding decides (`seeded_rules.margin` below 1e-4), at most one in 200 answers.

Then the same requests without seeds: tokens per cycle of rejection sampling beside those of the common noise.
Tokens per cycle = (tokens - 1) / rounds, as the first token comes from the prefill; the bonus token is included.
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

from benchmarks.parity import RESULTS, SETUPS, Prompt, load_prompts, progress
from benchmarks.parity_rules import NEAR_TIE
from benchmarks.provenance import provenance
from benchmarks.seeded_rules import margin
from sglang_orthrus.checkpoint import export_ar
from sglang_orthrus.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.server import Server, plain_env
from tests.reference import Reference, top2_gap

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
ANSWERS_PER_EXCUSE = 200


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


def tokens_per_cycle(requests: Sequence[Case], answers: Sequence[Answer]) -> dict[str, float]:
    """By kind of request, weighted by rounds."""
    result = {}
    for label in sorted({case.label for case in requests}):
        chosen = [answer for case, answer in zip(requests, answers, strict=True) if case.label == label]
        rounds = sum(answer.rounds for answer in chosen)
        result[label] = round(sum(len(answer.tokens) - 1 for answer in chosen) / max(rounds, 1), 3)
    return result


def run(count: int, max_new_tokens: int) -> dict[str, Any]:
    """Both servers, and the comparison."""
    requests = cases(load_prompts(NANO, count)[:count])
    setup = SETUPS["cpu"]
    answers = {}
    for name, extra in (("seeded", SEEDED), ("rejection", ())):
        with Server(NANO, *ORTHRUS_ARGS, *setup.args, *extra) as server:
            answers[name] = collect(server, requests, IN_FLIGHT, max_new_tokens, name)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_ar(NANO, Path(folder) / "ar")
        with Server(exported, *setup.args, *SEEDED, env=plain_env()) as server:
            plain = collect(server, requests, 1, max_new_tokens, "plain")
    reference = Reference(NANO)
    pairs = zip(requests, plain, answers["seeded"], strict=True)
    differences = [found for pair in pairs if (found := first_difference(reference, *pair)) is not None]
    are_near = all(d["margin"] is not None and d["margin"] < NEAR_TIE for d in differences)
    # Of a greedy request the answer is known by heart: of how many sampled ones is it another?
    greedy = {case.prompt.name: answer for case, answer in zip(requests, plain, strict=True) if case.label == "greedy"}
    others = sum(answer.tokens != greedy[case.prompt.name].tokens for case, answer in zip(requests, plain, strict=True))
    return {
        "passed": are_near and len(differences) * ANSWERS_PER_EXCUSE <= len(requests),
        "answers": len(requests),
        "answers that are not the greedy one": others,
        "tokens": sum(len(answer.tokens) for answer in plain),
        "differences": differences,
        "tokens per cycle, seeded": tokens_per_cycle(requests, answers["seeded"]),
        "tokens per cycle, rejection sampling": tokens_per_cycle(requests, answers["rejection"]),
        "provenance": provenance(),
    }


def main() -> int:
    """Run, print, write the JSON; exit status 1 if parity does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "seeded-parity-cpu.json")
    arguments = parser.parse_args()
    result = run(arguments.prompts, arguments.max_new_tokens)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
