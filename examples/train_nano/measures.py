"""Scores and baselines of an answer: exactness, prompt-lookup drafting, and what is copied or fixed by the format."""

from __future__ import annotations

import json
import re
from typing import Any

from examples.train_nano.sample import Sample

COPY_TOKENS = 3
NGRAM_DRAFTS = 31
NGRAM_LONGEST = 12
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _same(left: Any, right: Any) -> bool:
    """Equality of JSON values that tells true from 1 and minds the order of keys."""
    return json.dumps(left) == json.dumps(right)


def is_exact(sample: Sample, output: str) -> bool | None:
    """Whether an output (without its end token) is right; None for free text."""
    visible = output.split("</think>")[-1].strip() if sample.thinking else output
    if sample.check == "none":
        return None
    if sample.check == "json":
        return _same(_parsed(visible), sample.expected)
    if sample.check == "tools":
        return _same([_parsed(call) for call in _CALL.findall(visible)], sample.expected)
    if sample.check == "final":
        return visible.rpartition("Answer: ")[2] == sample.expected
    assert sample.check == "text"
    return bool(visible == sample.answer.split("</think>\n\n")[-1])


def ngram_rounds(prompt: list[int], output: list[int]) -> int:
    """Rounds that prompt-lookup drafting would need for `output`, whose first token comes from prefill.

    Each round drafts the NGRAM_DRAFTS tokens that followed the latest earlier occurrence of the longest suffix
    (at most NGRAM_LONGEST tokens) of prompt and output so far, and yields the agreeing ones and one more.
    """
    seen: dict[tuple[int, ...], int] = {}
    text = list(prompt)

    def index(end: int) -> None:
        """Files the n-grams that end before `end`, so that a suffix is never its own continuation."""
        for n in range(1, min(NGRAM_LONGEST, end) + 1):
            seen[tuple(text[end - n : end])] = end

    for end in range(1, len(text)):
        index(end)
    done, rounds = 1, 0
    text.append(output[0])
    index(len(text) - 1)
    while done < len(output):
        draft: list[int] = []
        for n in range(min(NGRAM_LONGEST, len(text)), 0, -1):
            if (at := seen.get(tuple(text[-n:]))) is not None:
                draft = text[at : at + NGRAM_DRAFTS]
                break
        accepted = 0
        while accepted < len(draft) and done + accepted < len(output) and draft[accepted] == output[done + accepted]:
            accepted += 1
        for token in output[done : done + accepted + 1]:
            text.append(token)
            index(len(text) - 1)
        done += accepted + 1
        rounds += 1
    return rounds


def copied(prompt: list[int], output: list[int]) -> list[bool]:
    """Per output token: it lies in a run of COPY_TOKENS tokens that also occurs in the prompt."""
    grams = {tuple(prompt[i : i + COPY_TOKENS]) for i in range(len(prompt) - COPY_TOKENS + 1)}
    flags = [False] * len(output)
    for i in range(len(output) - COPY_TOKENS + 1):
        if tuple(output[i : i + COPY_TOKENS]) in grams:
            flags[i : i + COPY_TOKENS] = [True] * COPY_TOKENS
    return flags


def fixed_by_format(sample: Sample, offsets: list[tuple[int, int]]) -> list[bool]:
    """Per token of the reference answer, given its character offsets: no character of it belongs to a slot.

    Slots are the parts that the format leaves open: values in JSON, names and values in calls, numbers in steps. The
    end-of-turn token counts as fixed, except where a family's format fixes nothing.
    """
    if sample.slots is None:
        return [False] * len(offsets)
    is_open = [False] * len(sample.answer)
    at = 0
    for slot in sample.slots:
        at = sample.answer.index(slot, at)
        is_open[at : at + len(slot)] = [True] * len(slot)
        at += len(slot)
    return [not any(is_open[start:end]) for start, end in offsets]
