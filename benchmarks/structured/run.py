"""Structured generation: plain SGLang against ORTHRUS with drafts left alone, repaired, and chosen throughout.

    python -m benchmarks.structured cpu [--own 300] [--backends xgrammar llguidance] [--out FILE]
    python -m benchmarks.structured gpu --model /tmp/wide-8b        # concurrency 1, 8 and 32
    python -m benchmarks.structured cpu --slice 0/16 --out FILE     # a part of it, for `benchmarks.structured.merge`

Prompts: nano's own JSON and tool calls, free and constrained, and the schemas of tests/data, of kinds that nano was not
trained on. Every setting is served once with XGrammar's default, white space anywhere in JSON, and once without
(`--constrained-json-disable-any-whitespace`), where much more of a text is forced.

ORTHRUS answers own prompts `--repeat` times, free and constrained in turns; a row is the run of the median time.

identical: answers that are plain SGLang's token by token, others are named; valid: those that follow their schema; the
rest is explained in `structured_figures.py`. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from itertools import product
from pathlib import Path
from typing import Any

import requests
from tokenizers import Tokenizer

from benchmarks.common.provenance import RESULTS, provenance
from benchmarks.common.setups import ONE_WIDTH
from benchmarks.common.slices import Slice
from benchmarks.structured.cases import Case, foreign_cases, is_valid, own_cases, tool_cases
from benchmarks.structured.figures import SETTING, grammar_counts, rates
from sglang_orthrus.cli.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.cli.server import Server, plain_env
from sglang_orthrus.config import GRAMMAR_DRAFT
from sglang_orthrus.models.checkpoint import export_ar

ARGS = {
    "cpu": ("--dtype", "float32", "--context-length", "2048"),
    "gpu": (
        *("--dtype", "bfloat16", "--attention-backend", "flashinfer", "--context-length", "2048"),
        # The same graphs for all servers. Once prompts are cached, batches have a token of each of them or a few more.
        *("--max-running-requests", "32", "--cuda-graph-bs-decode", "1", "2", "4", "8", "16", "24", "32"),
        *("--cuda-graph-bs-prefill", "2", "4", "8", "16", "32", "64", "128", "256", "512"),
    ),
}
CONCURRENCIES = {"cpu": (4,), "gpu": (1, 8, 32)}
STRICT = "--constrained-json-disable-any-whitespace"
SERVERS = ("plain", "off", "repair", "plain_again")
MAX_NEW_TOKENS = 160
FOREIGN = "tests/data"

Answer = dict[str, Any]
Run = tuple[Answer, list[list[int]]]  # counts and token ids


def ask(server: Server, tokenizer: Tokenizer, free: bool, case: Case, max_new_tokens: int = MAX_NEW_TOKENS) -> Answer:
    """One greedy request. One that a grammar engine fails on, in plain SGLang, too, is an answer without tokens."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, **({} if free else case.grammar)}
    ids = tokenizer.encode(case.prompt, add_special_tokens=False).ids
    reply = requests.post(f"{server.url}/generate", json={"input_ids": ids, "sampling_params": sampling}, timeout=300)
    if reply.status_code == HTTPStatus.INTERNAL_SERVER_ERROR and server.is_running:
        return {"output_ids": [], "text": "", "meta_info": {"finish_reason": {"type": "abort"}}}
    reply.raise_for_status()
    answer: Answer = reply.json()
    return answer


def metrics(server: Server) -> dict[str, float]:
    """The server's grammar metrics, by name and label; buckets are cumulative."""
    lines = (line for line in server.get("/metrics").text.splitlines() if line.startswith("sglang_orthrus:grammar"))
    found: dict[str, float] = {}
    for line in lines:
        name, value = line.rsplit(" ", 1)
        found[name] = float(value)
    return found


def measure(server: Server, tokenizer: Tokenizer, cases: Sequence[Case], free: bool, concurrency: int) -> Run:
    """All cases of a set, so many at a time: counts and token ids.

    Each is asked for one token first, which compiles its grammar: a schema is compiled once and used many times.
    """
    with ThreadPoolExecutor(concurrency) as pool:
        started = time.perf_counter()
        list(pool.map(partial(ask, server, tokenizer, free, max_new_tokens=1), cases))
        prepared, before = time.perf_counter(), metrics(server)
        timed = time.perf_counter()
        answers = list(pool.map(partial(ask, server, tokenizer, free), cases))
        seconds = time.perf_counter() - timed
    counts = {
        "answers": len(answers),
        "ended": sum(answer["meta_info"]["finish_reason"]["type"] == "stop" for answer in answers),
        "aborted": sum(answer["meta_info"]["finish_reason"]["type"] == "abort" for answer in answers),
        "valid": sum(is_valid(case, answer["text"]) for case, answer in zip(cases, answers, strict=True)),
        "tokens": sum(len(answer["output_ids"]) for answer in answers),
        "rounds": sum(answer["meta_info"].get("spec_verify_ct", 0) for answer in answers),
        "seconds": round(seconds, 3),
        "preparing_seconds": round(prepared - started, 3),
        **grammar_counts(before, metrics(server)),
    }
    return counts, [answer["output_ids"] for answer in answers]


def launch(mode: str, name: str, model: Path, exported: Path, args: Sequence[str]) -> Server:
    """A server that is not started yet."""
    common = (*ARGS[mode], "--enable-metrics", "--decode-log-interval", "1000000", *args)
    if name.startswith("plain"):
        return Server(exported, *common, env=plain_env())
    return Server(model, *ORTHRUS_ARGS, *common, env={GRAMMAR_DRAFT: name, **ONE_WIDTH})


def rows(options: argparse.Namespace) -> Iterator[Answer]:
    """One per server, set of prompts and concurrency."""
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    all_sets = {
        "own json": own_cases(options.own),
        "own tools": tool_cases(options.own // 3),
        FOREIGN: foreign_cases()[: options.schemas],
    }
    sets = {key: part for key, cases in all_sets.items() if (part := options.slice.of(cases))}
    with tempfile.TemporaryDirectory() as folder:
        exported = export_ar(options.model, Path(folder) / "ar")
        for backend, strict in product(options.backends, options.whitespace):
            args = ("--grammar-backend", backend, *((STRICT,) if strict == "none" else ()))
            truth: dict[Any, list[list[int]]] = {}
            for name in options.servers:
                with launch(options.mode, name, options.model, exported, args) as server:
                    measure(server, tokenizer, all_sets["own json"][:4], False, 2)  # warm-up
                    for concurrency in CONCURRENCIES[options.mode]:
                        count = 1 if name.startswith("plain") else options.repeat
                        found = repeated(server, tokenizer, sets, concurrency, count)
                        for (prompts, free), runs in found.items():
                            expected = truth.setdefault((prompts, free), runs[0][1])
                            label = f"{prompts}{', free' if free else ''}"
                            setting = dict(zip(SETTING, (backend, strict, name, label, concurrency), strict=True))
                            yield setting | figures(sets[prompts], runs, expected)


def repeated(
    server: Server, tokenizer: Tokenizer, sets: dict[str, list[Case]], concurrency: int, count: int
) -> dict[tuple[str, bool], list[Run]]:
    """Runs of every set, by set and whether it is free; constrained and free in turns.

    The foreign set is run once, and not free: left alone, nano answers it in a text of its own length.
    """
    keys = [(key, free) for key in sets for free in (False, True) if not (free and key == FOREIGN)]
    found: dict[tuple[str, bool], list[Run]] = {key: [] for key in keys}
    for number in range(count):
        for prompts, free in keys:
            if prompts != FOREIGN or not number:
                found[prompts, free].append(measure(server, tokenizer, sets[prompts], free, concurrency))
    return found


def figures(cases: Sequence[Case], runs: Sequence[Run], expected: list[list[int]]) -> Answer:
    """Of the run that took the median time. expected: the token ids of plain SGLang."""
    counts, ids = sorted(runs, key=lambda run: run[0]["seconds"])[len(runs) // 2]
    different = [case.name for case, own, plain in zip(cases, ids, expected, strict=True) if own != plain]
    found = {"all_seconds": [run[0]["seconds"] for run in runs], "different": different}
    return counts | found | {"identical": len(ids) - len(different)} | rates(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Structured generation, plain SGLang against ORTHRUS.")
    parser.add_argument("mode", choices=ARGS)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--own", type=int, default=300, help="held-out JSON prompts; a third as many tool calls")
    parser.add_argument("--schemas", type=int, help="so many of those in tests/data; all by default")
    parser.add_argument("--repeat", type=int, default=1, help="runs of own prompts with ORTHRUS; the median counts")
    parser.add_argument("--backends", nargs="+", default=["xgrammar", "llguidance"])
    parser.add_argument("--whitespace", nargs="+", default=["any", "none"], choices=["any", "none"])
    parser.add_argument("--servers", nargs="+", default=SERVERS, choices=SERVERS)
    parser.add_argument(
        "--slice", type=Slice.parse, default=Slice(0, 1), metavar="I/N", help="every N-th case from the I-th on"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or RESULTS / f"structured-{options.mode}.json"
    result: dict[str, Any] = {"provenance": provenance(), "slice": options.slice, "rows": []}
    for row in rows(options):
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"out": str(out), "rows": len(result["rows"])}))
