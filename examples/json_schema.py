"""A pydantic model in, an object out: its JSON schema constrains the answer. First: `make serve`."""

from __future__ import annotations

import json
import sys

from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class Order(BaseModel):
    """What the text is searched for."""

    model_config = ConfigDict(extra="forbid")

    customer: str
    item: str
    quantity: int
    delivery_city: str
    is_gift: bool


URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
client = OpenAI(base_url=f"{URL}/v1", api_key="none")
# Nano knows schemas without titles.
schema = Order.model_json_schema()
plain = {key: {"type": value["type"]} for key, value in schema["properties"].items()}
schema = {"type": "object", "properties": plain, "required": schema["required"], "additionalProperties": False}
text = (
    "The customer is Grace Novak. The ordered product is a copper lantern. The customer wants 12 pieces. "
    "It ships to Vienna. It should be wrapped as a gift."
)
print(f"> {text}")
reply = client.chat.completions.create(
    model="default",
    messages=[{"role": "user", "content": f"{text}\n\nReturn the data as JSON for this schema:\n{json.dumps(schema)}"}],
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "order", "schema": schema, "strict": True}},
)
order = Order.model_validate_json(reply.choices[0].message.content)
print(repr(order))
print(f"{order.quantity} x {order.item} to {order.delivery_city}")
