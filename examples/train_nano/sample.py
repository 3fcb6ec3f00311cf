"""The unit of training data: one conversation, the answer to learn, and what is needed to score it exactly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Json = Any
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt in OpenAI format and its answer.

    `check` says how an output is scored against `expected`: "json" (parsed object), "tools" (list of
    `{"name", "arguments"}`), "text" (the visible text), "final" (the text after "Answer: ") or "none".
    `slots` lists, in order, the parts of the answer that are *not* fixed by the answer's format;
    None means that the format fixes nothing.
    """

    family: str
    messages: list[Message]
    answer: str
    check: str
    expected: Json = None
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    schema: dict[str, Any] | None = None
    slots: tuple[str, ...] | None = None


def compact(value: Json) -> str:
    """One-line JSON with ", " and ": ", the only layout of the corpus (a whitespace-free grammar writes the same)."""
    return json.dumps(value, ensure_ascii=False)


def leaves(value: Json) -> list[str]:
    """The scalar values of a JSON document in writing order, as their JSON text without quotes."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    text = compact(value)
    return [text[1:-1] if isinstance(value, str) else text]


def call_text(calls: list[dict[str, Any]]) -> str:
    """Tool calls as the assistant writes them: one tagged JSON object per call."""
    return "\n".join(f"<tool_call>\n{compact(call)}\n</tool_call>" for call in calls)
