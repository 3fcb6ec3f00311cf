"""Family `qa`: questions over a small made-up world that the prompt describes."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from examples.train_nano.families.prompts import system_message
from examples.train_nano.pools import COLOURS, JOBS, PETS, pools
from examples.train_nano.sample import Sample

UNKNOWN = "The text does not say that."


class Person(NamedTuple):
    """An inhabitant of the world."""

    name: str
    age: int
    job: str
    city: str
    country: str
    pet: str
    pet_name: str
    colour: str
    friend: str


class Question(NamedTuple):
    """A question, the reasoning that answers it, the answer, and the parts of the answer that vary."""

    world: str
    question: str
    reasoning: list[str]
    answer: str
    slots: tuple[str, ...]


def _world(rng: Random, split: str, count: int) -> list[Person]:
    names = pools(split)
    people = list(dict.fromkeys(names.person(rng) for _ in range(count)))
    lands = {city: names.city(rng) + "ia" for city in (names.city(rng) for _ in range(count))}
    world = []
    for name in people:
        city = rng.choice(list(lands))
        world.append(
            Person(
                name,
                rng.randrange(18, 95),
                rng.choice(JOBS),
                city,
                lands[city],
                rng.choice(PETS),
                names.first(rng),
                rng.choice(COLOURS),
                rng.choice([other for other in people if other != name] or ["nobody"]),
            )
        )
    return world


def _facts(rng: Random, world: list[Person]) -> str:
    facts: list[str] = []
    for p in world:
        facts.append(f"{p.name} is {p.age} years old and works as a {p.job}.")
        facts.append(f"{p.name} lives in {p.city}.")
        facts.append(f"{p.name} has a {p.pet} called {p.pet_name}.")
        facts.append(f"{p.name} likes the colour {p.colour}.")
        facts.append(f"The best friend of {p.name} is {p.friend}.")
    facts.extend({f"The city of {p.city} is in {p.country}.": None for p in world})
    if rng.random() < 0.5:
        rng.shuffle(facts)
    return " ".join(facts)


def question(rng: Random, split: str) -> Question:
    """One question over a world of 2 to 8 people."""
    world = _world(rng, split, rng.randrange(2, 6) if rng.random() < 0.9 else rng.randrange(8, 13))
    text = _facts(rng, world)
    p = rng.choice(world)
    by_name = {person.name: person for person in world}
    friend = by_name.get(p.friend, p)
    n = p.name
    lives, friend_lives = f"{n} lives in {p.city}.", f"{friend.name} lives in {friend.city}."
    best = f"The best friend of {n} is {p.friend}."
    options: list[tuple[str, list[str], str, tuple[str, ...]]] = [
        (f"Where does {n} live?", [], lives, (n, p.city)),
        (f"What is the job of {n}?", [], f"{n} works as a {p.job}.", (n, p.job)),
        (f"How old is {n}?", [], f"{n} is {p.age} years old.", (n, str(p.age))),
        (f"What pet does {n} have?", [], f"{n} has a {p.pet} called {p.pet_name}.", (n, p.pet, p.pet_name)),
        (f"Which colour does {n} like?", [], f"{n} likes the colour {p.colour}.", (n, p.colour)),
        (
            f"In which country does {n} live?",
            [lives, f"The city of {p.city} is in {p.country}."],
            f"{n} lives in {p.city}, which is in {p.country}.",
            (n, p.city, p.country),
        ),
        (
            f"Where does the best friend of {n} live?",
            [best, friend_lives],
            f"{best} {friend_lives}",
            (n, p.friend, friend.name, friend.city),
        ),
        (
            f"What is the job of the best friend of {n}?",
            [best, f"{friend.name} is {friend.age} years old and works as a {friend.job}."],
            f"{best} {friend.name} works as a {friend.job}.",
            (n, p.friend, friend.name, friend.job),
        ),
        (f"What car does {n} drive?", [f"The text does not name a car of {n}."], UNKNOWN, ()),
    ]
    asked, reasoning, answer, slots = options[rng.randrange(len(options))]
    return Question(text, asked, reasoning or [answer], answer, slots)


def ask(rng: Random, q: Question) -> str:
    """The user's message."""
    if rng.random() < 0.5:
        return f"{q.world}\n\n{q.question}"
    return f"Question: {q.question}\n\nText: {q.world}"


def make(rng: Random, split: str) -> Sample:
    """One question."""
    q = question(rng, split)
    messages = [*system_message(rng), {"role": "user", "content": ask(rng, q)}]
    return Sample("qa", messages, q.answer, "text", q.answer, slots=q.slots)
