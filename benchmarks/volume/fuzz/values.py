"""Hostile values for any field of a request, and hostile texts. Pure and seeded."""

from __future__ import annotations

import math
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    *(0, -1, -2, 1, 2, 31, 32, 33, 255, 256, 4095, 4096, 4097, 151936, 10**6, 2**31 - 1, 2**31, -(2**31)),
    *(2**32, 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30, -(10**30)),
    *(0.0, -0.0, 0.5, 1.5, -0.5, 1e-9, 1e-45, 1e38, 1e39, 1e308, -1e308, 2.0000001),
    *(math.nan, math.inf, -math.inf),
)
SCALARS: tuple[Any, ...] = (None, True, False, "", " ", "0", "-1", "1e5", "NaN", "auto", "None", "null", "\x00")
SHAPES: tuple[Any, ...] = (
    *([], {}, [[]], [None], [True], [0], [-1], ["a"], [[1], 2], [[], [1]], [1.5], [10**30], [math.nan]),
    *({"": ""}, {"a": 1}, {"0": -1}, {"-1": 1.0}, {"99999": 1.0}, {"5": math.nan}, {"5": None}, {"1.5": 1}),
)
TEXTS: tuple[str, ...] = (
    *("", " ", "\n", "\x00", "a\x00b", "\ud800", "x\udfffy", "\ud83d", "\ufeff", "\u202e", "e\u0301" * 30),
    *("\U0001f600" * 40, "<|im_end|>", "<|endoftext|>", "<tool_call>", "</think>", "<think>" * 20, "{{ 7 * 7 }}"),
    *("{% for x in y %}", "a" * 3000, "- " * 2000, "\t" * 500, "%s%n", "../../etc", "\u0000\u0001\u0002"),
)
IDS: tuple[int, ...] = (-1, -2, 0, 1, 4087, 4095, 4096, 4097, 5000, 151936, 2**31 - 1, 2**31, 2**63 - 1, -(2**63))


def scalar(random: Random) -> Any:
    """A number, a text or nothing."""
    return random.choice(random.choice((NUMBERS, NUMBERS, SCALARS, TEXTS)))


def value(random: Random, depth: int = 0) -> Any:
    """Anything that JSON and Python's extension of it can hold."""
    kind = random.choices(("scalar", "shape", "list", "object"), (60, 20, 12, 8))[0]
    if kind == "scalar" or depth > 3:
        return scalar(random)
    if kind == "shape":
        return random.choice(SHAPES)
    if kind == "list":
        return [value(random, depth + 1) for _ in range(random.choice((1, 2, 3, 40)))]
    return {str(scalar(random)): value(random, depth + 1) for _ in range(random.choice((1, 2, 5)))}


def ids(random: Random) -> list[Any]:
    """Token ids, some of which are none."""
    found: list[Any] = [random.randrange(10, 4000) for _ in range(random.choice((1, 3, 10)))]
    for _ in range(random.choice((1, 1, 2, 5))):
        found.insert(random.randrange(len(found) + 1), random.choice(IDS))
    return found


def biases(random: Random) -> dict[str, Any]:
    """Logit biases, extreme ones among them."""
    extreme = (math.inf, -math.inf, math.nan, 1e38, -1e38, 1e39, -100, 100, 0, None, "5")
    many = random.choice((1, 2, 300, 4096))
    keys = random.sample(range(4096), many) if many > 2 else [random.choice(IDS) for _ in range(many)]
    amount = random.choice(extreme)
    return {str(key): amount for key in keys}
