"""Tokens per cycle of the grammar walk without a server: python -m benchmarks.structured.replay [OUT.json]

Greedy output does not depend on drafts, so each answer is decoded once, in plain PyTorch under XGrammar, with the draft
block at every token; a way of walking is then a replay of rounds over these blocks. That is exact, and cheap enough to
compare ways: `max_repairs` and `candidates` are the two numbers behind a walk.

tokens_per_cycle: tokens after the first over rounds; repaired, forced: shares of all drafts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo, allocate_token_bitmask

from benchmarks.common.provenance import provenance
from benchmarks.structured.cases import END, Block, blocks, fast, foreign_cases, nano, own_cases
from sglang_orthrus.environment import DraftMode
from sglang_orthrus.grammar import repair as grammar
from sglang_orthrus.grammar.batch import NUM_CANDIDATES
from sglang_orthrus.grammar.repair import MAX_REPAIRS, Change, choose
from sglang_orthrus.grammar.token_text import TokenText
from sglang_orthrus.grammar.xgrammar import XGrammarCursor


class Way(NamedTuple):
    """A way of walking."""

    mode: DraftMode
    max_repairs: int = MAX_REPAIRS
    candidates: int = NUM_CANDIDATES


WAYS = (
    *map(Way, DraftMode),
    *(Way(DraftMode.REPAIR, max_repairs=count) for count in (2, 4, 8, 31)),
    *(Way(DraftMode.REPAIR, candidates=count) for count in (1, 4, 16)),
)


def replay(drafted: Sequence[Sequence[Block]], way: Way, any_whitespace: bool) -> dict[str, Any]:
    """All answers, each as its blocks by the number of committed tokens."""
    tokenizer, _ = nano()
    info = TokenizerInfo.from_huggingface(fast(tokenizer), stop_token_ids=[tokenizer.token_to_id(END)])
    compiler, text = GrammarCompiler(info), TokenText(fast(tokenizer))
    scratch = allocate_token_bitmask(1, info.vocab_size)
    num_tokens = rounds = 0
    changes = np.zeros(len(Change), np.int64)
    for answer_blocks in drafted:
        schema, answer = answer_blocks[0].case.grammar["json_schema"], answer_blocks[0].answer
        matcher = GrammarMatcher(compiler.compile_json_schema(schema, any_whitespace=any_whitespace))
        cursor, committed = XGrammarCursor(matcher, text, frozenset(matcher.stop_token_ids), scratch), 1
        cursor.advance(answer[:1])
        while committed < len(answer):
            candidates = answer_blocks[committed - 1].candidates[:, : way.candidates].numpy()
            done = choose(cursor, candidates[:, 0].copy(), candidates, scratch, way.mode)
            rest = answer[committed:]
            agrees = np.array(rest[: len(done.tokens)]) == done.tokens[: len(rest)]
            accepted = len(agrees) if agrees.all() else int(agrees.argmin())
            run = rest[: accepted + 1]
            cursor.advance(run)
            committed += len(run)
            changes += np.bincount(done.changes, minlength=len(Change))
            rounds += 1
        num_tokens += len(answer) - 1
    shares = changes / changes.sum()
    return {
        "tokens_per_cycle": round(num_tokens / rounds, 3),
        "repaired": round(float(shares[Change.REPAIRED]), 3),
        "forced": round(float(shares[Change.FORCED]), 3),
    }


def main() -> None:
    torch.set_num_threads(1)  # nano's products are too small to share
    rows = []
    for whitespace in ("none", "any"):
        for prompts, cases in (("own", own_cases(24)), ("tests/data", foreign_cases())):
            found = list(blocks(cases, any_whitespace=whitespace == "any"))
            drafted = [list(group) for _, group in groupby(found, key=lambda block: block.case.name)]
            ended = [own for own in drafted if own[0].answer[-1] == nano()[0].token_to_id(END)]
            for answers, chosen in (("all", drafted), ("ended", ended)):
                for way in WAYS if answers == "all" else WAYS[:3]:
                    with mock.patch.object(grammar, "MAX_REPAIRS", way.max_repairs):
                        figures = replay(chosen, way, whitespace == "any")
                    setting = {"whitespace": whitespace, "prompts": prompts, "answers": f"{answers}: {len(chosen)}"}
                    rows.append(setting | way._asdict() | {"mode": way.mode.value} | figures)
                    print(json.dumps(rows[-1]), flush=True)
    if len(sys.argv) > 1:
        result = {"provenance": provenance(), "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
