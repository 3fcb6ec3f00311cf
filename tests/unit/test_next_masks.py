"""Masks of rounds that draft nothing: slow ones keep no round waiting, and no text changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammarBackend

from sglang_orthrus.grammar import next_masks
from sglang_orthrus.grammar.batch import BlockGrammars
from sglang_orthrus.grammar.next_masks import NUM_LIKELIEST, NUM_WATCHED, GrammarWatch
from sglang_orthrus.grammar.slow_masks import MAX_GRAMMARS
from sglang_orthrus.grammar.xgrammar import XGrammarCursor
from tests.unit import test_grammar_cursors as cursors
from tests.unit.test_grammar_cursors import ENCODE, SCHEMA, VOCABULARY, request
from tests.unit.test_mask_widths import block_grammars, next_masks_of
from tests.unit.test_masks import Judged

backend = cursors.backend  # the fixture
# Masks of llguidance are not watched.
with_xgrammar = pytest.mark.parametrize("backend", ["xgrammar"], indirect=True)
Fill = Callable[[torch.Tensor], object]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Helpers fill nothing before it is open."""
    event, copied_fill = threading.Event(), XGrammarCursor.copied_fill

    def gated(cursor: XGrammarCursor) -> Fill:
        fill = copied_fill(cursor)

        def wait_and_fill(mask: torch.Tensor) -> None:
            assert event.wait(60)
            fill(mask)

        return wait_and_fill

    monkeypatch.setattr(XGrammarCursor, "copied_fill", gated)
    return event


def watching(seconds: float = float("inf")) -> BlockGrammars:
    """As on a GPU."""
    grammars = block_grammars(seconds=seconds)
    grammars._next_filler._watch = GrammarWatch(watches_new=True)
    return grammars


def masks_of(grammars: list[Any]) -> torch.Tensor:
    """SGLang's."""
    wanted = torch.full((len(grammars), VOCABULARY // 32), -1, dtype=torch.int32)
    for row, grammar in enumerate(grammars):
        grammar.fill_vocab_mask(wanted, row)
    return wanted


@pytest.mark.parametrize("is_refused", [False, True], ids=["allowed", "refused"])
@pytest.mark.parametrize("skippable", [{0, 1}, {1}, set()], ids=str)
def test_masks_that_are_not_there_in_time_are_waited_for_where_they_refuse_the_choice(
    backend: BaseGrammarBackend, skippable: set[int], is_refused: bool, gate: threading.Event
) -> None:
    grammars, is_xgrammar = watching(0.01), isinstance(backend, XGrammarGrammarBackend)
    world = Judged(backend, 1)
    expected = sorted(skippable) if is_xgrammar else []
    for slot, row in enumerate(world.masks.numpy()):
        allowed = [token for token in range(VOCABULARY) if row[token >> 5] >> (token & 31) & 1]
        refused = next(token for token in range(VOCABULARY) if token not in allowed)
        world.scores[slot, 0, [allowed[0], refused]] = (8.0, 9.0) if is_refused else (9.0, 8.0)
    masks = next_masks_of(grammars, world.reqs, [0, 1], VOCABULARY, skippable)
    assert sorted(masks.late) == expected
    assert [number for number in (0, 1) if bool((masks.host[number] == -1).all())] == expected
    chosen = [tokens[0] for tokens in world.emitted(masks.host)]
    if is_refused:
        gate.set()
    late = grammars.late_masks(masks, {number: chosen[number] for number in masks.late})
    assert (late is not None) == (is_refused and bool(expected))
    assert world.emitted(masks.host if late is None else late.vocab_mask) == world.emitted(world.masks)
    gate.set()


def ranked(logits: Mapping[int, float]) -> tuple[list[float], list[int]]:
    """Tokens by their logits, the largest first."""
    tokens = sorted(logits, key=lambda token: -logits[token])
    return [logits[token] for token in tokens], tokens


@with_xgrammar
@pytest.mark.parametrize(
    ("logits", "wanted"),
    [
        ("z: 9, b: 8, a: 7", "b"),
        ("b: 8, a: 7, z: 9, y: 8", "b"),
        ("z: 9, y: 8", None),
        ("z: 9, b: 8", None),  # what comes behind may be as large
        ("z: 9, b: 8, a: 8, y: 7", None),
        ("z: 9, b: 8, y: 8", None),
        ("z: 9, b: -inf, a: -inf, y: -inf", None),
        ("z: 9, b: nan, a: 7, y: 6", None),
    ],
)
def test_what_is_chosen_instead_of_a_refused_token_needs_no_mask_unless_logits_are_equal(
    backend: BaseGrammarBackend, gate: threading.Event, logits: str, wanted: str | None
) -> None:
    grammars, own = watching(0.01), backend.dispatch_regex("[a-c]{400}")
    of = {letter: ENCODE(letter)[0] for letter in "abyz"}
    found = ranked({of[letter]: float(logit) for letter, logit in (one.split(": ") for one in logits.split(", "))})
    masks = next_masks_of(grammars, [request(own)], [0], VOCABULARY, [0])
    asked = list[tuple[list[int], int]]()

    def likeliest(numbers: Sequence[int], count: int) -> dict[int, tuple[list[float], list[int]]]:
        asked.append((list(numbers), count))
        return {0: found}

    instead = grammars.allowed_instead(masks, {0: of["z"]}, likeliest)
    assert instead == (None if wanted is None else {0: of[wanted]})
    assert asked == [([0], NUM_LIKELIEST)]
    assert grammars.allowed_instead(masks, {0: of["a"]}, likeliest) == {}, "the grammar allows it"
    gate.set()
    masks.late[0].jobs.wait(60.0)
    assert grammars.allowed_instead(masks, {0: of["z"]}, likeliest) is None, "the mask is there"
    assert len(asked) == 1


@with_xgrammar
def test_a_helper_that_is_late_fills_what_was_allowed_then(backend: BaseGrammarBackend, gate: threading.Event) -> None:
    """Its grammar goes on meanwhile."""
    grammars, own = watching(0.01), [backend.dispatch_json(SCHEMA) for _ in range(8)]
    wanted = masks_of(own)
    masks = next_masks_of(grammars, [request(grammar) for grammar in own], range(8), VOCABULARY, range(8))
    assert sorted(masks.late) == list(range(8))
    for grammar in own:
        grammar.accept_token(ENCODE("{")[0])
    gate.set()
    for mask in masks.late.values():
        mask.fill()
    assert torch.equal(masks.host, wanted)
    assert not torch.equal(masks_of(own), wanted)


@pytest.mark.parametrize("skippable", [range(8), ()], ids=["helpers", "here"])
def test_grammars_may_go_on_while_masks_are_filled(
    backend: BaseGrammarBackend, skippable: Sequence[int], gate: threading.Event
) -> None:
    """The scheduler takes in a result meanwhile."""
    grammars, own = watching(600.0), [backend.dispatch_json(SCHEMA) for _ in range(8)]
    wanted = masks_of(own)
    begun = grammars.begin_next_masks([request(grammar) for grammar in own], range(8), VOCABULARY, skippable)
    for grammar in own:
        grammar.accept_token(ENCODE("{")[0])
    gate.set()
    masks = grammars.finish_next_masks(begun)
    assert masks.late == {} and torch.equal(masks.host, wanted)


def test_helpers_that_are_in_time_leave_no_mask_late(backend: BaseGrammarBackend, gate: threading.Event) -> None:
    gate.set()
    grammars = watching(600.0)
    own = [backend.dispatch_json(SCHEMA), backend.dispatch_regex("[a-c]{400}"), backend.dispatch_json(SCHEMA)]
    for skippable in ((0, 1, 2), (1,), ()):
        masks = next_masks_of(grammars, [request(grammar) for grammar in own], range(3), VOCABULARY, skippable)
        assert masks.late == {}
        assert torch.equal(masks.host, masks_of(own))


@with_xgrammar
def test_grammars_that_are_long_fast_are_filled_without_helpers(
    backend: BaseGrammarBackend, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until a mask is slow."""
    monkeypatch.setattr(next_masks, "NUM_WATCHED", 3)
    grammars, reqs = watching(600.0), [request(backend.dispatch_json(SCHEMA))]
    gate.set()
    for _ in range(3):
        assert not next_masks_of(grammars, reqs, [0], VOCABULARY, [0]).late
    gate.clear()
    monkeypatch.setattr(next_masks, "SLOW_SHARE", 0.0)
    assert not next_masks_of(grammars, reqs, [0], VOCABULARY, [0]).late, "a helper would not be done"
    monkeypatch.setattr(next_masks, "WAIT_SHARE", 0.0)
    assert list(next_masks_of(grammars, reqs, [0], VOCABULARY, [0]).late) == [0], "it was slow"
    gate.set()


@with_xgrammar
def test_helpers_that_the_scheduler_held_up_are_not_late(
    backend: BaseGrammarBackend, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It held the interpreter's lock until the time for masks was over."""
    monkeypatch.setattr(next_masks, "WAIT_SHARE", 0.0)
    monkeypatch.setattr(next_masks, "PATIENCE_SECONDS", 60.0)
    own = [backend.dispatch_json(SCHEMA) for _ in range(44)]
    grammars = watching(0.01)
    begun = grammars.begin_next_masks([request(grammar) for grammar in own], range(44), VOCABULARY, range(44))
    gate.set()
    masks = grammars.finish_next_masks(begun)
    assert masks.late == {} and torch.equal(masks.host, masks_of(own))


def test_without_a_limit_all_masks_are_waited_for(backend: BaseGrammarBackend, gate: threading.Event) -> None:
    own = [backend.dispatch_json(SCHEMA) for _ in range(3)]
    masks = next_masks_of(watching(), [request(grammar) for grammar in own], range(3), VOCABULARY, range(3))
    assert masks.late == {}, "no helper is asked"
    assert torch.equal(masks.host, masks_of(own))


@with_xgrammar
def test_copies_of_a_round_take_little_time(
    backend: BaseGrammarBackend, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind that, masks are filled as those that no helper may fill."""
    monkeypatch.setattr(next_masks, "COPY_SECONDS", 0.0)
    own = [backend.dispatch_json(SCHEMA) for _ in range(3)]
    masks = next_masks_of(watching(0.01), [request(grammar) for grammar in own], range(3), VOCABULARY, range(3))
    assert list(masks.late) == [0]
    assert torch.equal(masks.host[1:], masks_of(own)[1:])
    gate.set()


def test_a_grammar_is_watched_until_it_was_fast_for_long() -> None:
    watch = GrammarWatch(watches_new=True)
    assert not watch.includes(None)
    for is_slow in (False, True):
        watch.learn(7, is_slow)
        for _ in range(NUM_WATCHED - (not is_slow)):
            assert watch.includes(7)
            watch.learn(7, False)
        assert not watch.includes(7)
    watch.learn(None, True)
    assert not watch.includes(None)
    assert watch.includes(8)


def test_a_new_grammar_may_be_left_alone_until_it_has_a_slow_mask() -> None:
    watch = GrammarWatch(watches_new=False)
    assert not watch.includes(7)
    watch.learn(7, True)
    for _ in range(NUM_WATCHED):
        assert watch.includes(7)
        watch.learn(7, False)
    assert not watch.includes(7)


@with_xgrammar
def test_a_cpu_has_no_helpers_for_new_grammars(backend: BaseGrammarBackend, gate: threading.Event) -> None:
    own = [backend.dispatch_json(SCHEMA) for _ in range(3)]
    masks = next_masks_of(
        block_grammars(seconds=0.01), [request(grammar) for grammar in own], range(3), VOCABULARY, range(3)
    )
    assert not gate.is_set() and masks.late == {}
    assert torch.equal(masks.host, masks_of(own))


def test_clients_can_not_make_it_grow() -> None:
    watch = GrammarWatch(watches_new=True)
    for key in range(2 * MAX_GRAMMARS):
        for _ in range(NUM_WATCHED):
            watch.learn(key, False)
        watch.learn(0, False)
    assert sum(not watch.includes(key) for key in range(2 * MAX_GRAMMARS)) == MAX_GRAMMARS
    assert not watch.includes(0), "the least recent one is forgotten"


@with_xgrammar
def test_masks_that_nobody_needs_any_more_are_not_filled(
    backend: BaseGrammarBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else slow ones of round after round queue up, and a mask that is waited for is behind them."""
    is_open, filled, copied_fill = threading.Event(), list[int](), XGrammarCursor.copied_fill
    rounds = list[int]()

    def gated(cursor: XGrammarCursor) -> Fill:
        fill, number = copied_fill(cursor), len(rounds)

        def wait_and_fill(mask: torch.Tensor) -> None:
            filled.append(number)
            assert is_open.wait(60)
            fill(mask)

        return wait_and_fill

    monkeypatch.setattr(XGrammarCursor, "copied_fill", gated)
    grammars, numbers = watching(0.01), range(12)
    reqs = [request(backend.dispatch_regex("[a-c]{400}")) for _ in numbers]
    for number in (1, 2):
        rounds.append(number)
        masks = next_masks_of(grammars, reqs, numbers, VOCABULARY, numbers)
        assert sorted(masks.late) == [*numbers]
    is_open.set()
    refused = ENCODE("z")[0]
    late = grammars.late_masks(masks, dict.fromkeys(numbers, refused))
    assert late is not None and torch.equal(late.vocab_mask, masks_of([req.grammar for req in reqs]))
    # Each helper may have begun one.
    assert 0 < filled.count(1) <= next_masks.MAX_HELPERS and filled.count(2) == len(reqs)
