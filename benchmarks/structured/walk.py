"""Time of the grammar walk on a vocabulary of 151,936 tokens: python -m benchmarks.structured.walk [OUT.json]

No server and no model pass: nano's real draft blocks, and `BlockGrammars` as the worker calls it. The vocabulary is one
of two:

- `qwen3`: Qwen3's own, and nano's blocks spelled in it (`respell`). Used where it was fetched (`make tokenizer`).
- `made-up`: nano's with made-up words behind its 4,096 tokens, so that masks have the size of Qwen3's.

Times per round, for all requests of a batch: choose_ms from candidates on the host to drafts, which a verify pass waits
for; masks_ms from there to masks, during that pass; walk_ms both. Copies to a GPU are not in them. choose_cpu_ms,
masks_cpu_ms and cpu_ms: processor time of the same, over all threads; on a busy machine the better figures. repaired,
forced: shares of drafts.

`next`: the masks of rounds that draft nothing, with XGrammar and made-up words. all_ms: every mask, as for sampled
requests; needed_ms: those that change the choice, where grammars are slow, as for greedy ones. refused: the share of
best tokens that their grammars refuse.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend
from sglang.srt.constrained.llguidance_backend import GuidanceBackend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.common.provenance import provenance
from benchmarks.common.qwen3_tokenizer import VOCABULARY, qwen3_tokenizer
from benchmarks.common.wide_tokenizer import widened_tokenizer
from benchmarks.structured.cases import END, Block, blocks, fast, foreign_cases, nano, own_cases
from benchmarks.structured.respell import respelled
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.config import DraftMode, slow_mask_seconds
from sglang_orthrus.core import DraftChange
from sglang_orthrus.grammar.batch import NUM_CANDIDATES, BlockGrammars, CandidatesCopy
from sglang_orthrus.grammar.cursor import is_allowed
from sglang_orthrus.grammar.cursors import cursor_of
from sglang_orthrus.metrics import GrammarMetrics

MADE_UP, QWEN3 = "made-up", "qwen3"
WIDTH = 32
CONCURRENCIES = (1, 32)
NEXT_CONCURRENCIES = (1, 8, 32, 128)
ROUNDS = 100
WARM_UP = 30


def wide_tokenizer() -> PreTrainedTokenizerFast:
    """Nano's tokenizer in a large vocabulary."""
    content = widened_tokenizer(json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8")), VOCABULARY)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token=END)


def backends(tokenizer: Any) -> dict[str, BaseGrammarBackend]:
    """SGLang's, without white space in JSON, so that they allow what nano writes."""
    end = tokenizer.convert_tokens_to_ids(END)
    return {
        "xgrammar": XGrammarGrammarBackend(
            tokenizer, vocab_size=VOCABULARY, model_eos_token_ids=[end], any_whitespace=False
        ),
        "llguidance": GuidanceBackend(
            tokenizer, any_whitespace=True, whitespace_pattern="[ ]?", n_vocab=VOCABULARY, eos_token_ids=[end]
        ),
    }


def measure(backend: BaseGrammarBackend, tokenizer: Any, drafted: Sequence[Block], bs: int, mode: DraftMode) -> Any:
    """Rounds of `bs` requests at random places of random answers."""
    rng, templates = random.Random(0), dict[str, Any]()
    metrics = GrammarMetrics(log_interval=1 << 30, model_name=None)
    grammars = BlockGrammars(mode, WIDTH, "cpu", tokenizer, metrics)
    counts = np.zeros(len(DraftChange), np.int64)
    taken, scratch = [], torch.empty(1, VOCABULARY // 32, dtype=torch.int32)
    for _ in range(WARM_UP + ROUNDS):
        chosen = rng.choices(drafted, k=bs)
        reqs = [_request(backend, templates, block) for block in chosen]
        for req in reqs:
            cursor_of(req.grammar, grammars.text, scratch)  # as in a request's earlier rounds
        candidates = CandidatesCopy(torch.stack([block.candidates[:, :NUM_CANDIDATES] for block in chosen]))
        start = _clocks()
        drafts = grammars.repair(reqs, range(bs), candidates, VOCABULARY)
        between = _clocks()
        grammars.masks(drafts)
        for repaired in drafts.blocks:
            if repaired is not None:
                counts += np.bincount(repaired.repair.changes, minlength=len(counts))
        taken.append((start, between, _clocks()))
    starts, betweens, ends = np.moveaxis(np.array(taken[WARM_UP:]), 1, 0)
    shares = counts / counts.sum()
    found: dict[str, Any] = {
        change.name.lower(): round(float(shares[change]), 3) for change in (DraftChange.REPAIRED, DraftChange.FORCED)
    }
    for name, milliseconds in (
        ("walk", 1e3 * (ends - starts)),
        ("choose", 1e3 * (betweens - starts)),
        ("masks", 1e3 * (ends - betweens)),
    ):
        median, cpu_median = np.median(milliseconds, axis=0)
        found[f"{name}_ms"] = {"median": round(median, 3), "p99": round(np.quantile(milliseconds[:, 0], 0.99), 3)}
        found["cpu_ms" if name == "walk" else f"{name}_cpu_ms"] = round(cpu_median, 3)
    return found


def measure_next(backend: BaseGrammarBackend, tokenizer: Any, drafted: Sequence[Block], bs: int) -> dict[str, Any]:
    """Rounds of `bs` requests that draft nothing, as `measure`."""
    found: dict[str, Any] = {}
    for name in ("all_ms", "needed_ms"):
        rng, templates, refused = random.Random(0), dict[str, Any](), 0
        metrics = GrammarMetrics(log_interval=1 << 30, model_name=None)
        grammars = BlockGrammars(DraftMode.REPAIR, WIDTH, "cpu", tokenizer, metrics, slow_mask_seconds())
        taken = []
        for _ in range(WARM_UP + ROUNDS):
            chosen = rng.choices(drafted, k=bs)
            reqs = [_request(backend, templates, block) for block in chosen]
            best = [block.best or 0 for block in chosen]
            started = time.perf_counter()
            skippable = range(bs) if name == "needed_ms" else ()
            masks = grammars.finish_next_masks(grammars.begin_next_masks(reqs, range(bs), VOCABULARY, skippable))
            grammars.late_masks(masks, dict(enumerate(best)))
            taken.append(time.perf_counter() - started)
            bits = masks.host.numpy()
            refused += sum(not is_allowed(token, own) for token, own in zip(best, bits, strict=True))
        milliseconds = 1e3 * np.array(taken[WARM_UP:])
        found[name] = {
            "mean": round(float(milliseconds.mean()), 3),
            "median": round(float(np.median(milliseconds)), 3),
            "p99": round(float(np.quantile(milliseconds, 0.99)), 3),
        }
        found["refused"] = round(refused / (bs * len(taken)), 3)
    return found


def _request(backend: BaseGrammarBackend, templates: dict[str, Any], block: Block) -> Any:
    """One whose answer is at a block. templates: compiled grammars by schema, added to."""
    schema = block.case.grammar["json_schema"]
    if schema not in templates:
        templates[schema] = backend.dispatch_json(schema)
        templates[schema].key_string = schema
    grammar = templates[schema].copy()
    for token in block.committed:
        grammar.accept_token(token)
    return SimpleNamespace(grammar=grammar, finished=lambda: False)


def _clocks() -> tuple[float, float]:
    """On the wall, and of the processors for all threads."""
    return time.perf_counter(), time.process_time()


def vocabulary(name: str) -> tuple[PreTrainedTokenizerFast, dict[str, list[Block]]]:
    """A tokenizer, and blocks in its tokens by the set of their prompts."""
    drafted = {"own": list(blocks(own_cases(6))), "tests/data": list(blocks(foreign_cases()[::11]))}
    if name == MADE_UP:
        return wide_tokenizer(), drafted
    tokenizer = qwen3_tokenizer()
    if tokenizer is None:
        raise SystemExit("Qwen3's tokenizer is missing: make tokenizer")
    ours = fast(nano()[0])
    return tokenizer, {key: list(respelled(found, ours, tokenizer, END)) for key, found in drafted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path)
    default = QWEN3 if qwen3_tokenizer() is not None else MADE_UP
    parser.add_argument("--vocabulary", choices=(MADE_UP, QWEN3), default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, drafted = vocabulary(options.vocabulary)
    result: dict[str, Any] = {"provenance": provenance(), "vocabulary": options.vocabulary, "rows": []}
    result["next"] = []
    for name, backend in backends(tokenizer).items():
        for prompts, found in drafted.items():
            if name == "xgrammar" and options.vocabulary == MADE_UP:
                for bs in NEXT_CONCURRENCIES:
                    setting = {"prompts": prompts, "concurrency": bs}
                    result["next"].append(setting | measure_next(backend, tokenizer, found, bs))
                    print(json.dumps(result["next"][-1]), flush=True)
            for mode in (DraftMode.REPAIR, DraftMode.OFF):
                for bs in CONCURRENCIES:
                    setting = {"backend": name, "prompts": prompts, "mode": mode.value, "concurrency": bs}
                    result["rows"].append(setting | measure(backend, tokenizer, found, bs, mode))
                    print(json.dumps(result["rows"][-1]), flush=True)
                    if options.out is not None:
                        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
