"""Slices of a benchmark's cases, for machines with more cores than one server uses."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class SliceError(argparse.ArgumentTypeError, ValueError):
    """Text that names no slice; argparse prints its message."""


class Slice(NamedTuple):
    """Every n-th case of a run, from the given number on."""

    number: int
    of_slices: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """From "I/N".

        Raises:
            ValueError: if that is no slice.
        """
        number, of_slices = map(int, text.split("/"))
        if not 0 <= number < of_slices:
            raise SliceError(f"{text}: I/N with I from 0 to N - 1 is wanted")
        return cls(number, of_slices)

    def of(self, cases: Sequence[T]) -> Sequence[T]:
        """Its cases."""
        return cases[self.number :: self.of_slices]


def check_all(slices: Sequence[Slice]) -> None:
    """Raise a ValueError unless these are all slices of one run, each once."""
    count = slices[0].of_slices
    if sorted(slices) != [(number, count) for number in range(count)]:
        found = ", ".join(f"{number}/{of_slices}" for number, of_slices in sorted(slices))
        raise ValueError(f"all of the {count} slices are needed, each once; there are {found}")
