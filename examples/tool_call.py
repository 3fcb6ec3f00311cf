"""Two turns with a tool: the model calls a function, the function runs, the model tells. First: `make serve`."""

from __future__ import annotations

import json
import sys
from typing import Any

from openai import OpenAI


def get_weather(city: str) -> dict[str, Any]:
    """The weather of a city, were there a service to ask."""
    return {"weather": "sunny", "temperature": 23 if city == "Lisbon" else 11}


URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
client = OpenAI(base_url=f"{URL}/v1", api_key="none")
parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
description = "Get the current weather of a city."
function = {"name": "get_weather", "description": description, "parameters": parameters, "strict": True}
tools: list[Any] = [{"type": "function", "function": function}]
messages: list[Any] = [{"role": "user", "content": "What is the weather like in Lisbon?"}]
print(f"> {messages[0]['content']}")
while True:
    reply = client.chat.completions.create(model="default", messages=messages, tools=tools, temperature=0)
    message = reply.choices[0].message
    messages.append(message.model_dump(exclude_none=True))
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        arguments = json.loads(call.function.arguments)
        result = get_weather(**arguments)
        print(f"{call.function.name}({arguments}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
print(message.content)
