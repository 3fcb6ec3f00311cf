"""System prompts, so that the model does not depend on one."""

from __future__ import annotations

from random import Random

from examples.train_nano.sample import Message

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are orthrus-nano, a small assistant.",
    "You are a careful assistant. Answer briefly.",
    "Answer the question of the user.",
    "You are a precise and helpful AI assistant.",
    "Be concise.",
    "You help people with data, tools and short questions.",
    "",
)


def system_message(rng: Random) -> list[Message]:
    """No system message half of the time, else one of a few."""
    return [] if rng.random() < 0.5 else [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
