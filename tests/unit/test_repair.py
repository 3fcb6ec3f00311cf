"""The walk of a grammar along a block, on tiny languages: sets of token sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sglang_orthrus.config import DraftMode, slow_mask_seconds
from sglang_orthrus.core import DraftChange
from sglang_orthrus.grammar.cursor import ALL_ALLOWED, Match, allow_only, best_allowed, is_allowed
from sglang_orthrus.grammar.masks import fill_where_refused
from sglang_orthrus.grammar.repair import MAX_REPAIRS, NUM_TRIED, repair_drafts
from sglang_orthrus.grammar.slow_masks import NO_DEADLINE, Deadline
from tests.grammars import judged

STOP = 63
WORDS = 2  # a vocabulary of 64
UNTOUCHED = 0x55555555


class Language:
    """The cursor of a finite language, ends of text included. It is forced to a string where there is no choice."""

    key: int | None = 1

    def __init__(self, texts: Sequence[Sequence[int]], forces: bool = True) -> None:
        self._texts = [[*text, STOP] for text in texts]
        self._forces = forces
        self.past: list[int] = []

    def _next(self, past: Sequence[int]) -> set[int]:
        return {text[len(past)] for text in self._texts if text[: len(past)] == past and len(text) > len(past)}

    def _match(self, tokens: Sequence[int]) -> Match:
        past = list(self.past)
        for index, token in enumerate(tokens):
            if token not in self._next(past):
                return Match(index, False)
            if token == STOP:
                return Match(index + 1, True)
            past.append(token)
        return Match(len(tokens), False)

    def advance(self, tokens: Sequence[int], deadline: Deadline = NO_DEADLINE) -> Match:
        match = self._match(tokens)
        self.past += tokens[: match.num_moved]
        return match

    def rollback(self, count: int) -> None:
        del self.past[len(self.past) - count :]

    def forced(self, count: int, deadline: Deadline = NO_DEADLINE) -> list[int]:
        past = list(self.past)
        while self._forces and len(allowed := self._next(past)) == 1 and STOP not in allowed:
            past += allowed
        return past[len(self.past) :][:count]

    def fill(self, masks: torch.Tensor) -> None:
        masks[0] = mask_of(self._next(self.past))

    def fill_block(self, block: torch.Tensor, masks: torch.Tensor, limit: float = float("inf")) -> int:
        tokens = block.tolist()[1:]
        for row in range(self.num_masks(tokens)):
            masks[row] = mask_of(self._next([*self.past, *tokens[:row]]))
        return len(masks)

    def num_masks(self, tokens: Sequence[int]) -> int:
        """Rows that matter: up to the first token that is refused, or the one that ends the text."""
        match = self._match(tokens)
        return match.length + (not match.ended)


def mask_of(allowed: set[int]) -> torch.Tensor:
    bits = np.zeros(WORDS * 32, np.uint8)
    bits[list(allowed)] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32))


def run(
    cursor: Language,
    drafts: Sequence[int],
    others: Sequence[Sequence[int]] = (),
    max_repairs: int = MAX_REPAIRS,
) -> tuple[list[int], list[DraftChange], int, torch.Tensor]:
    """Choose and fill: the candidates of drafts are they themselves and, at each position, the others."""
    columns = [drafts, *others]
    candidates = np.array(columns, np.int64).T
    masks = torch.full((len(drafts) + 1, WORDS), UNTOUCHED, dtype=torch.int32)
    before = list(cursor.past)
    done = repair_drafts(
        cursor, candidates[:, 0].copy(), candidates, torch.empty(1, WORDS, dtype=torch.int32), max_repairs
    )
    tokens = done.tokens.tolist()
    cursor.fill_block(torch.tensor([0, *tokens]), masks)
    assert cursor.past == before
    assert done.match == cursor._match(tokens)
    return tokens, [DraftChange(change) for change in done.changes], cursor.num_masks(tokens), masks


@pytest.mark.parametrize("max_repairs", [MAX_REPAIRS, 0])
def test_a_block_that_the_grammar_allows_stays(max_repairs: int) -> None:
    tokens, changes, num_masks, masks = run(
        Language([[1, 2, 3, 4], [1, 2, 5, 4]], forces=False), [1, 2, 3], max_repairs=max_repairs
    )
    assert (tokens, set(changes), num_masks) == ([1, 2, 3], {DraftChange.NONE}, 4)
    assert [row.tolist() for row in masks] == [mask_of(allowed).tolist() for allowed in ({1}, {2}, {3, 5}, {4})]


def test_an_illegal_draft_gives_way_to_the_best_candidate_that_is_allowed() -> None:
    tokens, changes, num_masks, _ = run(Language([[1, 7, 3], [1, 8, 3]]), [1, 9, 3], [[0, 5, 0], [0, 8, 0], [0, 7, 0]])
    assert tokens == [1, 8, 3]
    assert changes == [DraftChange.NONE, DraftChange.REPAIRED, DraftChange.NONE]
    assert num_masks == 4


@pytest.mark.parametrize("rank", [1, NUM_TRIED - 1, NUM_TRIED, NUM_TRIED + 5])
def test_the_best_candidate_may_be_far_down(rank: int) -> None:
    others = [[0, 20 + index] for index in range(rank - 1)]
    language = Language([[1, 7], [1, 40], [1, 41]], forces=False)
    assert run(language, [1, 9], [*others, [0, 41], [0, 40]])[0] == [1, 41]


def test_without_a_candidate_the_lowest_id_is_taken() -> None:
    assert run(Language([[1, 40], [1, 33], [1, 50]]), [1, 9])[0] == [1, 33]


def test_a_forced_string_is_drafted_where_a_draft_is_illegal_and_later_drafts_keep_their_places() -> None:
    tokens, changes, _, _ = run(Language([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]), [9, 9, 9, 9, 6])
    assert tokens == [1, 2, 3, 4, 6]
    assert changes == [DraftChange.FORCED] * 4 + [DraftChange.NONE]


def test_a_forced_string_is_cut_at_the_end_of_the_block() -> None:
    tokens, changes, num_masks, _ = run(Language([[1, 2, 3, 4, 5]]), [9, 9])
    assert (tokens, changes, num_masks) == ([1, 2], [DraftChange.FORCED] * 2, 3)


def test_the_walk_ends_at_the_end_of_the_text() -> None:
    tokens, _, num_masks, masks = run(Language([[1]]), [1, STOP, 7, 7])
    assert (tokens, num_masks) == ([1, STOP, 7, 7], 2)
    assert (masks[2:] == UNTOUCHED).all()
    tokens, changes, num_masks, masks = run(Language([[1]]), [1, 7, 7])
    assert (tokens, changes[1], num_masks) == ([1, STOP, 7], DraftChange.REPAIRED, 2)
    assert (masks[2:] == UNTOUCHED).all()


def test_a_dead_end_leaves_the_rest_as_it_is() -> None:
    cursor = Language([[1, 2]])
    cursor.past = [9]
    tokens, changes, num_masks, masks = run(cursor, [1, 2])
    assert (tokens, set(changes), num_masks) == ([1, 2], {DraftChange.NONE}, 1)
    assert masks[0].tolist() == [0, 0]


@pytest.mark.parametrize("draft", [50, 9])
def test_a_token_that_the_engine_refuses_ends_the_walk_if_its_mask_allows_no_other(draft: int) -> None:
    """llguidance does that where a special token spells a forced string."""

    class Liar(Language):
        def fill(self, masks: torch.Tensor) -> None:
            masks[0] = mask_of({50})

    cursor, drafts = Liar([[1, 2, 3, 4]], forces=False), np.array([1, draft, 3, 9, 9])
    scratch = torch.empty(1, WORDS, dtype=torch.int32)
    tokens = repair_drafts(cursor, drafts, drafts[:, None], scratch).tokens
    assert tokens.tolist() == [1, 50, 3, 9, 9]
    assert cursor.past == []


def test_off_changes_nothing() -> None:
    tokens, changes, num_masks, _ = run(Language([[1, 2, 3]]), [1, 9, 9], max_repairs=0)
    assert (tokens, set(changes), num_masks) == ([1, 9, 9], {DraftChange.NONE}, 2)


@pytest.mark.parametrize("max_repairs", [MAX_REPAIRS, 0])
@pytest.mark.parametrize("seed", range(40))
def test_every_draft_that_can_be_accepted_has_its_mask(max_repairs: int, seed: int) -> None:
    """Random languages and drafts: up to the first illegal draft, every row says what the language allows there."""
    rng = random.Random(seed)
    texts = [[rng.randrange(4) for _ in range(rng.randrange(1, 14))] for _ in range(12)]
    cursor = Language(texts, forces=rng.random() < 0.5)
    drafts = [rng.randrange(4) for _ in range(12)]
    tokens, _, num_masks, masks = run(
        cursor, drafts, [[rng.randrange(4) for _ in drafts] for _ in range(3)], max_repairs
    )
    assert (masks[num_masks:] == UNTOUCHED).all()
    past: list[int] = []
    for row, token in enumerate([*tokens, None]):
        allowed = cursor._next(past)
        assert masks[row].tolist() == mask_of(allowed).tolist(), f"row {row} of {tokens}"
        if token not in allowed or token == STOP:
            break
        past.append(token)


@pytest.mark.parametrize("max_repairs", [MAX_REPAIRS, 0])
@pytest.mark.parametrize("seed", range(60))
def test_masks_where_a_choice_is_refused_decide_as_all_masks_do(max_repairs: int, seed: int) -> None:
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    cursor = Language([[rng.randrange(4) for _ in range(rng.randrange(1, 14))] for _ in range(12)], forces=seed % 2 > 0)
    text = rng.choice(cursor._texts)
    drafts = [rng.randrange(4) if rng.random() < 0.2 else (text + [0] * 12)[index] for index in range(12)]
    tokens, _, num_masks, masks = run(cursor, drafts, max_repairs=max_repairs)
    masks[num_masks:] = ALL_ALLOWED
    scores = noise.random((13, WORDS * 32))
    for row, token in enumerate(tokens):
        scores[row, token] += rng.random() < 0.9  # a good drafter
        scores[row, rng.randrange(5)] += rng.random() < 0.3
    few = torch.full_like(masks, ALL_ALLOWED)
    num_touched, num_right = fill_where_refused(cursor, np.array(tokens), scores.argmax(axis=1), few)
    assert cursor.past == []
    assert num_right == 13
    assert (few[num_touched:] == ALL_ALLOWED).all()
    assert judged(tokens, scores, few, STOP) == judged(tokens, scores, masks, STOP)
    assert (few != ALL_ALLOWED).any(dim=1).sum() <= num_masks + 1


def test_no_mask_is_filled_where_all_choices_are_allowed() -> None:
    cursor = Language([[1, 2, 3, 4], [1, 2, 5, 4]], forces=False)
    masks = torch.full((4, WORDS), ALL_ALLOWED, dtype=torch.int32)
    assert fill_where_refused(cursor, np.array([1, 2, 3]), np.array([1, 2, 5, 9]), masks) == (3, 4)
    assert (masks == ALL_ALLOWED).all()


def test_repairs_are_few() -> None:
    texts = [[first] * 6 for first in (1, 2)]
    language = Language([*texts, [1, 2, 1, 2, 1, 2], [1, 1, 2, 2, 1]], forces=False)
    tokens, changes, num_masks, _ = run(language, [9] * 6, max_repairs=2)
    assert changes.count(DraftChange.REPAIRED) == 2
    assert (tokens[2:], num_masks) == ([9] * 4, 3)


def test_bits_of_masks() -> None:
    masks = torch.stack([mask_of({0, 31}), mask_of({32, 63}), mask_of(set())]).numpy()
    assert [token for token in range(64) if is_allowed(token, masks[0])] == [0, 31]
    assert [token for token in range(64) if is_allowed(token, masks[1])] == [32, 63]
    for token in (0, 31, 32, 63):
        only = masks.copy()[1]
        allow_only(token, only)
        assert [other for other in range(64) if is_allowed(other, only)] == [token]
    assert best_allowed(np.array([5, 63, 32]), masks[1]) == 63
    assert best_allowed(np.array([5]), masks[0]) == 0
    assert best_allowed(np.array([5]), mask_of({31}).numpy()) == 31
    assert best_allowed(np.array([5]), masks[2]) is None


def test_the_mode_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORTHRUS_GRAMMAR_DRAFT", raising=False)
    assert DraftMode.from_env() is DraftMode.REPAIR
    for mode in DraftMode:
        monkeypatch.setenv("ORTHRUS_GRAMMAR_DRAFT", mode.value)
        assert DraftMode.from_env() is mode
    monkeypatch.setenv("ORTHRUS_GRAMMAR_DRAFT", "on")
    with pytest.raises(ValueError, match=r"ORTHRUS_GRAMMAR_DRAFT=on: use one of repair, off"):
        DraftMode.from_env()


def test_what_is_slow_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORTHRUS_SLOW_MASK_MS", raising=False)
    assert slow_mask_seconds() == 0.01
    assert slow_mask_seconds(is_cpu=True) == 0.1
    monkeypatch.setenv("ORTHRUS_SLOW_MASK_MS", "0")
    assert slow_mask_seconds() == slow_mask_seconds(is_cpu=True) == 0
    for value in ("-1", "nan", "soon"):
        monkeypatch.setenv("ORTHRUS_SLOW_MASK_MS", value)
        with pytest.raises(ValueError, match=f"ORTHRUS_SLOW_MASK_MS={value}: use milliseconds, 0 or more"):
            slow_mask_seconds()
