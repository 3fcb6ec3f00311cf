"""A small tokenizer in a large vocabulary, so that grammars cost what they cost with a large one.

Ids without a text will not do: XGrammar takes them for special tokens and looks through all of them for every token
that it is asked for. With 147,840 of them that takes 34 us in place of 1.
"""

from __future__ import annotations

import random
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel


def widened_tokenizer(content: dict[str, Any], size: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer with made-up words up to `size`, which no merge leads to: text is encoded as before.

    content: of a tokenizer.json; becomes what is returned.
    """
    vocabulary, rng = content["model"]["vocab"], random.Random(0)
    spell = ByteLevel(add_prefix_space=False, use_regex=False)
    # Added tokens that are not in there would be moved behind the words.
    vocabulary |= {token["content"]: token["id"] for token in content["added_tokens"]}
    num_tokens = len(vocabulary)
    while num_tokens < size:
        word = _made_up(rng)
        spelt = spell.pre_tokenize_str(word)[0][0]
        if spelt not in vocabulary:
            vocabulary[spelt] = num_tokens
            num_tokens += 1
    return content


def _made_up(rng: random.Random) -> str:
    """A piece of text as large vocabularies have them: words in several scripts and cases, numbers, punctuation."""
    letters = rng.choice(("etaoinshrdlucmfwypvbgk",) * 6 + ("абвгдежзиклмнопрст", "的一是不了人我在有他", "éüößçñ"))
    word = "".join(rng.choices(letters, k=rng.randint(2, 9)))
    form = rng.random()
    if form < 0.5:
        return f" {word}"
    if form < 0.6:
        return word.capitalize()
    if form < 0.65:
        return "".join(rng.choices('{}[]():;,."<>/=+-*#@_ \n', k=rng.randint(2, 5)))
    if form < 0.7:
        return f'{rng.choice(("", " "))}"{word}'
    return word if form < 0.98 else str(rng.randint(0, 999999))
