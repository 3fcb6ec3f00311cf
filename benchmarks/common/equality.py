"""When two greedy generations count as equal. Pure: no server, no model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

NEAR_TIE = 1e-4
"""A top-2 logit gap below this may be decided either way in fp32.

A row computed alone and in a block of 32 differs by about 2e-5 there.
"""
PROMPTS_PER_EXCUSE = 200

Ranking = Sequence[tuple[float, int]]
"""(logprob, id) of the best tokens for one place, best first."""


@dataclass(frozen=True)
class Answer:
    """What a server gave for one prompt.

    Attributes:
        tokens: ids, the end of text included.
        rounds: verify passes; 0 without speculation.
        ranked: per token the best (logprob, id) pairs in its place, best first; empty if they were not asked for.
    """

    tokens: tuple[int, ...]
    rounds: int
    ranked: tuple[Ranking, ...] = ()

    def gap_after(self, common: Sequence[int]) -> float:
        """The top-2 gap of the token that follows the given beginning of this answer."""
        (best, _), (second, _), *_ = self.ranked[len(common)]
        return best - second


@dataclass(frozen=True)
class Divergence:
    """The first place where two answers differ; None stands for the end of the text."""

    index: int
    expected: int | None
    actual: int | None
    gap: float
    tie_below: float = NEAR_TIE

    @property
    def near_tie(self) -> bool:
        """Whether rounding alone can explain it."""
        return self.gap < self.tie_below


class Rounds(StrEnum):
    """How an answer's number of rounds compares with the reference loop's."""

    EQUAL = "equal"
    NEAR_TIE = "near_tie"  # differs, and a draft of the reference was nearly undecided
    INCOMPARABLE = "incomparable"  # the tokens differ, which is judged by itself
    DIFFERENT = "different"


def find_divergence(
    expected: Sequence[int],
    actual: Sequence[int],
    gap_after: Callable[[Sequence[int]], float],
    tie_below: float = NEAR_TIE,
) -> Divergence | None:
    """The first difference of two token sequences, or None.

    Args:
        gap_after: the AR top-2 gap of the token that follows the given common beginning.
        tie_below: the gap below which rounding decides.
    """
    common = 0
    while common < min(len(expected), len(actual)) and expected[common] == actual[common]:
        common += 1
    if common == len(expected) == len(actual):
        return None
    if common in (len(expected), len(actual)):
        # One text ended where the other went on after equal tokens: no near tie can explain that.
        return Divergence(common, _at(expected, common), _at(actual, common), math.inf, tie_below)
    gap = gap_after(expected[:common])
    return Divergence(common, expected[common], actual[common], gap, tie_below)


def compare_rounds(
    reference_tokens: Sequence[int],
    reference_rounds: int,
    draft_gaps: Sequence[float],
    answer: Answer,
    tie_below: float = NEAR_TIE,
) -> Rounds:
    """Compare the rounds of an answer with those of the reference loop on the same prompt."""
    if tuple(reference_tokens) != answer.tokens:
        return Rounds.INCOMPARABLE
    if reference_rounds == answer.rounds:
        return Rounds.EQUAL
    return Rounds.NEAR_TIE if min(draft_gaps, default=math.inf) < tie_below else Rounds.DIFFERENT


def gap_differences(alone: Sequence[Ranking], in_block: Sequence[Ranking]) -> list[float]:
    """How much the top-2 gap of the same row changes when it is computed in a block instead of alone.

    Both sequences rank the same places, with equal text before each. A place whose two best tokens alone are not
    among those listed for the block is left out.
    """
    differences = []
    for (best, second, *_), block in zip(alone, in_block, strict=True):
        logprobs = {token: logprob for logprob, token in block}
        if best[1] in logprobs and second[1] in logprobs:
            differences.append(abs((best[0] - second[0]) - (logprobs[best[1]] - logprobs[second[1]])))
    return differences


@dataclass
class Tally:
    """Verdicts over all prompts of one setting.

    Attributes:
        prompts_per_excuse: one near tie is tolerated in so many prompts; any number if None.
    """

    prompts_per_excuse: int | None = PROMPTS_PER_EXCUSE
    prompts: int = 0
    divergences: dict[str, Divergence] = field(default_factory=dict)
    rounds: Counter[Rounds] = field(default_factory=Counter)

    def add(self, name: str, divergence: Divergence | None, rounds: Rounds | None = None) -> None:
        """Count one prompt."""
        self.prompts += 1
        if divergence is not None:
            self.divergences[name] = divergence
        if rounds is not None:
            self.rounds[rounds] += 1

    @property
    def excuses_left(self) -> float:
        """How many more near ties would be tolerated, at least one in all."""
        if self.prompts_per_excuse is None:
            return math.inf
        return math.ceil(self.prompts / self.prompts_per_excuse) - len(self.divergences)

    @property
    def passed(self) -> bool:
        """Whether all differences are near ties, few enough, and no number of rounds is unexplained."""
        return (
            all(divergence.near_tie for divergence in self.divergences.values())
            and self.excuses_left >= 0
            and not self.rounds[Rounds.DIFFERENT]
        )


def _at(tokens: Sequence[int], index: int) -> int | None:
    return tokens[index] if index < len(tokens) else None
