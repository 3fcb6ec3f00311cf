"""The Anthropic client on `/v1/messages`: answers, streams, tools, counts."""

from __future__ import annotations

from typing import Any

from anthropic import Anthropic

from tests.clients.prompts import API_KEY, FLIGHT, FLIGHT_TOOL, MAX_TOKENS, MODEL, QUESTION, user
from tests.clients.report import run

_TOOL: Any = {
    "name": "book_flight",
    "description": "Book a flight.",
    "input_schema": FLIGHT_TOOL["function"]["parameters"],
}


def _client(url: str) -> Anthropic:
    return Anthropic(base_url=url, api_key=API_KEY, max_retries=0, timeout=120)


def _options(text: str) -> dict[str, Any]:
    # Anthropic's newest client no longer types the temperature, but sends it.
    return {"model": MODEL, "messages": user(text), "max_tokens": MAX_TOKENS, "extra_body": {"temperature": 0}}


def message(url: str) -> Any:
    """One answer, with its usage."""
    answer = _client(url).messages.create(**_options(QUESTION))
    return [
        [block.text for block in answer.content if block.type == "text"],
        answer.stop_reason,
        answer.usage.output_tokens,
    ]


def system(url: str) -> Any:
    """One with a system prompt in parts."""
    parts: Any = [{"type": "text", "text": "You are a helpful assistant."}]
    answer = _client(url).messages.create(**_options(QUESTION), system=parts)
    return [block.text for block in answer.content if block.type == "text"]


def stream(url: str) -> Any:
    """The same in parts."""
    with _client(url).messages.stream(**_options(QUESTION)) as parts:
        text = "".join(parts.text_stream)
        return [text, parts.get_final_message().stop_reason]


def _calls(answer: Any) -> Any:
    return [[block.name, block.input] for block in answer.content if block.type == "tool_use"], answer.stop_reason


def tools(url: str) -> Any:
    """A tool call that the model chooses to make."""
    return _calls(_client(url).messages.create(**_options(FLIGHT), tools=[_TOOL]))


def tools_any(url: str) -> Any:
    """A tool call that it has to make."""
    return _calls(_client(url).messages.create(**_options(FLIGHT), tools=[_TOOL], tool_choice={"type": "any"}))


def tools_stream(url: str) -> Any:
    """A tool call in parts."""
    with _client(url).messages.stream(**_options(FLIGHT), tools=[_TOOL]) as parts:
        return _calls(parts.get_final_message())


def tool_turn(url: str) -> Any:
    """The turn after a tool call."""
    client = _client(url)
    first = client.messages.create(**_options(FLIGHT), tools=[_TOOL])
    calls = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": calls[0].id, "content": '{"status": "booked"}'}
    options = _options(FLIGHT)
    blocks = [block.model_dump(exclude_none=True) for block in first.content]
    options["messages"] += [{"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}]
    answer = client.messages.create(**options, tools=[_TOOL])
    return [block.text for block in answer.content if block.type == "text"]


def count_tokens(url: str) -> Any:
    """Tokens of a prompt."""
    return _client(url).messages.count_tokens(model=MODEL, messages=user(QUESTION)).input_tokens


if __name__ == "__main__":
    cases = (message, system, stream, tools, tools_any, tools_stream, tool_turn, count_tokens)
    run({case.__name__: case for case in cases})
