"""Samples to token rows: several conversations per row of fixed length, each token with its conversation and role."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from examples.train_nano.chat_format import END_OF_TURN, sample_prompt
from examples.train_nano.corpus import FAMILIES, train_sample
from examples.train_nano.sample import Sample

PAD, PROMPT, ANSWER = 0, 1, 2
CHUNK_SAMPLES = 512


class Rows(NamedTuple):
    """Packed rows, each array [rows, length].

    ids: tokens (uint16); docs: conversation within the row, counted from 1, 0 for padding (int16);
    positions: place within the conversation (int16); kinds: PAD, PROMPT or ANSWER (uint8);
    families: index into `corpus.FAMILIES` (uint8).
    """

    ids: NDArray[np.uint16]
    docs: NDArray[np.int16]
    positions: NDArray[np.int16]
    kinds: NDArray[np.uint8]
    families: NDArray[np.uint8]

    def part(self, start: int, stop: int) -> Rows:
        """The rows from `start` up to `stop`, or to the end."""
        arrays: tuple[Any, ...] = self
        return Rows(*(array[start:stop] for array in arrays))

    @property
    def count(self) -> int:  # type: ignore[override]
        return int(self.ids.shape[0])


def concatenate(parts: list[Rows]) -> Rows:
    """All rows of `parts`, in order."""
    return Rows(*(np.concatenate(arrays) for arrays in zip(*(tuple(part) for part in parts), strict=True)))


def encode(samples: list[Sample], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids with the end of the turn) of each sample, encoded apart as a server would."""
    prompts = tokenizer.encode_batch_fast([sample_prompt(sample) for sample in samples], add_special_tokens=False)
    answers = tokenizer.encode_batch_fast([sample.answer + END_OF_TURN for sample in samples], add_special_tokens=False)
    return [(prompt.ids, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]


def pack(samples: list[Sample], tokenizer: Tokenizer, length: int) -> Rows:
    """First-fit packing into rows of `length` tokens; conversations that exceed it are dropped."""
    pairs = encode(samples, tokenizer)
    room: list[int] = []
    bins: list[list[int]] = []
    first_open = 0
    for index, (prompt, answer) in enumerate(pairs):
        size = len(prompt) + len(answer)
        if size > length:
            continue
        for row in range(first_open, len(bins)):
            if room[row] >= size:
                break
        else:
            row = len(bins)
            bins.append([])
            room.append(length)
        bins[row].append(index)
        room[row] -= size
        while first_open < len(bins) and room[first_open] < 40:
            first_open += 1
    shape = (len(bins), length)
    rows = Rows(
        np.zeros(shape, np.uint16),
        np.zeros(shape, np.int16),
        np.zeros(shape, np.int16),
        np.zeros(shape, np.uint8),
        np.zeros(shape, np.uint8),
    )
    counting = np.arange(length, dtype=np.int16)
    for row, members in enumerate(bins):
        at = 0
        for doc, index in enumerate(members, 1):
            prompt, answer = pairs[index]
            middle, end = at + len(prompt), at + len(prompt) + len(answer)
            rows.ids[row, at:middle] = prompt
            rows.ids[row, middle:end] = answer
            rows.docs[row, at:end] = doc
            rows.positions[row, at:end] = counting[: end - at]
            rows.kinds[row, at:middle] = PROMPT
            rows.kinds[row, middle:end] = ANSWER
            rows.families[row, at:end] = FAMILIES.index(samples[index].family)
            at = end
    return rows


def train_rows(seed: int, chunk: int, tokenizer: Tokenizer, length: int) -> Rows:
    """The rows of training chunk `chunk`: a function of its arguments alone, so a run can resume anywhere."""
    start = chunk * CHUNK_SAMPLES
    return pack([train_sample(seed, index) for index in range(start, start + CHUNK_SAMPLES)], tokenizer, length)
