"""From the chunks that SGLang streams to rounds, and what a finished answer says of its drafts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Round:
    """What one chunk added: the token of prefill, then one round of ORTHRUS or one step of plain SGLang a chunk.

    Attributes:
        text: may be empty, as SGLang holds back incomplete characters and end-of-text tokens have none.
    """

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Drafts:
    """What SGLang counted for one request. It says so in the last chunk only.

    Attributes:
        rounds: verify passes; prefill is none.
        accepted: drafts that became output.
        proposed: drafts of all rounds.
    """

    rounds: int
    accepted: int
    proposed: int


@dataclass
class Answer:
    """One answer, as far as it has come."""

    rounds: list[Round] = field(default_factory=list)
    text: str = ""
    num_tokens: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)

    def take(self, chunk: Mapping[str, Any]) -> Round:
        """Add a chunk of `/generate`, which holds all the text so far, or just the new one if the server is set so."""
        self.meta = chunk["meta_info"]
        total: int = self.meta["completion_tokens"]
        # NOTE: an intermediate list of ids may already have grown beyond its chunk's count.
        ids, text = list(chunk["output_ids"])[:total], chunk["text"] or ""
        if len(ids) == total:
            ids, text = ids[self.num_tokens :], text[len(self.text) :]
        added = Round(tuple(ids), text)
        self.rounds.append(added)
        self.text += text
        self.num_tokens = total
        return added

    @property
    def finish_reason(self) -> Mapping[str, Any]:
        """Why it ended; empty while it has not."""
        return self.meta.get("finish_reason") or {}

    @property
    def drafts(self) -> Drafts | None:
        """None where the server does not say, as plain SGLang."""
        keys = ("spec_verify_ct", "spec_num_correct_drafts", "spec_num_proposed_drafts")
        return Drafts(*(self.meta[key] for key in keys)) if all(key in self.meta for key in keys) else None

    def accepted_by_round(self) -> list[int] | None:
        """How many tokens of each round are accepted drafts; the others are the autoregressive view's own.

        A round ends with a token of the autoregressive view's own, except the last one if a stop cut it off; what
        the server counted decides this. None where chunks are not rounds, because some came together.
        """
        drafts = self.drafts
        if drafts is None or drafts.rounds != len(self.rounds) - 1:
            return None
        lengths = [len(one.ids) for one in self.rounds[1:]]
        if not lengths or 0 in lengths:
            return None
        accepted = [length - 1 for length in lengths]
        accepted[-1] = drafts.accepted - sum(accepted[:-1])
        is_consistent = lengths[-1] - 1 <= accepted[-1] <= lengths[-1]
        return [0, *accepted] if is_consistent else None


def accepted_ids(answer: Answer) -> list[list[int]] | None:
    """The ids of each round that are accepted drafts; None if that is not known."""
    accepted = answer.accepted_by_round()
    if accepted is None:
        return None
    return [list(one.ids[:count]) for one, count in zip(answer.rounds, accepted, strict=True)]


def own_texts(rounds: Sequence[Round], accepted: Sequence[str]) -> list[str]:
    """The end of each round's text that is the autoregressive view's own; empty where that can't be told.

    Args:
        accepted: the text of each round's accepted drafts.
    """
    return [
        one.text[len(text) :] if one.text.startswith(text) else "" for one, text in zip(rounds, accepted, strict=True)
    ]
