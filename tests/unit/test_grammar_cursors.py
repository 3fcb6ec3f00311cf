"""Both engines under the walk, on nano's tokenizer: the masks are SGLang's own, and the grammar stays where it was."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, BaseGrammarObject
from sglang.srt.constrained.llguidance_backend import GuidanceBackend, GuidanceGrammar
from sglang.srt.constrained.reasoner_grammar_backend import ReasonerGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend
from sglang.srt.speculative.spec_utils import GrammarTree, generate_token_bitmask
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.config import DraftMode
from sglang_orthrus.core import DraftChange
from sglang_orthrus.grammar.batch import BlockGrammars, CandidatesCopy, RepairedDrafts
from sglang_orthrus.grammar.cursor import Cursor, Match, is_allowed
from sglang_orthrus.grammar.cursors import cursor_of, is_walkable
from sglang_orthrus.grammar.reasoning import ReasonerCursor, leaves_block_alone
from sglang_orthrus.grammar.repair import MAX_REPAIRS, Repair, repair_drafts
from sglang_orthrus.grammar.token_text import TokenText
from sglang_orthrus.metrics import GrammarMetrics

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {
            "größe": {"enum": ["klein", "groß"]},
            "shipping_method": {"type": "string", "maxLength": 8},
            "units": {"type": "integer"},
        },
        "required": ["größe", "shipping_method", "units"],
        "additionalProperties": False,
    }
)
VOCABULARY = 4096
WIDTH = 32
TOKENIZER = get_tokenizer(str(NANO))
TEXT = TokenText(TOKENIZER)
ENCODE = TEXT.encode
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
THINK_END = TOKENIZER.convert_tokens_to_ids("</think>")


def limited_grammar(max_lexer_states: int) -> GuidanceGrammar:
    """One of llguidance's for which the engine may make so many states: a mask of it takes more than a hundred."""
    from llguidance import LLMatcher, LLParserLimits

    backend = GuidanceBackend(TOKENIZER, any_whitespace=False, n_vocab=VOCABULARY, eos_token_ids=[END])
    compiled = backend.dispatch_regex("([a-z ]*a[a-z ]{0,300}b[a-z ]{0,300}c)+")
    tokenizer, text = compiled.llguidance_tokenizer, compiled.serialized_grammar
    matcher = LLMatcher(tokenizer, text, limits=LLParserLimits(max_lexer_states=max_lexer_states))
    return GuidanceGrammar(tokenizer, text, ll_matcher=matcher)


@pytest.fixture(scope="module", params=["xgrammar", "llguidance"])
def backend(request: pytest.FixtureRequest) -> BaseGrammarBackend:
    if request.param == "xgrammar":
        return XGrammarGrammarBackend(TOKENIZER, vocab_size=VOCABULARY, model_eos_token_ids=[END], any_whitespace=False)
    return GuidanceBackend(TOKENIZER, any_whitespace=False, n_vocab=VOCABULARY, eos_token_ids=[END])


def allowed_by_sglang(grammar: BaseGrammarObject, tokens: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
    """SGLang's own masks of a chain, [len(tokens) + 1, W]."""
    tree = GrammarTree.from_linear_chain(torch.tensor([[0, *tokens]]))
    masks, _ = generate_token_bitmask([SimpleNamespace(grammar=grammar)], *tree.resolve(), VOCABULARY)
    assert masks is not None
    return masks


def scratch() -> torch.Tensor:
    return torch.empty(1, VOCABULARY // 32, dtype=torch.int32)


def walked(grammar: BaseGrammarObject, drafts: Sequence[int], max_repairs: int = MAX_REPAIRS) -> Repair:
    """Walk a block, and check its masks and that the grammar is where it was."""
    rng = np.random.default_rng(0)
    candidates = rng.integers(0, VOCABULARY, (WIDTH - 1, 16))
    candidates[: len(drafts), 0] = drafts[: WIDTH - 1]
    masks = torch.full((WIDTH, VOCABULARY // 32), -1, dtype=torch.int32)
    before = allowed_by_sglang(grammar, candidates[:, 0])
    cursor = cursor_of(grammar, TEXT, scratch())
    done = repair_drafts(cursor, candidates[:, 0].copy(), candidates, scratch(), max_repairs)
    assert torch.equal(allowed_by_sglang(grammar, candidates[:, 0]), before)
    cursor.fill_block(block_of(done.tokens), masks)
    assert torch.equal(allowed_by_sglang(grammar, candidates[:, 0]), before)
    assert done.match == match_of(cursor, done.tokens.tolist())
    num_masks = num_masks_of(done.match)
    assert torch.equal(masks[:num_masks], allowed_by_sglang(grammar, done.tokens)[:num_masks])
    return done


def match_of(cursor: Cursor, tokens: Sequence[int]) -> Match:
    match = cursor.advance(tokens)
    cursor.rollback(match.num_moved)
    return match


def num_masks_of(match: Match) -> int:
    """Rows that matter: up to the first token that is refused, or the one that ends the text."""
    return match.length + (not match.ended)


def block_of(tokens: Sequence[int] | NDArray[np.int64]) -> torch.Tensor:
    return torch.tensor([0, *tokens])


@pytest.mark.parametrize("max_repairs", [MAX_REPAIRS, 0])
@pytest.mark.parametrize("num_given", [0, 1, 5, 11])
def test_masks_are_those_of_sglang(backend: BaseGrammarBackend, num_given: int, max_repairs: int) -> None:
    """From several states, for a good block, a spoilt one and noise."""
    separators = (", ", ": ") if isinstance(backend, XGrammarGrammarBackend) else (",", ":")
    value = {"größe": "groß", "shipping_method": "by sea", "units": 12}
    good = [*ENCODE(json.dumps(value, ensure_ascii=False, separators=separators)), END]
    spoilt = [token if index % 5 else 17 for index, token in enumerate(good, start=1)]
    for drafts in (good, spoilt, []):
        grammar = backend.dispatch_json(SCHEMA)
        for token in good[:num_given]:
            grammar.accept_token(token)
        walked(grammar, drafts[num_given:], max_repairs)


def test_a_forced_key_is_drafted_as_the_model_writes_it(backend: BaseGrammarBackend) -> None:
    grammar = backend.dispatch_json(SCHEMA)
    done = walked(grammar, [])
    num_forced = int((done.changes != DraftChange.FORCED).argmax())
    forced = done.tokens[:num_forced].tolist()
    assert num_forced > 1
    text = '{"größe": "' if isinstance(backend, XGrammarGrammarBackend) else '{"größe":"'
    assert list(ENCODE(text))[: len(forced)] == forced


def test_every_grammar_of_ours_is_walked(backend: BaseGrammarBackend) -> None:
    """Regular expressions and EBNF, from the start to the end, with drafts that are noise."""
    ebnf = 'root ::= "SELECT " column " FROM users;"\ncolumn ::= "id" | "name"'
    for grammar in (backend.dispatch_regex(r"(yes|no), because [a-z]{3,12}\."), backend.dispatch_ebnf(ebnf)):
        for _ in range(40):
            if grammar.is_terminated():
                break
            done = walked(grammar, [])
            token = int(done.tokens[0])
            grammar.accept_token(token)
            if token == END:
                break
        else:
            raise AssertionError("drafts of a bounded grammar must come to an end")


def test_a_terminated_grammar_is_left_alone(backend: BaseGrammarBackend) -> None:
    grammar = backend.dispatch_regex("a")
    assert is_walkable(grammar)
    for token in (*ENCODE("a"), END):
        grammar.accept_token(token)
    assert not is_walkable(grammar)


def test_a_grammar_that_failed_is_left_alone(backend: BaseGrammarBackend) -> None:
    grammar = backend.dispatch_regex("a")
    with pytest.raises(ValueError):
        grammar.accept_token(ENCODE("b")[0])
    if not isinstance(backend, XGrammarGrammarBackend):
        assert not is_walkable(grammar)


def test_a_special_token_that_spells_a_forced_string() -> None:
    """The mask of llguidance allows `</tool_call>` there, and then it refuses the token for good; not in a walk."""
    tags = {"begin": "<tool_call>", "schema": {"type": "boolean"}, "end": "\n</tool_call>"}
    tag = json.dumps({"type": "structural_tag", "structures": [tags], "triggers": ["<tool_call>"]})
    grammar = GuidanceBackend(TOKENIZER, n_vocab=VOCABULARY, eos_token_ids=[END]).dispatch_structural_tag(tag)
    for token in ENCODE("<tool_call>true\n"):
        grammar.accept_token(token)
    assert is_walkable(grammar)
    special = TOKENIZER.convert_tokens_to_ids("</tool_call>")
    candidates = np.full((WIDTH - 1, 2), special)
    masks = torch.full((WIDTH, VOCABULARY // 32), -1, dtype=torch.int32)
    for max_repairs in (MAX_REPAIRS, 0):
        cursor = cursor_of(grammar, TEXT, scratch())
        done = repair_drafts(cursor, candidates[:, 0].copy(), candidates, scratch(), max_repairs)
        cursor.fill_block(block_of(done.tokens), masks)
        assert is_walkable(grammar), max_repairs


def reasoner(grammar: BaseGrammarObject) -> ReasonerGrammarObject:
    waiting = ReasonerGrammarObject(grammar, [THINK_END])
    waiting.maybe_init_reasoning(True)
    return waiting


def reasoner_cursor(grammar: ReasonerGrammarObject) -> ReasonerCursor:
    """Also past the end of the reasoning, where `cursor_of` takes a faster one."""
    return ReasonerCursor(grammar, partial(cursor_of, text=TEXT, scratch=scratch()), scratch())


@pytest.mark.parametrize("max_repairs", [MAX_REPAIRS, 0])
def test_a_reasoning_ends_inside_the_block(backend: BaseGrammarBackend, max_repairs: int) -> None:
    grammar = reasoner(backend.dispatch_json(SCHEMA))
    thoughts = [*ENCODE("So it is large."), END, THINK_END]
    done = walked(grammar, thoughts, max_repairs)
    assert done.tokens[: len(thoughts)].tolist() == thoughts
    if max_repairs:
        assert done.changes[len(thoughts)] == DraftChange.FORCED
        assert TOKENIZER.decode(done.tokens[len(thoughts) : len(thoughts) + 1]).startswith("{")


def test_a_reasoning_that_goes_on_costs_no_walk(backend: BaseGrammarBackend) -> None:
    grammar = reasoner(backend.dispatch_json(SCHEMA))
    assert leaves_block_alone(grammar, np.array([5, 6, 7]))
    assert not leaves_block_alone(grammar, np.array([5, THINK_END, 7]))
    grammar.accept_token(THINK_END)
    assert not leaves_block_alone(grammar, np.array([5, 6, 7]))
    walked(grammar, [])


def test_a_draft_is_asked_for_as_a_mask_would_answer(backend: BaseGrammarBackend) -> None:
    """For every token, along a text, both ends included.

    Where llguidance forces a string, its mask allows the string's first token only, and it follows parts of that one.
    """
    is_xgrammar = isinstance(backend, XGrammarGrammarBackend)
    grammar, mask = backend.dispatch_regex("(yes|no), because [a-z]{3,12}"), scratch()
    waiting = reasoner(grammar)
    waiting.accept_token(THINK_END)
    for given in (*ENCODE("yes, because it"), *ENCODE("rains"), None):
        for cursor in (cursor_of(grammar, TEXT, scratch()), reasoner_cursor(waiting)):
            grammar.fill_vocab_mask(mask, 0)
            allowed = {token for token in range(VOCABULARY) if is_allowed(token, mask.numpy()[0])}
            followed = {token for token in range(VOCABULARY) if follows(cursor, token)}
            if followed != allowed:
                assert not is_xgrammar
                (forced,) = allowed
                assert all(TOKENIZER.decode([forced]).startswith(TOKENIZER.decode([token])) for token in followed)
        if given is not None:
            grammar.accept_token(given)
    for cursor in (cursor_of(grammar, TEXT, scratch()), reasoner_cursor(waiting)):
        assert cursor.advance([END, END]) == cursor.advance([END]) == (1, True), "it stays before the end"


def follows(cursor: Cursor, token: int) -> bool:
    return match_of(cursor, [token]).length == 1


def request(grammar: BaseGrammarObject | None, finished: bool = False) -> Any:
    return SimpleNamespace(grammar=grammar, finished=lambda: finished)


def test_a_batch_is_walked_in_parallel_and_a_grammar_without_a_say_allows_all(backend: BaseGrammarBackend) -> None:
    metrics = GrammarMetrics(log_interval=100, model_name=None)
    grammars = BlockGrammars(DraftMode.REPAIR, WIDTH, "cpu", TOKENIZER, metrics)
    ended = backend.dispatch_regex("a")
    for token in (*ENCODE("a"), END):
        ended.accept_token(token)
    json_grammar, regex = backend.dispatch_json(SCHEMA), backend.dispatch_regex("[a-c]{40}")

    def constrain(reqs: Sequence[Any]) -> None:
        rows = grammars.rows_of(reqs)
        candidates = torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, (len(rows), WIDTH - 1, 16)))
        repaired = grammars.repair(reqs, rows, CandidatesCopy(candidates), VOCABULARY)
        assert torch.arange(len(reqs))[repaired.rows].tolist() == rows
        all_masks = grammars.masks(repaired).mask.vocab_mask
        assert all_masks.shape == (len(rows) * WIDTH, VOCABULARY // 32)
        for slot, row in enumerate(rows):
            masks = all_masks[slot * WIDTH : (slot + 1) * WIDTH]
            grammar = reqs[row].grammar
            if grammar.is_terminated():
                assert (masks == -1).all()
                assert torch.equal(repaired.tokens[slot], candidates[slot, :, 0])
            else:
                drafts = repaired.tokens[slot].tolist()
                num_masks = num_masks_of(match_of(cursor_of(grammar, TEXT, scratch()), drafts))
                assert torch.equal(masks[:num_masks], allowed_by_sglang(grammar, drafts)[:num_masks])

    constrain([request(None), request(json_grammar), request(regex), request(json_grammar.copy(), finished=True)])
    constrain([request(ended), request(json_grammar)])
    constrain([request(regex), request(json_grammar), request(None), request(ended), request(regex.copy())])


def test_what_grammars_force_is_counted_before_anything_is_drafted(
    backend: BaseGrammarBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = GrammarMetrics(log_interval=100, model_name=None)
    ended, begun, regex = backend.dispatch_regex("a"), backend.dispatch_json(SCHEMA), backend.dispatch_regex("[a-c]*")
    for token in (*ENCODE("a"), END):
        ended.accept_token(token)
    for token in ENCODE('{"'):
        begun.accept_token(token)
    reqs = [request(None), request(begun), request(regex), request(ended), request(begun.copy(), finished=True)]
    masks = allowed_by_sglang(begun, [])

    def counted(mode: DraftMode, most: int, seconds: float) -> list[int]:
        monkeypatch.setattr("sglang_orthrus.grammar.batch.MAX_FORCED_SECONDS", seconds)
        return BlockGrammars(mode, WIDTH, "cpu", TOKENIZER, metrics).num_forced(reqs, VOCABULARY, most)

    counts = {(mode, most): counted(mode, most, math.inf) for mode in DraftMode for most in (31, 1)}
    assert torch.equal(allowed_by_sglang(begun, []), masks)
    # "größe" and what follows it, but for the last token.
    [forced] = {counts[DraftMode.REPAIR, 31][1]}
    assert 1 < forced <= len(ENCODE('größe": "'))
    assert counts[DraftMode.REPAIR, 31] == [0, forced, 0, 0, 0]
    assert counts[DraftMode.REPAIR, 1] == [0, 1, 0, 0, 0]
    assert counts[DraftMode.OFF, 31] == [0] * 5, "nothing is drafted because it is forced"
    if isinstance(backend, XGrammarGrammarBackend):
        assert counted(DraftMode.REPAIR, 31, 0.0) == [0] * 5, "no time to look"


def test_what_follows_the_end_of_a_text_leaves_the_grammar_whole(backend: BaseGrammarBackend) -> None:
    """A round adds one token, and llguidance has not terminated at the end of a text that might have gone on."""
    tags = {"begin": "<tool_call>", "schema": {"type": "boolean"}, "end": "</tool_call>"}
    tag = json.dumps({"type": "structural_tag", "structures": [tags], "triggers": ["<tool_call>"]})
    grammar = backend.dispatch_structural_tag(tag)
    metrics = GrammarMetrics(log_interval=100, model_name=None)
    grammars = BlockGrammars(DraftMode.REPAIR, WIDTH, "cpu", TOKENIZER, metrics)
    text = [*ENCODE("None of it."), END]
    candidates = torch.tensor([*text, *[7] * (WIDTH - 1 - len(text))])[None, :, None]

    def repaired() -> RepairedDrafts:
        return grammars.repair([request(grammar)], [0], CandidatesCopy(candidates), VOCABULARY)

    masks = grammars.masks(repaired()).mask.vocab_mask.numpy()
    behind = [token for token in range(VOCABULARY) if masks[len(text)][token >> 5] >> (token & 31) & 1]
    assert behind == [END]
    for token in [*text, END]:
        if not grammar.is_terminated():
            grammar.accept_token(token)
    assert grammar.is_terminated()
    grammars.masks(repaired())
    assert (masks == -1).all()


def test_no_request_is_constrained_twice_or_past_its_end() -> None:
    metrics = GrammarMetrics(log_interval=100, model_name=None)
    grammars = BlockGrammars(DraftMode.OFF, WIDTH, "cpu", TOKENIZER, metrics)
    assert grammars.rows_of([request(None), request(BaseGrammarObject()), request(BaseGrammarObject(), True)]) == [1]
    assert grammars.num_candidates == 1


def test_xgrammar_keeps_the_interpreters_lock_along_a_walk() -> None:
    """Another thread that wants it all the time does not run; it may once somebody has had it for a minute."""
    backend = XGrammarGrammarBackend(TOKENIZER, vocab_size=VOCABULARY, model_eos_token_ids=[END], any_whitespace=False)
    grammar = backend.dispatch_regex("a*")
    cursor, tokens = cursor_of(grammar, TEXT, scratch()), [ENCODE("a")[0]] * 100
    turns, over = [0], threading.Event()

    def work() -> None:
        while not over.is_set():
            turns[0] += 1
            time.sleep(0)

    def turns_during(walk: Callable[[], object]) -> int:
        before = turns[0]
        walk()
        return turns[0] - before

    interval, other = sys.getswitchinterval(), threading.Thread(target=work)
    sys.setswitchinterval(60)
    other.start()
    try:
        time.sleep(0.01)
        assert turns_during(lambda: time.sleep(0.01)), "it runs wherever it can"
        assert turns_during(lambda: cursor.advance(tokens)) == 0
        assert turns_during(lambda: cursor.forced(31)) == 0
        assert turns_during(lambda: cursor.rollback(len(tokens))) == 0
    finally:
        over.set()
        sys.setswitchinterval(interval)
        other.join()
