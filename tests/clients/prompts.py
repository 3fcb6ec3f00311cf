"""What nano is asked: it knows these kinds of text."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

MODEL = "default"
# Of every client; servers of the tests ask for none.
API_KEY = "none"
QUESTION = "Nina has 42 copper lanterns. Omar brings 17 more. How many copper lanterns does Nina have now?"
ORDER = (
    "The customer is Grace Novak. The ordered product is a copper lantern. The customer wants 12 pieces. "
    "It ships to Vienna. Return the data as JSON."
)
FLIGHT = "Book a flight from Oslo to Madrid on 2027-05-02."
MAX_TOKENS = 120


class Order(BaseModel):
    """An order of a customer."""

    model_config = ConfigDict(extra="forbid")

    customer: str
    item: str
    quantity: int


# Each client has types of its own for it.
FLIGHT_TOOL: Any = {
    "type": "function",
    "function": {
        "name": "book_flight",
        "description": "Book a flight.",
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string"} for key in ("origin", "destination", "date")},
            "required": ["origin", "destination", "date"],
        },
    },
}


def user(text: str) -> list[dict[str, Any]]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]
