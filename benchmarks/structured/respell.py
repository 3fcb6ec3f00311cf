"""Draft blocks of nano's in another vocabulary: the same texts in other tokens.

nano has 4,096 tokens, Qwen3 151,936. What grammars cost depends on both the vocabulary and what is drafted. A block in
Qwen3's tokens holds more text than nano drafts at once, so it goes on with the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from benchmarks.structured.cases import Block
from sglang_orthrus.grammar.token_text import TokenText


def respelled(blocks: Sequence[Block], ours: Any, theirs: Any, end: str) -> Iterator[Block]:
    """Those blocks that begin between two characters, in the tokens of `theirs`.

    Args:
        ours: the tokenizer of the blocks.
        end: the token that ends a text, of both.
    """
    old, new = TokenText(ours), TokenText(theirs)
    ends = ours.convert_tokens_to_ids(end), theirs.convert_tokens_to_ids(end)
    for block in blocks:
        committed, answer = (_text(old, ids, ends[0]) for ids in (block.committed, block.answer))
        drafts = [old.spelling(token) for token in _until(block.candidates[:, 0].tolist(), ends[0])]
        drafted = committed + b"".join(drafts)
        try:
            before = new.encode(committed.decode())
            whole = (drafted + answer[len(drafted) :]).decode()
        except UnicodeDecodeError:
            continue
        ids = new.encode(whole)
        # What is committed is spelled by itself, so the drafts begin where its text ends.
        first = new.encode(whole[len(committed.decode()) :])
        num_drafts = block.candidates.shape[0]
        row = (first + [ends[1]] * num_drafts)[:num_drafts]
        candidates = _candidates(block, row, drafts, old, new)
        yield replace(block, committed=before, candidates=candidates, answer=ids)


def _until(ids: Sequence[int], end: int) -> Sequence[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _text(text: TokenText, ids: Sequence[int], end: int) -> bytes:
    return b"".join(map(text.spelling, _until(ids, end)))


def _candidates(
    block: Block, row: Sequence[int], drafts: Sequence[bytes], old: TokenText, new: TokenText
) -> torch.Tensor:
    """[31, 64]: first the drafts, then how nano's other choices at that point of the text begin in the new tokens."""
    places = [*accumulate(map(len, drafts), initial=0)]
    found = []
    for (start, _), token in zip(pairwise(accumulate(_lengths(new, row), initial=0)), row, strict=True):
        position = min(sum(place <= start for place in places) - 1, block.candidates.shape[0] - 1)
        others = (new.encode(_decoded(old.spelling(other)))[:1] for other in block.candidates[position].tolist())
        # The lowest ids are single characters; they stand for choices that are never right.
        chosen = dict.fromkeys([token, *(first for ids in others for first in ids), *range(2 * len(row) + 64)])
        found.append(list(chosen)[: block.candidates.shape[1]])
    return torch.tensor(found)


def _lengths(text: TokenText, ids: Sequence[int]) -> Iterator[int]:
    return (len(text.spelling(token)) for token in ids)


def _decoded(spelling: bytes) -> str:
    return spelling.decode(errors="ignore")
