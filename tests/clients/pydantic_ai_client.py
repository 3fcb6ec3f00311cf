"""pydantic-ai: text, streams, output by tool, by schema and by prompt, and tools of one's own."""

from __future__ import annotations

import asyncio
from typing import Any

from openai import OpenAI
from pydantic_ai import Agent, NativeOutput, PromptedOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.prompts import API_KEY, FLIGHT, MAX_TOKENS, MODEL, ORDER, QUESTION, Order
from tests.clients.report import run


def _agent(url: str, output: Any = str) -> Any:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key=API_KEY)
    settings: Any = {"temperature": 0, "max_tokens": MAX_TOKENS}
    return Agent(OpenAIChatModel(MODEL, provider=provider), output_type=output, model_settings=settings, retries=0)


def text(url: str) -> Any:
    """One answer."""
    result = _agent(url).run_sync(QUESTION)
    return [result.output, result.usage.output_tokens]


def stream(url: str) -> Any:
    """The same in parts."""

    async def collect() -> str:
        async with _agent(url).run_stream(QUESTION) as result:
            return "".join([part async for part in result.stream_text(delta=True)])

    return asyncio.run(collect())


def output_by_tool(url: str) -> Any:
    """An object, by a tool that must be called: the default."""
    return _agent(url, Order).run_sync(ORDER).output


def output_by_schema(url: str) -> Any:
    """An object, by a JSON schema."""
    return _agent(url, NativeOutput(Order)).run_sync(ORDER).output


def output_by_prompt(url: str) -> Any:
    """An object, by instructions and JSON mode."""
    return _agent(url, PromptedOutput(Order)).run_sync(ORDER).output


def tools(url: str) -> Any:
    """A tool of one's own: its call and the turn after it."""
    agent, booked = _agent(url), []

    @agent.tool_plain
    def book_flight(origin: str, destination: str, date: str) -> str:
        """Book a flight."""
        booked.append([origin, destination, date])
        return '{"status": "booked"}'

    return [agent.run_sync(FLIGHT).output, booked]


def responses(url: str) -> Any:
    """The responses API, which wants the model by its name."""
    name = OpenAI(base_url=f"{url}/v1", api_key=API_KEY).models.list().data[0].id
    model = OpenAIResponsesModel(name, provider=OpenAIProvider(base_url=f"{url}/v1", api_key=API_KEY))
    settings: Any = {"temperature": 0, "max_tokens": MAX_TOKENS}
    return Agent(model, model_settings=settings, retries=0).run_sync(QUESTION).output


if __name__ == "__main__":
    cases = (text, stream, output_by_tool, output_by_schema, output_by_prompt, tools, responses)
    run({case.__name__: case for case in cases})
