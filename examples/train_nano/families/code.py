"""Family `code`: short programs from a description, in one fixed style per template."""

from __future__ import annotations

from random import Random

from examples.train_nano.families.prompts import system_message
from examples.train_nano.pools import Pools, pools
from examples.train_nano.sample import Sample

_TYPES = ("int", "str", "float", "bool")
_OPERATIONS = {
    "sum": ("+", "the sum of"),
    "difference": ("-", "the difference of"),
    "product": ("*", "the product of"),
    "quotient": ("/", "the quotient of"),
    "maximum": ("max", "the larger of"),
    "minimum": ("min", "the smaller of"),
}


def _identifier(rng: Random, names: Pools) -> str:
    return rng.choice(names.text_keys if rng.random() < 0.5 else names.int_keys).replace(" ", "_")


def _fence(language: str, body: str) -> str:
    return f"```{language}\n{body}\n```"


def _dataclass(rng: Random, names: Pools) -> tuple[str, str, tuple[str, ...]]:
    title = "".join(word.capitalize() for word in _identifier(rng, names).split("_"))
    fields = {_identifier(rng, names): rng.choice(_TYPES) for _ in range(rng.randrange(2, 6))}
    listed = ", ".join(f"{name} ({kind})" for name, kind in fields.items())
    body = "\n".join(f"    {name}: {kind}" for name, kind in fields.items())
    code = f"from dataclasses import dataclass\n\n\n@dataclass\nclass {title}:\n{body}"
    slots = (title, *(part for pair in fields.items() for part in pair))
    return f"Write a Python dataclass {title} with the fields {listed}.", _fence("python", code), slots


def _function(rng: Random, names: Pools) -> tuple[str, str, tuple[str, ...]]:
    name, a, b = _identifier(rng, names), _identifier(rng, names), _identifier(rng, names)
    sign, phrase = _OPERATIONS[rng.choice(list(_OPERATIONS))]
    expression = f"{sign}({a}, {b})" if sign.isalpha() else f"{a} {sign} {b}"
    code = f'def {name}({a}, {b}):\n    """Return {phrase} {a} and {b}."""\n    return {expression}'
    request = f"Write a Python function {name} that takes {a} and {b} and returns {phrase} them."
    return request, _fence("python", code), (name, a, b, phrase, a, b, expression)


def _select(rng: Random, names: Pools) -> tuple[str, str, tuple[str, ...]]:
    table, order = _identifier(rng, names), _identifier(rng, names)
    columns = [_identifier(rng, names) for _ in range(rng.randrange(1, 5))]
    column, value = _identifier(rng, names), str(names.number(rng, 1, 5000))
    sign, words = rng.choice((("=", "equal to"), (">", "greater than"), ("<", "less than")))
    code = f"SELECT {', '.join(columns)}\nFROM {table}\nWHERE {column} {sign} {value}\nORDER BY {order};"
    request = (
        f"Write a SQL query that selects {', '.join(columns)} from {table} where {column} is {words} {value}, "
        f"ordered by {order}."
    )
    return request, _fence("sql", code), (*columns, table, column, sign, value, order)


def _loop(rng: Random, names: Pools) -> tuple[str, str, tuple[str, ...]]:
    name, items, key = _identifier(rng, names), _identifier(rng, names), _identifier(rng, names)
    limit = str(names.number(rng, 1, 5000))
    code = (
        f"def {name}({items}):\n    result = []\n    for item in {items}:\n"
        f'        if item["{key}"] > {limit}:\n            result.append(item)\n    return result'
    )
    request = f"Write a Python function {name} that keeps the entries of {items} whose {key} is above {limit}."
    return request, _fence("python", code), (name, items, items, key, limit)


def _class(rng: Random, names: Pools) -> tuple[str, str, tuple[str, ...]]:
    title = "".join(word.capitalize() for word in _identifier(rng, names).split("_"))
    fields = list(dict.fromkeys(_identifier(rng, names) for _ in range(rng.randrange(2, 5))))
    body = "\n".join(f"        self.{name} = {name}" for name in fields)
    code = f"class {title}:\n    def __init__(self, {', '.join(fields)}):\n{body}"
    slots = (title, *fields, *(name for name in fields for _ in range(2)))
    return f"Write a Python class {title} that stores {', '.join(fields)}.", _fence("python", code), slots


def make(rng: Random, split: str) -> Sample:
    """One program."""
    make_one = rng.choice((_dataclass, _function, _select, _loop, _class))
    request, answer, slots = make_one(rng, pools(split))
    messages = [*system_message(rng), {"role": "user", "content": request}]
    return Sample("code", messages, answer, "text", answer, slots=slots)
