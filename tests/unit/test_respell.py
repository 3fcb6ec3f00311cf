"""Draft blocks in another vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.utils.hf_transformers_utils import get_tokenizer

from benchmarks.structured.cases import END, Block, Case
from benchmarks.structured.respell import respelled
from sglang_orthrus.cli.demo import NANO
from sglang_orthrus.grammar.token_text import TokenText
from tests.fixtures import write_tokenizer

ANSWER = '{"größe": "M", "units": 12}'
NUM_DRAFTS, NUM_CANDIDATES = 31, 64
CASE = Case("some", "", {})


def _block(tokenizer: Any, committed: int) -> Block:
    """A block whose first choices are right, behind the first so many tokens of the answer."""
    ids = [*TokenText(tokenizer).encode(ANSWER), tokenizer.convert_tokens_to_ids(END)]
    candidates = torch.arange(NUM_CANDIDATES).repeat(NUM_DRAFTS, 1)
    drafts = (ids[committed:] + [ids[-1]] * NUM_DRAFTS)[:NUM_DRAFTS]
    candidates[:, 0] = torch.tensor(drafts)
    return Block(CASE, ids[:committed], candidates, ids)


def test_in_its_own_vocabulary_a_block_keeps_its_drafts() -> None:
    tokenizer = get_tokenizer(str(NANO))
    block = _block(tokenizer, 3)
    (same,) = respelled([block], tokenizer, tokenizer, END)
    assert same.committed == block.committed
    assert torch.equal(same.candidates[:, 0], block.candidates[:, 0])
    assert same.candidates.shape == block.candidates.shape


def test_the_text_is_the_same_in_other_tokens(tmp_path: Any) -> None:
    write_tokenizer(tmp_path)  # of single bytes
    ours, theirs = get_tokenizer(str(NANO)), get_tokenizer(str(tmp_path))
    old, new = TokenText(ours), TokenText(theirs)
    blocks = [_block(ours, committed) for committed in range(1, len(old.encode(ANSWER)))]
    found = list(respelled(blocks, ours, theirs, END))
    assert found
    end = theirs.convert_tokens_to_ids(END)
    for block in found:
        drafts = block.candidates[:, 0].tolist()
        drafts = drafts[: drafts.index(end)] if end in drafts else drafts
        written = b"".join(map(new.spelling, [*block.committed, *drafts])).decode(errors="ignore")
        assert ANSWER.startswith(written)
        for row in block.candidates.tolist():
            assert len(set(row)) == NUM_CANDIDATES


def test_a_block_that_begins_in_the_middle_of_a_character_is_left_out(tmp_path: Any) -> None:
    write_tokenizer(tmp_path)
    bytewise, nano = get_tokenizer(str(tmp_path)), get_tokenizer(str(NANO))
    middle = len(b'{"gr') + 1
    assert list(respelled([_block(bytewise, middle)], bytewise, nano, END)) == []
    assert len(list(respelled([_block(bytewise, middle + 1)], bytewise, nano, END))) == 1
