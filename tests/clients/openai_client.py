"""openai: chat, streams, structured answers, tools and responses."""

from __future__ import annotations

from typing import Any

from openai import OpenAI

from tests.clients.prompts import API_KEY, FLIGHT, FLIGHT_TOOL, MAX_TOKENS, MODEL, ORDER, QUESTION, Order, user
from tests.clients.report import run


def _client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=120)


def strict_chat(url: str) -> Any:
    """One answer, validated against OpenAI's schema."""
    client = OpenAI(base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, _strict_response_validation=True)
    return client.chat.completions.create(**_options(QUESTION)).choices[0].message.content


def _options(text: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": user(text), "temperature": 0, "max_tokens": MAX_TOKENS}


def models(url: str) -> Any:
    """How many models are listed."""
    return len(_client(url).models.list().data)


def chat(url: str) -> Any:
    """One answer, with its usage."""
    answer = _client(url).chat.completions.create(**_options(QUESTION))
    assert answer.usage is not None
    return [answer.choices[0].message.content, answer.choices[0].finish_reason, answer.usage.completion_tokens]


def chat_logprobs(url: str) -> Any:
    """Its tokens, by their log probabilities."""
    answer = _client(url).chat.completions.create(**_options(QUESTION), logprobs=True, top_logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    return [[token.token, len(token.top_logprobs)] for token in logprobs.content]


def chat_stream(url: str) -> Any:
    """The same answer in parts."""
    options = {**_options(QUESTION), "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(_client(url).chat.completions.create(**options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices and chunk.choices[0].finish_reason]
    usage = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage and not chunk.choices]
    return [text, reasons, usage]


def stream_helper(url: str) -> Any:
    """The client's own accumulator of a stream."""
    with _client(url).chat.completions.stream(**_options(QUESTION)) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    return [message.content, sorted(kinds)]


def parse(url: str) -> Any:
    """A pydantic model in, an object out."""
    answer = _client(url).chat.completions.parse(**_options(ORDER), response_format=Order)
    return answer.choices[0].message.parsed


def parse_stream(url: str) -> Any:
    """The same in parts."""
    with _client(url).chat.completions.stream(**_options(ORDER), response_format=Order) as stream:
        return stream.get_final_completion().choices[0].message.parsed


def _calls(message: Any) -> list[Any]:
    return [[call.function.name, call.function.arguments] for call in message.tool_calls or []]


def tools(url: str) -> Any:
    """A tool call that the model chooses to make."""
    answer = _client(url).chat.completions.create(**_options(FLIGHT), tools=[FLIGHT_TOOL])
    return [_calls(answer.choices[0].message), answer.choices[0].finish_reason]


def tools_required(url: str) -> Any:
    """A tool call that it has to make."""
    answer = _client(url).chat.completions.create(**_options(FLIGHT), tools=[FLIGHT_TOOL], tool_choice="required")
    return [_calls(answer.choices[0].message), answer.choices[0].finish_reason]


def tools_required_strict(url: str) -> Any:
    """The same, with arguments that follow the schema."""
    tool: Any = {"type": "function", "function": {**FLIGHT_TOOL["function"], "strict": True}}
    answer = _client(url).chat.completions.create(**_options(FLIGHT), tools=[tool], tool_choice="required")
    return [_calls(answer.choices[0].message), answer.choices[0].finish_reason]


def tools_stream(url: str) -> Any:
    """A tool call in parts."""
    with _client(url).chat.completions.stream(**_options(FLIGHT), tools=[FLIGHT_TOOL]) as stream:
        return _calls(stream.get_final_completion().choices[0].message)


def tool_turn(url: str) -> Any:
    """The turn after a tool call."""
    client = _client(url)
    first = client.chat.completions.create(**_options(FLIGHT), tools=[FLIGHT_TOOL]).choices[0].message
    assert first.tool_calls
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": '{"status": "booked"}'}
    options = _options(FLIGHT)
    options["messages"] += [first.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**options, tools=[FLIGHT_TOOL])
    return [answer.choices[0].message.content, answer.choices[0].finish_reason]


def _response_options(url: str, text: str) -> dict[str, Any]:
    # The responses API answers 404 to "default".
    model = _client(url).models.list().data[0].id
    return {"model": model, "input": text, "temperature": 0, "max_output_tokens": MAX_TOKENS, "store": False}


def responses(url: str) -> Any:
    """The responses API."""
    answer = _client(url).responses.create(**_response_options(url, QUESTION))
    return [answer.output_text, answer.status]


def responses_of_default_model(url: str) -> Any:
    """With the name that chat completions take for any model."""
    return _client(url).responses.create(**_response_options(url, QUESTION) | {"model": MODEL}).output_text


def responses_stream(url: str) -> Any:
    """Its events."""
    with _client(url).responses.create(**_response_options(url, QUESTION), stream=True) as stream:
        events = list(stream)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    return [text, sorted({event.type for event in events})]


def responses_parse(url: str) -> Any:
    """A pydantic model in, an object out, by the responses API."""
    return _client(url).responses.parse(**_response_options(url, ORDER), text_format=Order).output_parsed


def responses_tools(url: str) -> Any:
    """A tool call, by the responses API."""
    tool: Any = {"type": "function", **FLIGHT_TOOL["function"], "strict": False}
    answer = _client(url).responses.create(**_response_options(url, FLIGHT), tools=[tool])
    return [[item.name, item.arguments] for item in answer.output if item.type == "function_call"]


if __name__ == "__main__":
    run(
        {
            case.__name__: case
            for case in (
                *(models, chat, strict_chat, chat_logprobs, chat_stream, stream_helper, parse, parse_stream),
                *(tools, tools_required, tools_required_strict, tools_stream, tool_turn),
                *(responses, responses_of_default_model, responses_stream, responses_parse, responses_tools),
            )
        }
    )
