"""Masks and forced strings along answers, in Qwen3's vocabulary and in one of made-up words.

    python -m benchmarks.structured.positions [OUT.json]        # after `make tokenizer`

At every token of nano's constrained answers: the processor time of one mask, and that of one search for a forced
string of up to 31 tokens, and what it found. Both vocabularies have 151,936 ids, and both spell the same answers. No
draft takes part, so that nothing but the vocabulary differs.

tokens: of all answers. mask_ms: median, 99th percentile and maximum. forced_us: the same of the search. forced: the
share of positions where it finds something; forced_tokens: how many tokens it finds there in the mean.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend

from benchmarks.common.provenance import provenance
from benchmarks.common.qwen3_tokenizer import VOCABULARY, qwen3_tokenizer
from benchmarks.structured.cases import END, Case, blocks, foreign_cases, nano, own_cases
from benchmarks.structured.walk import MADE_UP, QWEN3, backends, wide_tokenizer
from sglang_orthrus.grammar.cursors import cursor_of
from sglang_orthrus.grammar.token_text import TokenText

NUM_DRAFTS = 31
Answer = tuple[Case, str]


def answers() -> dict[str, list[Answer]]:
    """nano's own answers, by the set of their prompts."""
    tokenizer, _ = nano()
    found = {}
    for name, cases in (("own", own_cases(6)), ("tests/data", foreign_cases()[::11])):
        by_case = {block.case.name: (block.case, tokenizer.decode(block.answer)) for block in blocks(cases)}
        found[name] = list(by_case.values())
    return found


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def measure(backend: BaseGrammarBackend, text: TokenText, given: Sequence[Answer]) -> dict[str, Any]:
    """Along all these answers."""
    scratch = torch.empty(1, VOCABULARY // 32, dtype=torch.int32)
    masks, searches, found = list[float](), list[float](), list[int]()
    for case, answer in given:
        grammar: Any = backend.dispatch_json(case.grammar["json_schema"])
        cursor = cursor_of(grammar, text, scratch)
        search, fill = partial(cursor.forced, NUM_DRAFTS), partial(cursor.fill, scratch)
        for token in text.encode(answer):
            seconds, forced = _timed(search)
            searches.append(seconds)
            found.append(len(list(forced)))
            masks.append(_timed(fill)[0])
            if not cursor.advance([token]).length:
                break
    return {
        "tokens": len(masks),
        "mask_ms": _quantiles(masks, 1e3),
        "forced_us": _quantiles(searches, 1e6),
        "forced": round(float(np.mean(np.array(found) > 0)), 3),
        "forced_tokens": round(float(np.mean([count for count in found if count] or [0])), 2),
    }


def _quantiles(seconds: Sequence[float], scale: float) -> dict[str, float]:
    shares = {"median": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(scale * float(np.quantile(seconds, share)), 3) for name, share in shares.items()}


def main() -> None:
    torch.set_num_threads(1)
    real = qwen3_tokenizer()
    if real is None:
        raise SystemExit("Qwen3's tokenizer is missing: make tokenizer")
    given = answers()
    rows = []
    for vocabulary, tokenizer in ((MADE_UP, wide_tokenizer()), (QWEN3, real)):
        text = TokenText(tokenizer)
        for (engine, backend), (prompts, some) in product(backends(tokenizer).items(), given.items()):
            measure(backend, text, some)  # grammars are compiled, and masks cached, as in a server that runs
            row = {"vocabulary": vocabulary, "backend": engine, "prompts": prompts}
            rows.append(row | measure(backend, text, some))
            print(json.dumps(rows[-1]), flush=True)
    if len(sys.argv) > 1:
        result = {"provenance": provenance(), "end": END, "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
