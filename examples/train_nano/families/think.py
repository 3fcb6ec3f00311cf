"""Family `think`: reasoning within <think> before the answer (enable_thinking is true)."""

from __future__ import annotations

from random import Random

from examples.train_nano.families import arith, json_extract, qa
from examples.train_nano.families.prompts import system_message
from examples.train_nano.sample import Sample, compact


def make(rng: Random, split: str) -> Sample:
    """One question with its reasoning."""
    kind = rng.random()
    check = "text"
    slots: tuple[str, ...] | None
    if kind < 0.45:
        q = qa.question(rng, split)
        user, answer, slots = qa.ask(rng, q), q.answer, None
        steps = [f"The question is: {q.question}", *q.reasoning, "That answers it."]
    elif kind < 0.85:
        user, lines, result = arith.problem(rng, split)
        answer, slots = f"The answer is {result}.", None
        steps = ["I work it out step by step.", *lines, f"So the answer is {result}."]
    else:
        base = json_extract.make(rng, split)
        answer, check, slots = base.answer, "json", None
        steps = ["I need these values from the text."]
        steps += [f"{key} is {compact(value)}." for key, value in base.expected.items()]
        thought = "\n".join(steps)
        return Sample(
            "think",
            base.messages,
            f"<think>\n{thought}\n</think>\n\n{answer}",
            check,
            base.expected,
            thinking=True,
            schema=base.schema,
        )
    thought = "\n".join(steps)
    messages = [*system_message(rng), {"role": "user", "content": user}]
    return Sample(
        "think", messages, f"<think>\n{thought}\n</think>\n\n{answer}", check, answer, None, True, None, slots
    )
