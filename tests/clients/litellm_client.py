"""litellm: answers, streams, structured answers, tools, responses, and Anthropic's interface."""

from __future__ import annotations

from typing import Any

import litellm

from tests.clients.prompts import API_KEY, FLIGHT, FLIGHT_TOOL, MAX_TOKENS, MODEL, ORDER, QUESTION, Order, user
from tests.clients.report import run


def _options(url: str, text: str, provider: str = "openai") -> dict[str, Any]:
    return {
        "model": f"{provider}/{MODEL}",
        "messages": user(text),
        "api_base": f"{url}/v1",
        "api_key": API_KEY,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "num_retries": 0,
    }


def completion(url: str) -> Any:
    """One answer, with its usage."""
    answer: Any = litellm.completion(**_options(url, QUESTION))
    return [answer.choices[0].message.content, answer.usage.completion_tokens]


def stream(url: str) -> Any:
    """The same in parts."""
    chunks: Any = litellm.completion(**_options(url, QUESTION), stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def hosted_vllm(url: str) -> Any:
    """By the provider for servers of the OpenAI API other than OpenAI's."""
    answer: Any = litellm.completion(**_options(url, QUESTION, "hosted_vllm"))
    return answer.choices[0].message.content


def json_schema(url: str) -> Any:
    """A pydantic model in, JSON out."""
    answer: Any = litellm.completion(**_options(url, ORDER), response_format=Order)
    return Order.model_validate_json(answer.choices[0].message.content)


def _calls(message: Any) -> list[Any]:
    return [[call.function.name, call.function.arguments] for call in message.tool_calls or []]


def tools(url: str) -> Any:
    """A tool call that the model chooses to make."""
    answer: Any = litellm.completion(**_options(url, FLIGHT), tools=[FLIGHT_TOOL])
    return _calls(answer.choices[0].message)


def tools_stream(url: str) -> Any:
    """A tool call in parts, put together by litellm."""
    chunks = list(litellm.completion(**_options(url, FLIGHT), tools=[FLIGHT_TOOL], stream=True))
    answer: Any = litellm.stream_chunk_builder(chunks)
    return _calls(answer.choices[0].message)


if __name__ == "__main__":
    run({case.__name__: case for case in (completion, stream, hosted_vllm, json_schema, tools, tools_stream)})
