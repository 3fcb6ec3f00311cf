"""LangChain's ChatOpenAI: answers, streams, structured output in its three methods, tools."""

from __future__ import annotations

from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.clients.prompts import API_KEY, FLIGHT, MAX_TOKENS, MODEL, ORDER, QUESTION, Order
from tests.clients.report import run


@tool
def book_flight(origin: str, destination: str, date: str) -> str:
    """Book a flight."""
    return '{"status": "booked"}'


def _model(url: str) -> ChatOpenAI:
    options: dict[str, Any] = {"api_key": API_KEY, "temperature": 0, "max_tokens": MAX_TOKENS, "max_retries": 0}
    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", **options)


def invoke(url: str) -> Any:
    """One answer, with its usage."""
    answer = _model(url).invoke(QUESTION)
    return [answer.content, (answer.usage_metadata or {}).get("output_tokens")]


def stream(url: str) -> Any:
    """The same in parts."""
    return "".join(str(chunk.content) for chunk in _model(url).stream(QUESTION))


def batch(url: str) -> Any:
    """Several at once."""
    return [answer.content for answer in _model(url).batch([QUESTION, FLIGHT])]


def structured_json_schema(url: str) -> Any:
    """`with_structured_output` as it is by default: a strict JSON schema."""
    return _model(url).with_structured_output(Order).invoke(ORDER)


def structured_function_calling(url: str) -> Any:
    """By a tool that must be called."""
    return _model(url).with_structured_output(Order, method="function_calling").invoke(ORDER)


def structured_function_calling_strict(url: str) -> Any:
    """The same, with arguments that follow the schema."""
    return _model(url).with_structured_output(Order, method="function_calling", strict=True).invoke(ORDER)


def structured_json_mode(url: str) -> Any:
    """By any JSON object; the model has to hit the schema by itself."""
    return _model(url).with_structured_output(Order, method="json_mode", include_raw=True).invoke(ORDER)["raw"].content


def structured_stream(url: str) -> Any:
    """The last of the parts of an object."""
    return list(_model(url).with_structured_output(Order).stream(ORDER))[-1]


def _calls(message: Any) -> list[Any]:
    return [[call["name"], call["args"]] for call in message.tool_calls]


def tools(url: str) -> Any:
    """A bound tool that the model chooses to call."""
    return _calls(_model(url).bind_tools([book_flight]).invoke(FLIGHT))


def tools_any(url: str) -> Any:
    """A bound tool that it has to call."""
    return _calls(_model(url).bind_tools([book_flight], tool_choice="any", strict=True).invoke(FLIGHT))


def tools_stream(url: str) -> Any:
    """A call whose parts are added up."""
    chunks = list(_model(url).bind_tools([book_flight]).stream(FLIGHT))
    return _calls(sum(chunks[1:], start=chunks[0]))


def tool_turn(url: str) -> Any:
    """The turn after a tool call."""
    model = _model(url).bind_tools([book_flight])
    first = model.invoke(FLIGHT)
    result = ToolMessage('{"status": "booked"}', tool_call_id=first.tool_calls[0]["id"] or "")
    return model.invoke([HumanMessage(FLIGHT), first, result]).content


if __name__ == "__main__":
    run(
        {
            case.__name__: case
            for case in (
                *(invoke, stream, batch, structured_json_schema, structured_function_calling),
                *(structured_function_calling_strict, structured_json_mode, structured_stream),
                *(tools, tools_any, tools_stream, tool_turn),
            )
        }
    )
