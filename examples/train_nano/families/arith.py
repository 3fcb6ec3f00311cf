"""Family `arith`: arithmetic with its steps written out."""

from __future__ import annotations

import re
from random import Random

from examples.train_nano.families.prompts import system_message
from examples.train_nano.pools import Pools, plural, pools
from examples.train_nano.sample import Sample


def _column_sum(rng: Random) -> tuple[str, list[str], int]:
    """Addition digit by digit, with carries."""
    digits = rng.randrange(2, 5)
    a, b = rng.randrange(10 ** (digits - 1), 10**digits), rng.randrange(10 ** (digits - 1), 10**digits)
    carry = 0
    steps = []
    for i, place in enumerate(("ones", "tens", "hundreds", "thousands")[:digits]):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        steps.append(f"{place}: {x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}")
        carry = total // 10
    question = rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}.", f"Compute {a} + {b} step by step."))
    return question, steps, a + b


def _chain(rng: Random) -> tuple[str, list[str], int]:
    """A running total over small numbers."""
    value = rng.randrange(2, 60)
    expression = str(value)
    steps = []
    for _ in range(rng.randrange(2, 6)):
        operand = rng.randrange(1, 30)
        sign = rng.choice("+-") if value > operand else "+"
        after = value + operand if sign == "+" else value - operand
        steps.append(f"{value} {sign} {operand} = {after}")
        expression += f" {sign} {operand}"
        value = after
    return rng.choice((f"What is {expression}?", f"Compute {expression}.", f"Solve {expression}.")), steps, value


def _story(rng: Random, names: Pools) -> tuple[str, list[str], int]:
    """A word problem: somebody gains and loses things."""
    who, item = names.first(rng), plural(names.item(rng))
    value = rng.randrange(5, 80)
    text = f"{who} has {value} {item}."
    steps = [f"{who} starts with {value} {item}."]
    for _ in range(rng.randrange(1, 5)):
        other, amount = names.first(rng), rng.randrange(1, 25)
        if value > amount and rng.random() < 0.5:
            text += f" {who} gives {amount} to {other}."
            steps.append(f"After giving {amount} to {other}: {value} - {amount} = {value - amount}.")
            value -= amount
        else:
            text += f" {other} brings {amount} more."
            steps.append(f"After {other} brings {amount}: {value} + {amount} = {value + amount}.")
            value += amount
    return f"{text} How many {item} does {who} have now?", steps, value


def _product(rng: Random) -> tuple[str, list[str], int]:
    """A product split into tens and ones."""
    a, b = rng.randrange(11, 100), rng.randrange(2, 10)
    tens, ones = a // 10 * 10, a % 10
    steps = [
        f"{a} = {tens} + {ones}",
        f"{tens} * {b} = {tens * b}",
        f"{ones} * {b} = {ones * b}",
        f"{tens * b} + {ones * b} = {a * b}",
    ]
    return rng.choice((f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"Compute {a} times {b}.")), steps, a * b


def problem(rng: Random, split: str) -> tuple[str, list[str], int]:
    """(question, steps, result) of one problem."""
    kind = rng.randrange(4)
    if kind == 0:
        return _column_sum(rng)
    if kind == 1:
        return _chain(rng)
    return _story(rng, pools(split)) if kind == 2 else _product(rng)


def make(rng: Random, split: str) -> Sample:
    """One problem with numbered steps and the answer."""
    question, steps, result = problem(rng, split)
    lines = [f"Step {i}: {step}" for i, step in enumerate(steps, 1)]
    answer = "\n".join([*lines, f"Answer: {result}"])
    messages = [*system_message(rng), {"role": "user", "content": question}]
    return Sample("arith", messages, answer, "final", str(result), slots=tuple(re.findall(r"\d+", answer)))
