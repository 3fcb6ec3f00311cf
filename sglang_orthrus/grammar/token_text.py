"""How a tokenizer writes text: strings to ids, as a model would, and ids to bytes."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sglang_orthrus.grammar.cursor import Ids, Masks

# A forced string is followed for so many bytes per token that is wanted. Tokens of Qwen3 have 4.5 in the mean.
BYTES_PER_TOKEN = 16
# With texts of at most 16 bytes for each of 32 tokens, these take some 2 kB each, 16 MB in all.
NUM_REMEMBERED = 8192

_utf8 = getincrementaldecoder("utf-8")
_BYTES = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
# Small letters, capitals, digits, Cyrillic, Chinese.
_PROBED = (b"et", b"ET", b"01", b"\xd0\xd1", b"\xe4\xe5")


class TokenText:
    """A tokenizer's spellings.

    Args:
        tokenizer: Hugging Face's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Hugging Face's own `encode` sets options on the tokenizer first, which threads must not do at once.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        # Grammars force the same strings over and over.
        self._remembered = lru_cache(maxsize=NUM_REMEMBERED)(self._encode)
        self._spellings = dict[int, bytes]()

    def encode(self, text: str) -> list[int]:
        """Ids without special ones before or behind."""
        if self._backend is not None:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def begin(self, text: bytes, count: int) -> Sequence[int]:
        """The first `count` tokens of a text that goes on.

        Without the last token of what is given, which a model may join with what follows. None of them if the text
        begins in the middle of a character.

        text: what is known of it, of which at most `BYTES_PER_TOKEN * (count + 1)` bytes are read.
        """
        return self._remembered(text[: BYTES_PER_TOKEN * (count + 1)], count)

    def _encode(self, text: bytes, count: int) -> Sequence[int]:
        try:
            whole = _utf8().decode(text)
        except UnicodeDecodeError:
            return ()
        return tuple(self.encode(whole)[:-1][:count]) if whole else ()

    def spelling(self, token: int) -> bytes:
        """The bytes of a token."""
        if token not in self._spellings:
            name = self._tokenizer.convert_ids_to_tokens(token) or ""
            # Added tokens are spelled as they are.
            is_byte_level = all(symbol in _BYTES for symbol in name)
            self._spellings[token] = bytes(map(_BYTES.__getitem__, name)) if is_byte_level else name.encode()
        return self._spellings[token]

    @cached_property
    def probes(self) -> Sequence[tuple[int, int]]:
        """Pairs of tokens of one byte each, of common scripts: who may choose between characters may take both."""
        symbols = bytes_to_unicode()
        ids = (tuple(map(self._tokenizer.convert_tokens_to_ids, map(symbols.get, pair))) for pair in _PROBED)
        return [(first, second) for first, second in ids if first is not None and second is not None]

    def allowed_bytes(self, mask: Masks) -> list[int]:
        """The tokens of one byte each that a row allows. mask: [W]."""
        ids, words, bits = self._single_bytes
        found: list[int] = ids[(mask[words] >> bits & 1).nonzero()[0]].tolist()
        return found

    @cached_property
    def _single_bytes(self) -> tuple[Ids, Ids, Ids]:
        """The tokens of one byte each, and where their bits are in a row: words, and bits of these."""
        tokens = map(self._tokenizer.convert_tokens_to_ids, _BYTES)
        ids = np.array([token for token in tokens if token is not None], np.int64)
        return ids, ids >> 5, ids & 31
