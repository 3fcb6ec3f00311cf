"""The corpus: every sample is a function of (split, seed, index), so data needs no files and never repeats."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from examples.train_nano.families import arith, chat, code, convert, json_extract, prose, qa, think, tools
from examples.train_nano.pools import HELD_OUT, TRAIN
from examples.train_nano.sample import Sample

MAKERS: dict[str, Callable[[Random, str], Sample]] = {
    "json": json_extract.make,
    "tools": tools.make,
    "arith": arith.make,
    "convert": convert.make,
    "code": code.make,
    "qa": qa.make,
    "think": think.make,
    "prose": prose.make,
    "chat": chat.make,
}
FAMILIES = tuple(MAKERS)
WEIGHTS = {
    "json": 0.26,
    "tools": 0.22,
    "arith": 0.1,
    "convert": 0.11,
    "code": 0.08,
    "qa": 0.07,
    "think": 0.08,
    "prose": 0.05,
    "chat": 0.03,
}
_WEIGHT_LIST = [WEIGHTS[family] for family in FAMILIES]
HELD_OUT_SEED = 20260


def train_sample(seed: int, index: int) -> Sample:
    """The training sample `index` of a run's seed; its family is drawn by WEIGHTS."""
    rng = Random(f"{TRAIN}/{seed}/{index}")
    family = rng.choices(FAMILIES, _WEIGHT_LIST)[0]
    return MAKERS[family](rng, TRAIN)


def held_out_sample(family: str, index: int, seed: int = HELD_OUT_SEED) -> Sample:
    """The held-out sample `index` of a family: its own seeds, names, numbers and schema combinations."""
    return MAKERS[family](Random(f"{HELD_OUT}/{seed}/{family}/{index}"), HELD_OUT)


def held_out(family: str, n: int, seed: int = HELD_OUT_SEED) -> list[Sample]:
    """The first `n` held-out samples of a family; raises KeyError for an unknown family."""
    return [held_out_sample(family, index, seed) for index in range(n)]
