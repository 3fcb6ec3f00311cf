"""Family `prose`: freer text with many possible continuations, where drafting is hard."""

from __future__ import annotations

from random import Random
from zlib import crc32

from examples.train_nano.families.prompts import system_message
from examples.train_nano.pools import JOBS, PETS, pools
from examples.train_nano.sample import Sample

_PLACES = [
    "harbour",
    "market",
    "forest",
    "mill",
    "bridge",
    "tower",
    "garden",
    "library",
    "station",
    "hill",
    "valley",
    "island",
    "workshop",
    "kitchen",
    "attic",
    "cellar",
    "lighthouse",
    "bakery",
    "orchard",
    "riverbank",
]
_MOODS = [
    "quiet",
    "bright",
    "cold",
    "warm",
    "strange",
    "gentle",
    "stormy",
    "golden",
    "misty",
    "lonely",
    "busy",
    "pale",
    "heavy",
    "slow",
    "soft",
]
_VERBS = [
    "found",
    "lost",
    "carried",
    "painted",
    "watched",
    "mended",
    "borrowed",
    "hid",
    "followed",
    "remembered",
    "sold",
    "counted",
    "dropped",
]
_FEELINGS = ["glad", "tired", "curious", "afraid", "proud", "calm", "restless", "hopeful", "sad", "surprised"]
_TIMES = ["Then", "After a while", "Later", "Meanwhile", "At last", "Before dawn", "In the evening", "Soon"]
_ENDINGS = [
    "and nobody asked why",
    "and the wind answered",
    "as if it had always been so",
    "while the rain went on",
    "though the door was still open",
    "and the whole street heard it",
    "because the night was near",
    "until the lamps went out",
]


class _Writer:
    """Draws words with falling odds whose order depends on what was written just before."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.last = ""

    def pick(self, words: list[str]) -> str:
        offset = crc32(self.last.encode()) % len(words)
        rank = min(int(self.rng.expovariate(0.45)), len(words) - 1)
        self.last = words[(offset + rank) % len(words)]
        return self.last


def make(rng: Random, split: str) -> Sample:
    """One short story of three to eight sentences."""
    names = pools(split)
    who, place, item = names.first(rng), rng.choice(_PLACES), names.item(rng)
    w = _Writer(rng)
    w.last = place
    sentences = [f"It was a {w.pick(_MOODS)} morning at the {place} when {who} came with a {item}."]
    for _ in range(rng.randrange(2, 8)):
        form = rng.randrange(4)
        if form == 0:
            text = (
                f"{w.pick(_TIMES)} {who} {w.pick(_VERBS)} the {w.pick(_MOODS)} {item.split()[-1]} {w.pick(_ENDINGS)}."
            )
        elif form == 1:
            text = f"A {w.pick(JOBS)} with a {w.pick(PETS)} was {w.pick(_FEELINGS)} {w.pick(_ENDINGS)}."
        elif form == 2:
            text = f"{w.pick(_TIMES)} the {w.pick(JOBS)} {w.pick(_VERBS)} a {w.pick(_MOODS)} {w.pick(PETS)}"
            text += f" near the {w.pick(_PLACES)}."
        else:
            text = f"{who} felt {w.pick(_FEELINGS)} and walked to the {w.pick(_MOODS)} {w.pick(_PLACES)}."
        sentences.append(text)
    request = rng.choice(("Write a short story about", "Tell me a story about", "Make up a story with"))
    user = f"{request} {who} at the {place} and a {item}."
    answer = " ".join(sentences)
    return Sample("prose", [*system_message(rng), {"role": "user", "content": user}], answer, "none", None)
