"""Tokens per cycle of the grammar walk without a server: python -m benchmarks.structured.replay [OUT.json]

Greedy output does not depend on drafts, so each answer is decoded once, in plain PyTorch under XGrammar, with the draft
block at every token; a setting is then a replay of rounds over these blocks. That is exact, and cheap enough to compare
settings: `max_repairs` and `candidates` are the two numbers behind a repair.

tokens_per_cycle: tokens after the first over rounds; repaired, forced: shares of all drafts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo, allocate_token_bitmask

from benchmarks.common.provenance import provenance
from benchmarks.structured.cases import END, Block, blocks, fast, foreign_cases, nano, own_cases
from sglang_orthrus.core import DraftChange
from sglang_orthrus.grammar.batch import NUM_CANDIDATES
from sglang_orthrus.grammar.repair import MAX_REPAIRS, repair_drafts
from sglang_orthrus.grammar.token_text import TokenText
from sglang_orthrus.grammar.xgrammar import XGrammarCursor


class Setting(NamedTuple):
    """How drafts are repaired: at most so many of a block, by so many candidates per position."""

    max_repairs: int = MAX_REPAIRS
    candidates: int = NUM_CANDIDATES


SETTINGS = (
    Setting(),
    Setting(max_repairs=0),
    *(Setting(max_repairs=count) for count in (2, 4, 8, 31)),
    *(Setting(candidates=count) for count in (1, 4, 16)),
)


def replay(drafted: Sequence[Sequence[Block]], setting: Setting, any_whitespace: bool) -> dict[str, Any]:
    """All answers, each as its blocks by the number of committed tokens."""
    tokenizer, _ = nano()
    info = TokenizerInfo.from_huggingface(fast(tokenizer), stop_token_ids=[tokenizer.token_to_id(END)])
    compiler, text = GrammarCompiler(info), TokenText(fast(tokenizer))
    scratch = allocate_token_bitmask(1, info.vocab_size)
    num_tokens = rounds = 0
    changes = np.zeros(len(DraftChange), np.int64)
    for answer_blocks in drafted:
        schema, answer = answer_blocks[0].case.grammar["json_schema"], answer_blocks[0].answer
        matcher = GrammarMatcher(compiler.compile_json_schema(schema, any_whitespace=any_whitespace))
        cursor, committed = XGrammarCursor(matcher, text, frozenset(matcher.stop_token_ids), scratch), 1
        cursor.advance(answer[:1])
        while committed < len(answer):
            candidates = answer_blocks[committed - 1].candidates[:, : setting.candidates].numpy()
            done = repair_drafts(cursor, candidates[:, 0].copy(), candidates, scratch, setting.max_repairs)
            rest = answer[committed:]
            agrees = np.array(rest[: len(done.tokens)]) == done.tokens[: len(rest)]
            accepted = len(agrees) if agrees.all() else int(agrees.argmin())
            run = rest[: accepted + 1]
            cursor.advance(run)
            committed += len(run)
            changes += np.bincount(done.changes, minlength=len(DraftChange))
            rounds += 1
        num_tokens += len(answer) - 1
    shares = changes / changes.sum()
    return {
        "tokens_per_cycle": round(num_tokens / rounds, 3),
        "repaired": round(float(shares[DraftChange.REPAIRED]), 3),
        "forced": round(float(shares[DraftChange.FORCED]), 3),
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
                for setting in SETTINGS if answers == "all" else SETTINGS[:2]:
                    figures = replay(chosen, setting, whitespace == "any")
                    given = {"whitespace": whitespace, "prompts": prompts, "answers": f"{answers}: {len(chosen)}"}
                    rows.append(given | setting._asdict() | figures)
                    print(json.dumps(rows[-1]), flush=True)
    if len(sys.argv) > 1:
        result = {"provenance": provenance(), "rows": rows}
        Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
