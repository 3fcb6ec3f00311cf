"""Family `convert`: the same small table as CSV, as JSON and as a list."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from examples.train_nano.families.prompts import system_message
from examples.train_nano.pools import COLOURS, JOBS, Pools, pools
from examples.train_nano.sample import Sample, compact

Row = dict[str, Any]
_COLUMNS: dict[str, Callable[[Random, Pools], Any]] = {
    "name": lambda r, p: p.person(r),
    "city": lambda r, p: p.city(r),
    "age": lambda r, p: r.randrange(18, 95),
    "item": lambda r, p: p.item(r),
    "code": lambda r, p: p.code(r),
    "price": lambda r, p: p.price(r),
    "count": lambda r, p: p.number(r, 1, 5000),
    "date": lambda r, p: p.date(r),
    "company": lambda r, p: p.company(r),
    "color": lambda r, p: r.choice(COLOURS),
    "job": lambda r, p: r.choice(JOBS),
    "active": lambda r, p: r.random() < 0.5,
}
_NAMES = {"csv": "CSV", "json": "a JSON array", "list": "a list", "lines": "one JSON object per line"}


def _cell(value: Any) -> str:
    return compact(value) if isinstance(value, bool) else str(value)


def write(rows: list[Row], layout: str) -> str:
    """The table in one of the layouts "csv", "json", "list", "lines"."""
    if layout == "json":
        return compact(rows)
    if layout == "lines":
        return "\n".join(compact(row) for row in rows)
    if layout == "list":
        return "\n".join("- " + "; ".join(f"{key}: {_cell(value)}" for key, value in row.items()) for row in rows)
    return "\n".join([",".join(rows[0]), *(",".join(_cell(value) for value in row.values()) for row in rows)])


def make(rng: Random, split: str) -> Sample:
    """One conversion between two layouts."""
    names = pools(split)
    columns = rng.sample(list(_COLUMNS), rng.randrange(2, 6))
    count = rng.randrange(1, 7) if rng.random() < 0.9 else rng.randrange(7, 12)
    while count * len(columns) > 32:
        count -= 1
    rows = [{key: _COLUMNS[key](rng, names) for key in columns} for _ in range(count)]
    source, target = rng.sample(list(_NAMES), 2)
    given, answer = write(rows, source), write(rows, target)
    request = rng.choice(("Convert this to", "Rewrite this as", "Turn the following into", "Give me this as"))
    user = f"{request} {_NAMES[target]}:\n{given}" if rng.random() < 0.8 else f"{given}\n\n{request} {_NAMES[target]}."
    slots = tuple(compact(v)[1:-1] if isinstance(v, str) else json.dumps(v) for row in rows for v in row.values())
    messages = [*system_message(rng), {"role": "user", "content": user}]
    return Sample("convert", messages, answer, "text", answer, slots=slots)
