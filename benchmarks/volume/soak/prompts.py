"""What the soak asks: short tasks of nano's kind, grammars with a check of their own, tools. Pure and seeded."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

_NAMES = ("Nina", "Omar", "Clara", "Hugo", "Grace", "Elena", "Petra", "Jonas")
_ITEMS = ("copper lanterns", "oak boxes", "wool scarves", "clay pots", "steel keys")
_CITIES = ("Oslo", "Madrid", "Vienna", "Porto", "Turin", "Ghent", "Lyon")
_NOUNS = ("harbour", "lighthouse", "orchard", "station", "bridge", "workshop")


@dataclass(frozen=True)
class Grammar:
    """A constraint, and how a finished text is checked against it.

    Attributes:
        sampling: as sampling parameters of `/generate`.
        valid: {"schema": ...}, {"regex": ...} or {"tags": ...}: what a text that ends by itself has to be.
        hint: what to add to the prompt.
    """

    sampling: dict[str, str]
    valid: dict[str, Any]
    hint: str = field(default="", compare=False)


def question(random: Random) -> str:
    """A short task."""
    a, b, c = (random.randrange(2, 120) for _ in range(3))
    name, other = random.sample(_NAMES, 2)
    items, city = random.choice(_ITEMS), random.choice(_CITIES)
    return random.choice(
        (
            f"What is {a} + {b}?",
            f"{name} has {a} {items}. {other} brings {b} more. How many {items} does {name} have now?",
            f"Convert {a} kilometres to metres.",
            f"Which is larger, {a} or {c}?",
            f"Write a short story about {name} at the {random.choice(_NOUNS)} and {random.choice(_ITEMS)}.",
            f"Hello, I am {name} from {city}. Who are you?",
        )
    )


def order(random: Random) -> str:
    """Facts to extract."""
    return (
        f"The customer is {random.choice(_NAMES)}. The ordered product is {random.choice(_ITEMS)}. "
        f"The customer wants {random.randrange(1, 99)} pieces. It ships to {random.choice(_CITIES)}."
    )


def history(random: Random, length: int) -> str:
    """A text of some `length` words for prefixes that requests share."""
    sentences: list[str] = []
    while sum(len(sentence.split()) for sentence in sentences) < length:
        sentences.append(order(random))
    return " ".join(sentences)


def render(text: str, thinking: bool = False) -> str:
    """One user message in nano's chat template, for the interfaces that take plain text."""
    think = "" if thinking else "<think>\n\n</think>\n\n"
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{think}"


# -- grammars

_REGEXES = (
    r"(yes|no|maybe)",
    r"[A-Z][a-z]{2,8} [0-9]{1,3}",
    r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])",
    r"(red|green|blue)(, (red|green|blue)){0,3}",
    r"[a-f0-9]{8}",
)
_EBNF: tuple[tuple[str, str | None], ...] = (
    ('root ::= "yes" | "no" | "maybe " [0-9] [0-9]?', r"yes|no|maybe [0-9][0-9]?"),
    ('root ::= item ("," item){0,4}\nitem ::= [a-z] [0-9]', r"[a-z][0-9](,[a-z][0-9]){0,4}"),
    ('root ::= "(" inner ")"\ninner ::= "x" | "(" inner ")"', None),
    ('root ::= "answer: " [0-9]{1,3} " " unit\nunit ::= "km" | "m"', r"answer: [0-9]{1,3} (km|m)"),
)


def _property(random: Random) -> dict[str, Any]:
    low = random.randrange(50)
    return random.choice(
        (
            {"type": "integer", "minimum": low, "maximum": low + random.randrange(1, 500)},
            {"type": "boolean"},
            {"enum": ["red", "green", "blue", 7, None]},
            {"const": f"{random.choice(_CITIES)}-{low}"},
            {"type": "string", "maxLength": 8},
            {"type": "string", "pattern": "^[A-Z][a-z]{1,6}$"},
            {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 3},
            {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
            {"type": "object", "properties": {"id": {"enum": [1, 2, 3]}}, "required": ["id"]}
            | {"additionalProperties": False},
        )
    )


def json_schema(random: Random) -> tuple[dict[str, Any], str]:
    """A small object whose every property ends soon, and the words that ask for it."""
    names = random.sample(("city", "customer", "quantity", "ok", "colour", "code", "kind"), random.randrange(1, 4))
    required = names[: random.randrange(1, len(names) + 1)]
    properties = {name: _property(random) for name in names}
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return schema, f"\n\nReturn the data as JSON for this schema:\n{json.dumps(schema)}"


def grammar(random: Random) -> Grammar:
    """A constraint of any kind."""
    kind = random.choices(("json_schema", "regex", "ebnf", "structural_tag"), (5, 3, 3, 1))[0]
    if kind == "json_schema":
        wanted, hint = json_schema(random)
        return Grammar({kind: json.dumps(wanted)}, {"schema": wanted}, hint)
    if kind == "regex":
        pattern = random.choice(_REGEXES)
        return Grammar({kind: pattern}, {"regex": pattern})
    if kind == "ebnf":
        text, expected = random.choice(_EBNF)
        return Grammar({kind: text}, {"regex": expected} if expected else {"nested": True})
    return Grammar({kind: json.dumps(tags())}, {"tags": True})


def tags() -> dict[str, Any]:
    """Calls of `tools` as structural tags."""
    structures = [
        {
            "begin": f'<tool_call>\n{{"name": "{tool["function"]["name"]}", "arguments": ',
            "schema": tool["function"]["parameters"],
            "end": "}\n</tool_call>",
        }
        for tool in TOOLS
    ]
    return {"type": "structural_tag", "structures": structures, "triggers": ["<tool_call>"]}


# -- tools


def _tool(name: str, description: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


_STRING = {"type": "string", "maxLength": 20}
TOOLS = (
    _tool("get_weather", "Get the current weather of a city.", city=_STRING),
    _tool("set_alarm", "Set an alarm.", hour={"type": "integer", "minimum": 0, "maximum": 23}),
    _tool("book_flight", "Book a flight.", origin=_STRING, destination=_STRING),
)


def tool_task(random: Random) -> str:
    """A wish that one of `TOOLS` serves."""
    origin, destination = random.sample(_CITIES, 2)
    return random.choice(
        (
            f"What is the weather in {origin}?",
            f"Set an alarm for {random.randrange(24)} o'clock.",
            f"Book a flight from {origin} to {destination}.",
            f"What is the weather in {origin} and in {destination}?",
        )
    )
