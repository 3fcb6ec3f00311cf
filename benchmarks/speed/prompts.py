"""Prompts of the sweep: nano's held-out ones, family by family in turn, and the same behind a long history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice, zip_longest
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.common.greedy import Prompt, load_prompts
from examples.train_nano.chat_format import END_OF_TURN, sample_prompt
from examples.train_nano.corpus import FAMILIES as ALL_FAMILIES
from examples.train_nano.corpus import held_out_sample

FAMILIES = ("json", "tools", "arith", "code", "prose")
LONGEST = 576
"""Prompts of settings without a context length; with the longest answer they stay within 1k tokens."""
_POOL_PER_FAMILY = 200
# Exchanges of a history come from indices that no prompt uses, and no two histories share any.
_FIRST_EXCHANGE, _EXCHANGES_PER_HISTORY = 10_000, 1_000


class PromptPool:
    """The prompts of a model's tokenizer.

    Args:
        model: checkpoint directory.
    """

    def __init__(self, model: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._prompts = load_prompts(model, _POOL_PER_FAMILY * len(ALL_FAMILIES))

    def take(self, number: int, context: int | None = None) -> list[Prompt]:
        """`number` different prompts, all families in turn; each `context` tokens long if that is given.

        Raises:
            ValueError: if there are not so many.
        """
        chosen = list(islice(in_turn(self._prompts, FAMILIES, context or LONGEST), number))
        if len(chosen) < number:
            raise ValueError(f"{number} prompts of at most {context or LONGEST} tokens asked for, {len(chosen)} found")
        return chosen if context is None else [self._lengthen(*numbered, context) for numbered in enumerate(chosen)]

    def _lengthen(self, index: int, prompt: Prompt, length: int) -> Prompt:
        missing = length - len(prompt.ids)
        history: list[int] = []
        for exchange in self._exchanges(index):
            if len(history) >= missing:
                break
            history += exchange
        # Cut at the front: the prompt follows a whole exchange.
        return Prompt(prompt.name, prompt.family, (*history[len(history) - missing :], *prompt.ids))

    def _exchanges(self, index: int) -> Iterator[list[int]]:
        for number in count(_FIRST_EXCHANGE + index * _EXCHANGES_PER_HISTORY):
            sample = held_out_sample(FAMILIES[number % len(FAMILIES)], number)
            text = f"{sample_prompt(sample)}{sample.answer}{END_OF_TURN}\n"
            yield self._tokenizer.encode(text, add_special_tokens=False).ids


def in_turn(prompts: Sequence[Prompt], families: Sequence[str], longest: int) -> Iterator[Prompt]:
    """Prompts of at most `longest` tokens, one of each family after another, without repeats."""
    unique = {prompt.ids: prompt for prompt in reversed(prompts) if len(prompt.ids) <= longest}
    by_family = [[p for p in reversed(unique.values()) if p.family == family] for family in families]
    return (prompt for prompt in chain.from_iterable(zip_longest(*by_family)) if prompt is not None)
