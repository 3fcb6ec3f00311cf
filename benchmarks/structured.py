"""Structured generation: plain SGLang against ORTHRUS with drafts left alone, repaired, and chosen throughout.

    python -m benchmarks.structured cpu [--own 300] [--backends xgrammar llguidance] [--out FILE]
    python -m benchmarks.structured gpu --model /tmp/wide-8b        # concurrency 1, 8 and 32

Prompts: nano's own JSON and tool calls, free and constrained, and the schemas of tests/data, of kinds that nano was not
trained on. Every setting is served once with XGrammar's default, white space anywhere in JSON, and once without
(`--constrained-json-disable-any-whitespace`), where much more of a text is forced.

tokens_per_cycle: (tokens - 1) / rounds over all answers; repaired, forced: shares of drafts; valid: answers that follow
their schema; identical: answers that are plain SGLang's token by token; walk_ms: per round of all requests, taken
from within the buckets of the server's histogram. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from benchmarks.provenance import ROOT, provenance
from benchmarks.structured_cases import Case, foreign_cases, is_valid, own_cases, tool_cases
from sglang_orthrus.checkpoint import export_ar
from sglang_orthrus.demo import NANO, ORTHRUS_ARGS
from sglang_orthrus.server import Server, plain_env
from sglang_orthrus.settings import GRAMMAR_DRAFT

RESULTS = ROOT / "benchmarks" / "results"
ARGS = {
    "cpu": ("--dtype", "float32", "--context-length", "2048"),
    "gpu": ("--dtype", "bfloat16", "--attention-backend", "flashinfer", "--context-length", "2048"),
}
CONCURRENCIES = {"cpu": (4,), "gpu": (1, 8, 32)}
STRICT = "--constrained-json-disable-any-whitespace"
SERVERS = ("plain", "off", "repair", "full", "plain_again")
MAX_NEW_TOKENS = 160

Answer = dict[str, Any]


def ask(server: Server, tokenizer: Tokenizer, free: bool, case: Case) -> Answer:
    """One greedy request."""
    sampling = {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS, **({} if free else case.grammar)}
    ids = tokenizer.encode(case.prompt, add_special_tokens=False).ids
    reply: Answer = server.post("/generate", {"input_ids": ids, "sampling_params": sampling})
    return reply


def metrics(server: Server) -> dict[str, float]:
    """The server's grammar metrics, by name and label; buckets are cumulative."""
    lines = (line for line in server.get("/metrics").text.splitlines() if line.startswith("sglang_orthrus:grammar"))
    found: dict[str, float] = {}
    for line in lines:
        name, value = line.rsplit(" ", 1)
        found[name] = float(value)
    return found


def quantile(buckets: Mapping[float, float], share: float) -> float | None:
    """Of a histogram with cumulative counts by upper bound, in milliseconds; None if it is empty or in the last one."""
    bounds = [(0.0, 0.0), *sorted(buckets.items())]
    wanted = share * bounds[-1][1]
    for (low, below), (high, count) in pairwise(bounds):
        if wanted and count >= wanted:
            return (
                None
                if high == float("inf")
                else round(1e3 * (low + (high - low) * (wanted - below) / (count - below)), 3)
            )
    return None


def drafting(before: Mapping[str, float], after: Mapping[str, float]) -> Answer:
    """What grammars did between two readings of the metrics."""
    new = {name: value - before.get(name, 0.0) for name, value in after.items()}

    def label(name: str) -> str:
        return name.partition('="')[2].partition('"')[0]

    drafts = {label(name): value for name, value in new.items() if "drafts_total" in name}
    buckets = {float(label(name[name.index("le=") :])): value for name, value in new.items() if "bucket" in name}
    total = sum(drafts.values())
    if not total:
        return {}
    return {
        "repaired": round(drafts["repaired"] / total, 4),
        "forced": round(drafts["forced"] / total, 4),
        "walk_ms": {"median": quantile(buckets, 0.5), "p99": quantile(buckets, 0.99)},
    }


def measure(
    server: Server, tokenizer: Tokenizer, cases: Sequence[Case], free: bool, concurrency: int
) -> tuple[Answer, list[list[int]]]:
    """All cases of a set, so many at a time: figures and token ids."""
    before = metrics(server)
    started = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(partial(ask, server, tokenizer, free), cases))
    seconds = time.perf_counter() - started
    num_tokens = sum(len(answer["output_ids"]) for answer in answers)
    rounds = sum(answer["meta_info"].get("spec_verify_ct", 0) for answer in answers)
    figures = {
        "answers": len(answers),
        "ended": sum(answer["meta_info"]["finish_reason"]["type"] == "stop" for answer in answers),
        "valid": sum(is_valid(case, answer["text"]) for case, answer in zip(cases, answers, strict=True)),
        "tokens": num_tokens,
        "tokens_per_second": round(num_tokens / seconds, 1),
        "tokens_per_cycle": round((num_tokens - len(answers)) / rounds, 3) if rounds else None,
        **drafting(before, metrics(server)),
    }
    return figures, [answer["output_ids"] for answer in answers]


def launch(mode: str, name: str, model: Path, exported: Path, args: Sequence[str]) -> Server:
    """A server that is not started yet."""
    common = (*ARGS[mode], "--enable-metrics", "--decode-log-interval", "1000000", *args)
    if name.startswith("plain"):
        return Server(exported, *common, env=plain_env())
    return Server(model, *ORTHRUS_ARGS, *common, env={GRAMMAR_DRAFT: name})


def rows(options: argparse.Namespace) -> Iterator[Answer]:
    """One per server, set of prompts and concurrency."""
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    own = own_cases(options.own)
    sets = {
        "own json": own,
        "own tools": tool_cases(options.own // 3),
        "tests/data": foreign_cases()[: options.schemas],
    }
    with tempfile.TemporaryDirectory() as folder:
        exported = export_ar(options.model, Path(folder) / "ar")
        for backend in options.backends:
            for strict in options.whitespace:
                args = ("--grammar-backend", backend, *((STRICT,) if strict == "none" else ()))
                truth: dict[Any, list[list[int]]] = {}
                for name in options.servers:
                    with launch(options.mode, name, options.model, exported, args) as server:
                        measure(server, tokenizer, own[:4], False, 2)  # warm-up
                        for concurrency in CONCURRENCIES[options.mode]:
                            for prompts, free in ((key, free) for free in (False, True) for key in sets):
                                if free and prompts == "tests/data":
                                    continue  # left alone, nano answers these in a text of its own length
                                figures, ids = measure(server, tokenizer, sets[prompts], free, concurrency)
                                expected = truth.setdefault((prompts, free), ids)
                                figures["identical"] = sum(map(list.__eq__, ids, expected))
                                setting = {
                                    "backend": backend,
                                    "whitespace": strict,
                                    "server": name,
                                    "prompts": f"{prompts}{', free' if free else ''}",
                                    "concurrency": concurrency,
                                }
                                yield setting | figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Structured generation, plain SGLang against ORTHRUS.")
    parser.add_argument("mode", choices=ARGS)
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--own", type=int, default=300, help="held-out JSON prompts; a third as many tool calls")
    parser.add_argument("--schemas", type=int, help="so many of those in tests/data; all by default")
    parser.add_argument("--backends", nargs="+", default=["xgrammar", "llguidance"])
    parser.add_argument("--whitespace", nargs="+", default=["any", "none"], choices=["any", "none"])
    parser.add_argument("--servers", nargs="+", default=SERVERS, choices=SERVERS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or RESULTS / f"structured-{options.mode}.json"
    result: dict[str, Any] = {"provenance": provenance(), "rows": []}
    for row in rows(options):
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"out": str(out), "rows": len(result["rows"])}))


if __name__ == "__main__":
    main()
