"""Grammars on Qwen3's own 151,936 tokens. `make tokenizer` fetches them; without them these tests skip themselves."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, BaseGrammarObject
from sglang.srt.speculative.spec_utils import GrammarTree, generate_token_bitmask

from benchmarks.common.qwen3_tokenizer import END, FILE, VOCABULARY, qwen3_tokenizer
from benchmarks.structured.cases import SCHEMAS
from benchmarks.structured.walk import backends
from sglang_orthrus.grammar.cursors import cursor_of
from sglang_orthrus.grammar.repair import MAX_REPAIRS, repair_drafts
from sglang_orthrus.grammar.token_text import TokenText
from tests.unit.test_forced_strings import ENDLESS, STRICT_KEYS, counted

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs Qwen3's tokenizer: make tokenizer")

WIDTH, CANDIDATES = 32, 64
# Every sixth is enough of the 66, at a second each.
SOME = [json.loads(line) for line in SCHEMAS.read_text(encoding="utf-8").splitlines()][::6]
VALUE = {"price": 12, "größe": "M"}


@cache
def text() -> TokenText:
    return TokenText(qwen3_tokenizer())


@cache
def engines() -> dict[str, BaseGrammarBackend]:
    return backends(qwen3_tokenizer())


def scratch() -> torch.Tensor:
    return torch.empty(1, VOCABULARY // 32, dtype=torch.int32)


def allowed_by_sglang(grammar: BaseGrammarObject, tokens: Any) -> torch.Tensor:
    """SGLang's own masks of a chain, [len(tokens) + 1, W]."""
    tree = GrammarTree.from_linear_chain(torch.tensor([[0, *tokens]]))
    masks, _ = generate_token_bitmask([SimpleNamespace(grammar=grammar)], *tree.resolve(), VOCABULARY)
    assert masks is not None
    return masks


def test_every_token_is_spelled_in_its_bytes() -> None:
    tokenizer: Any = qwen3_tokenizer()
    for token in range(0, len(tokenizer), 7):
        assert text().spelling(token).decode(errors="replace") == tokenizer.decode([token]), token
    for written in ("größe и 漢字 🙂", '{"a": [1, 2.5]}', "<tool_call>\n", "\t\tif x:\n"):
        assert b"".join(map(text().spelling, text().encode(written))) == written.encode()


@pytest.mark.parametrize("engine", ["xgrammar", "llguidance"])
@pytest.mark.parametrize("line", SOME, ids=lambda line: line["name"])
def test_masks_of_a_repaired_block_are_those_of_sglang(engine: str, line: dict[str, Any]) -> None:
    """Drafts are noise, so that every kind of repair is needed; the grammar is where it was afterwards."""
    grammar = engines()[engine].dispatch_json(json.dumps(line["schema"]))
    rng = np.random.default_rng(0)
    candidates = rng.integers(0, VOCABULARY, (WIDTH - 1, CANDIDATES))
    before = allowed_by_sglang(grammar, candidates[:, 0])
    cursor = cursor_of(grammar, text(), scratch())
    done = repair_drafts(cursor, candidates[:, 0].copy(), candidates, scratch(), MAX_REPAIRS)
    assert done.match.length > 0 and done.changes.any()
    masks = torch.full((WIDTH, VOCABULARY // 32), -1, dtype=torch.int32)
    cursor.fill_block(torch.tensor([0, *done.tokens]), masks)
    num_masks = done.match.length + (not done.match.ended)
    assert torch.equal(masks[:num_masks], allowed_by_sglang(grammar, done.tokens)[:num_masks])
    assert torch.equal(allowed_by_sglang(grammar, candidates[:, 0]), before)


def test_composed_characters_are_refused_where_a_grammar_wants_them_decomposed() -> None:
    """Qwen3's tokenizer composes characters (NFC). Repair then goes on in other tokens, up to the end of the text."""
    cursor = cursor_of(
        engines()["xgrammar"].dispatch_json(json.dumps({"const": "cafe\u0301 au lait"})), text(), scratch()
    )
    forced = list(cursor.forced(WIDTH - 1))
    assert "f\u00e9".encode() in b"".join(map(text().spelling, forced))
    candidates = np.random.default_rng(0).integers(0, VOCABULARY, (WIDTH - 1, CANDIDATES))
    done = repair_drafts(cursor, candidates[:, 0].copy(), candidates, scratch(), MAX_REPAIRS)
    written = b"".join(map(text().spelling, done.tokens[: done.match.length].tolist()))
    assert done.match.ended and written == b'"cafe\xcc\x81 au lait"' + END.encode()


@pytest.mark.parametrize("engine", ["xgrammar", "llguidance"])
def test_a_good_block_is_left_alone(engine: str) -> None:
    separators = (", ", ": ") if engine == "xgrammar" else (",", ":")
    good = text().encode(json.dumps(VALUE, ensure_ascii=False, separators=separators) + END)
    candidates = np.zeros((WIDTH - 1, CANDIDATES), np.int64)
    candidates[: len(good), 0] = good
    cursor = cursor_of(engines()[engine].dispatch_json(json.dumps(STRICT_KEYS)), text(), scratch())
    done = repair_drafts(cursor, candidates[:, 0].copy(), candidates, scratch(), MAX_REPAIRS)
    assert done.tokens[: len(good)].tolist() == good
    assert not done.changes.any() and done.match == (len(good), True)


@pytest.mark.parametrize(
    ("written", "expected"),
    [("", '{"price": '), ('{"price": 1, ', '"größe": "'), ('{"price": 1, "gr', 'öße": "'), ('{"price": ', "")],
)
def test_a_forced_string_is_written_as_qwen3_writes_it(written: str, expected: str) -> None:
    """Without its last token, which may join with what follows."""
    grammar: Any = engines()["xgrammar"].dispatch_json(json.dumps(STRICT_KEYS))
    assert grammar.matcher.accept_string(written) or not written
    cursor = cursor_of(grammar, text(), scratch())
    assert list(cursor.forced(WIDTH - 1)) == text().encode(expected)[:-1]


@pytest.mark.parametrize("name", ENDLESS)
def test_a_forced_string_without_end_is_followed_to_the_end_of_the_block(name: str) -> None:
    kind, rule, expected = ENDLESS[name]
    cursor: Any = cursor_of(getattr(engines()["xgrammar"], f"dispatch_{kind}")(rule), text(), scratch())
    counts = counted(cursor)
    forced = list(cursor.forced(WIDTH - 1))
    assert forced and b"".join(map(text().spelling, forced)) == expected.encode()[: sum(map(_length, forced))]
    assert counts["fill_next_token_bitmask"] <= WIDTH
    assert counts["find_jump_forward_string"] == 0, "it has no bound"


def _length(token: int) -> int:
    return len(text().spelling(token))


@pytest.mark.parametrize("pattern", ["[a-z]{2,500}", "[0-9]{3,90}", "[\u0430-\u044f]{2,50}", "[\u4e00-\u9fff]{2,50}"])
def test_no_mask_is_filled_where_there_is_a_choice(pattern: str) -> None:
    cursor: Any = cursor_of(engines()["xgrammar"].dispatch_regex(pattern), text(), scratch())
    counts = counted(cursor)
    assert list(cursor.forced(WIDTH - 1)) == []
    assert counts["fill_next_token_bitmask"] == 0
