"""A forced string costs no more than what is left of the block, however long it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.grammar.cursor import is_allowed
from sglang_orthrus.grammar.slow_masks import Deadline
from sglang_orthrus.grammar.token_text import BYTES_PER_TOKEN, TokenText
from sglang_orthrus.grammar.xgrammar import XGrammarCursor

VOCABULARY, NUM_DRAFTS = 4096, 31
TOKENIZER = get_tokenizer(str(NANO))
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
BACKEND = XGrammarGrammarBackend(TOKENIZER, vocab_size=VOCABULARY, model_eos_token_ids=[END], any_whitespace=False)
NESTED = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": False}
KEYS = {"type": "object", "properties": {"price": {"type": "integer"}, "größe": {"enum": ["M", "L"]}}}
STRICT_KEYS = KEYS | {"required": [*KEYS["properties"]], "additionalProperties": False}
# A grammar, its kind, what is written already, and what it forces then, or the beginning of that.
ENDLESS: dict[str, tuple[str, str, str]] = {
    "ebnf": ("ebnf", 'root ::= "a" root', "a" * 400),
    "regex": ("regex", "a{2000000}", "a" * 400),
    "huge regex": ("regex", "a{100000000}", "a" * 400),
    "schema": ("json", json.dumps(NESTED), '{"a": ' * 100),
    "const of 10 kB": ("json", json.dumps({"const": "x y" * 3333}), '"' + "x y" * 200),
    "const of 100 kB": ("json", json.dumps({"const": "x y" * 33333}), '"' + "x y" * 200),
    "const in Greek": ("json", json.dumps({"const": "\u03b1\u03b2\u03b3" * 3333}), '"' + "\u03b1\u03b2\u03b3" * 200),
}


class Calls(NamedTuple):
    """The native calls of a cursor, counted."""

    accept_token: Any
    rollback: Any
    fill_next_token_bitmask: Any
    find_jump_forward_string: Any


def cursor_of(kind: str, grammar: str, written: str = "") -> tuple[XGrammarCursor, TokenText]:
    compiled = getattr(BACKEND, f"dispatch_{kind}")(grammar)
    assert compiled.matcher.accept_string(written) or not written
    text = TokenText(TOKENIZER)
    scratch = torch.empty(1, VOCABULARY // 32, dtype=torch.int32)
    return XGrammarCursor(compiled.matcher, text, frozenset({END}), scratch), text


def counted(cursor: XGrammarCursor) -> Counter[str]:
    counts = Counter[str]()

    def counting(name: str, call: Any) -> Any:
        def counted_call(*args: Any) -> Any:
            counts[name] += 1
            return call(*args)

        return counted_call

    cursor._calls = Calls(*(counting(name, getattr(cursor._calls, name)) for name in Calls._fields))  # type: ignore[assignment]
    return counts


@pytest.mark.parametrize("count", [1, NUM_DRAFTS])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_forced_string_without_end_is_followed_to_the_end_of_the_block(name: str, count: int) -> None:
    kind, grammar, expected = ENDLESS[name]
    cursor, text = cursor_of(kind, grammar)
    counts = counted(cursor)
    forced = list(cursor.forced(count))
    assert forced == text.encode(expected)[: len(forced)]
    assert count // 2 <= len(forced) <= count
    assert counts["fill_next_token_bitmask"] <= count + 1
    assert counts["find_jump_forward_string"] == 0, "it has no bound"
    assert counts["accept_token"] <= (count + 1) * (2 * len(text.probes) + 1)
    assert list(cursor.forced(count)) == forced, "it goes back to where it was"


def test_what_is_encoded_and_remembered_is_bounded() -> None:
    """Every round asks for another suffix of a long string."""
    cursor, text = cursor_of("json", json.dumps({"const": "x y" * 33333}))
    encoded = list[str]()
    encode = text.encode
    text.encode = lambda text: encoded.append(text) or encode(text)  # type: ignore[method-assign,func-returns-value]
    for _ in range(20):
        cursor.advance(cursor.forced(NUM_DRAFTS)[:3])
    assert encoded
    assert max(map(len, encoded)) <= BYTES_PER_TOKEN * (NUM_DRAFTS + 1)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", '{"price": '),
        ('{"pr', 'ice": '),
        ('{"price": 1, ', '"größe": "'),
        ('{"price": 1, "gr', 'öße": "'),
        ('{"price": ', ""),
        ('{"price": 1', ""),
    ],
)
def test_a_forced_string_is_written_as_the_model_writes_it(written: str, expected: str) -> None:
    """Without its last token, which may join with what follows."""
    cursor, text = cursor_of("json", json.dumps(STRICT_KEYS), written)
    assert list(cursor.forced(NUM_DRAFTS)) == text.encode(expected)[:-1]


@pytest.mark.parametrize(
    "pattern", ["[a-z]{2,500}", "[0-9]{3,90}", "[A-Z]{2,50}", "[\u0430-\u044f]{2,50}", "[\u4e00-\u9fff]{2,50}"]
)
def test_no_mask_is_filled_where_there_is_a_choice(pattern: str) -> None:
    """In bounded strings it may take tens of milliseconds."""
    cursor, _ = cursor_of("regex", pattern)
    counts = counted(cursor)
    assert list(cursor.forced(NUM_DRAFTS)) == []
    assert counts["fill_next_token_bitmask"] == 0


def test_what_is_common_to_a_choice_is_forced() -> None:
    """As XGrammar's own search finds it, also where the vocabulary has the tokens of one branch only."""
    for pattern in ("abcabcabc(def|dxy)", "abcabcabcab*", "(small|smell) talk", '"[a-z]{9}"', "nothing(a|b)"):
        cursor, text = cursor_of("regex", pattern)
        theirs = text.encode(cursor._matcher.find_jump_forward_string())[:-1]
        assert list(cursor.forced(NUM_DRAFTS)) == theirs, pattern


def test_nothing_is_forced_at_an_end_that_may_come_nor_where_the_time_is_over() -> None:
    cursor, _ = cursor_of("regex", "ab?")
    cursor.advance(TokenText(TOKENIZER).encode("a"))
    assert list(cursor.forced(NUM_DRAFTS)) == []
    cursor, _ = cursor_of("regex", "a{2000000}")
    assert list(cursor.forced(NUM_DRAFTS, Deadline(-1.0))) == []


def test_a_walk_ends_where_its_time_is_over_but_makes_a_step() -> None:
    tokens: Sequence[int] = TokenText(TOKENIZER).encode("a") * 8
    cursor, _ = cursor_of("regex", "a{2000000}")
    assert cursor.advance(tokens, Deadline(-1.0)) == (1, False)


def test_a_token_is_spelled_in_bytes() -> None:
    text = TokenText(TOKENIZER)
    for written in ("größe и 漢字", '{"a": 1}', "<tool_call>"):
        assert b"".join(map(text.spelling, text.encode(written))) == written.encode()
    assert len(text.probes) == 5


def test_bytes_that_a_row_allows_are_found_at_once() -> None:
    text = TokenText(TOKENIZER)
    mask = np.random.default_rng(0).integers(-(2**31), 2**31, VOCABULARY // 32, dtype=np.int64).astype(np.int32)
    wanted = {token for token in range(VOCABULARY) if len(text.spelling(token)) == 1 and is_allowed(token, mask)}
    found = text.allowed_bytes(mask)
    assert len(found) == len(set(found)) and set(found) == wanted
    assert text.allowed_bytes(np.zeros_like(mask)) == []
