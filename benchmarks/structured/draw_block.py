"""A figure of one repaired block of nano's: python -m benchmarks.structured.draw_block

Decodes some schemas of tests/data without white space, takes the block that won the most by its walk, writes it down as
a trace (benchmarks/results/repaired-block.json), and draws the trace (docs/img/repaired-block.svg). With a trace as its
argument it only draws.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from xgrammar import GrammarCompiler, GrammarMatcher, TokenizerInfo, allocate_token_bitmask

from benchmarks.common.provenance import RESULTS, ROOT, provenance
from benchmarks.structured.cases import END, Block, blocks, fast, foreign_cases, nano
from sglang_orthrus.core import DraftChange
from sglang_orthrus.grammar.batch import NUM_CANDIDATES
from sglang_orthrus.grammar.repair import repair_drafts
from sglang_orthrus.grammar.token_text import TokenText
from sglang_orthrus.grammar.xgrammar import XGrammarCursor

TRACE = RESULTS / "repaired-block.json"
FIGURE = ROOT / "docs" / "img" / "repaired-block.svg"
COLOURS = {"NONE": "#e8eaed", "REPAIRED": "#fdd663", "FORCED": "#a8dab5"}
ROWS = {"drafts": "drafted", "walked": "after the walk", "emitted": "emitted"}
LINE_WIDTH, CHARACTER, LINE, GAP, LABEL = 900, 7.3, 24, 5, 110


def traces(case_blocks: Iterator[Block]) -> Iterator[dict[str, Any]]:
    """Every block with its walk and what verification accepts of it."""
    tokenizer, _ = nano()
    info = TokenizerInfo.from_huggingface(fast(tokenizer), stop_token_ids=[tokenizer.token_to_id(END)])
    compiler, text = GrammarCompiler(info), TokenText(fast(tokenizer))
    scratch = allocate_token_bitmask(1, info.vocab_size)
    for block in case_blocks:
        matcher = GrammarMatcher(compiler.compile_json_schema(block.case.grammar["json_schema"], any_whitespace=False))
        for token in block.committed:
            matcher.accept_token(token)
        candidates = block.candidates[:, :NUM_CANDIDATES].numpy()
        cursor = XGrammarCursor(matcher, text, frozenset(matcher.stop_token_ids), scratch)
        done = repair_drafts(cursor, candidates[:, 0].copy(), candidates, scratch)
        rest = block.answer[len(block.committed) :]
        yield {
            "schema": block.case.name,
            "committed": tokenizer.decode(block.committed, skip_special_tokens=False),
            "drafts": spell(candidates[:, 0].tolist()),
            "walked": spell(done.tokens.tolist()),
            "changes": [DraftChange(change).name for change in done.changes],
            "emitted": spell(rest[: agreeing(done.tokens.tolist(), rest) + 1]),
            "emitted_without_walk": agreeing(candidates[:, 0].tolist(), rest) + 1,
        }


def agreeing(drafts: list[int], answer: list[int]) -> int:
    """Leading drafts that are the answer's tokens."""
    pairs = zip(drafts, answer, strict=False)
    return next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(drafts), len(answer)))


def spell(ids: list[int]) -> list[str]:
    """Each token's own text."""
    tokenizer, _ = nano()
    return [tokenizer.decode([token], skip_special_tokens=False) for token in ids]


def draw(trace: dict[str, Any]) -> str:
    """As SVG: a column per position, up to the first draft that was not accepted and a few more."""
    shown = min(len(trace["drafts"]), len(trace["emitted"]) + 3)
    columns = [
        [visible(trace[row][place]) if place < len(trace[row]) else "" for row in ROWS] for place in range(shown)
    ]
    parts, left, top = [], float(LABEL), 34.0
    starts = [top]
    for place, column in enumerate(columns):
        width = CHARACTER * max(2, *map(len, column)) + 8
        if left + width > LINE_WIDTH:
            left, top = float(LABEL), top + LINE * len(ROWS) + 16
            starts.append(top)
        for number, (row, text) in enumerate(zip(ROWS, column, strict=True)):
            if text:
                accepted = place + 1 < len(trace["emitted"])
                colour = COLOURS[trace["changes"][place]] if row == "walked" else "#ffffff"
                colour = "#cfe2ff" if row == "emitted" else colour
                fade = 1.0 if accepted or row == "emitted" else 0.45
                parts.append(cell(left, top + LINE * number, width, text, colour, fade))
        left += width + GAP
    for start in starts:
        parts += [label(4, start + LINE * number + 16, text) for number, text in enumerate(ROWS.values())]
    legend = (
        f"schema “{trace['schema']}”, behind {trace['committed'][-40:]!r}: {len(trace['emitted'])} tokens from this "
        f"round, {trace['emitted_without_walk']} without the walk. Green: forced, yellow: repaired."
    )
    height = top + LINE * len(ROWS) + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LINE_WIDTH}" height="{height:.0f}" font-size="12">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{label(4, 18, legend)}{"".join(parts)}</svg>\n'
    )


def cell(x: float, y: float, width: float, text: str, colour: str, opacity: float) -> str:
    """A token in its box."""
    return (
        f'<g opacity="{opacity}"><rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{LINE - 4}" rx="3" '
        f'fill="{colour}" stroke="#80868b"/><text x="{x + 4:.1f}" y="{y + 14:.1f}" font-family="monospace" '
        f'xml:space="preserve">{escape(text)}</text></g>'
    )


def label(x: float, y: float, text: str) -> str:
    """Text beside the boxes."""
    return f'<text x="{x}" y="{y}" font-family="sans-serif">{escape(text)}</text>'


def visible(text: str) -> str:
    """White space as signs."""
    return text.replace(" ", "␣").replace("\n", "⏎")


def main() -> None:
    if len(sys.argv) > 1:
        trace = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    else:
        found = [
            trace
            for trace in traces(blocks(foreign_cases()[6:30:6], max_new_tokens=60))
            if {"FORCED", "REPAIRED"} <= set(trace["changes"][: len(trace["emitted"]) - 1])
        ]
        trace = max(found, key=lambda trace: len(trace["emitted"]) - trace["emitted_without_walk"])
        trace = {"provenance": provenance(), **trace}
        TRACE.write_text(json.dumps(trace, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    FIGURE.parent.mkdir(exist_ok=True)
    FIGURE.write_text(draw(trace), encoding="utf-8")


if __name__ == "__main__":
    main()
