"""instructor: objects by JSON schema, by JSON mode and by tools, whole and in parts."""

from __future__ import annotations

from typing import Any

import instructor
from instructor import Mode
from openai import OpenAI

from tests.clients.prompts import API_KEY, MAX_TOKENS, MODEL, ORDER, Order, user
from tests.clients.report import run


def _client(url: str, mode: Mode) -> Any:
    return instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0), mode=mode)


def _options() -> dict[str, Any]:
    return {"model": MODEL, "messages": user(ORDER), "temperature": 0, "max_tokens": MAX_TOKENS, "max_retries": 0}


def _create(url: str, mode: Mode) -> Any:
    return _client(url, mode).chat.completions.create(response_model=Order, **_options())


def json_schema(url: str) -> Any:
    """`Mode.JSON_SCHEMA`."""
    return _create(url, Mode.JSON_SCHEMA)


def json_mode(url: str) -> Any:
    """`Mode.JSON`: any JSON object, and the schema in the prompt."""
    return _create(url, Mode.JSON)


def tools(url: str) -> Any:
    """`Mode.TOOLS`, which is the default: the tool is named as the choice."""
    return _create(url, Mode.TOOLS)


def tools_strict(url: str) -> Any:
    """`Mode.TOOLS_STRICT`."""
    return _create(url, Mode.TOOLS_STRICT)


def _partial(url: str, mode: Mode) -> Any:
    parts = list(_client(url, mode).chat.completions.create_partial(response_model=Order, **_options()))
    known = [sum(value is not None for value in part.model_dump().values()) for part in parts]
    assert known == sorted(known), "a field that was there has gone"
    return parts[-1]


def partial_json_schema(url: str) -> Any:
    """An object that grows while it is streamed."""
    return _partial(url, Mode.JSON_SCHEMA)


def partial_tools(url: str) -> Any:
    """The same from a tool call."""
    return _partial(url, Mode.TOOLS)


if __name__ == "__main__":
    cases = (json_schema, json_mode, tools, tools_strict, partial_json_schema, partial_tools)
    run({case.__name__: case for case in cases})
