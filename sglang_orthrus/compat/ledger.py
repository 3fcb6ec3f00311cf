"""The ledger of what this package needs of the internals of SGLang and of the libraries behind it.

An entry stands on the function or class that changes or uses a symbol, so that both are edited together.
`tests/contract/test_compat.py` checks every entry against the installed libraries.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import sglang_orthrus

# Answers to `until` that many entries share.
EXTENSION_POINT = "never: SGLang expects plugins to use it"
SHARED_BY_WORKERS = "never: SGLang's own speculative workers use it alike"
SHARED_BY_SAMPLERS = "never: SGLang's own sampler uses it alike"

_T = TypeVar("_T")


class Entry(NamedTuple):
    """One symbol that this package needs although it is private, or likely to change.

    Attributes:
        target: "module:attribute", dotted below the module.
        params: names of the parameters that we pass or replace, in no order.
        what: what our code does with it.
        why: why no public interface would do.
        until: what ends the dependence.
        dependent: the function or class of ours that the entry stands on.
    """

    target: str
    params: tuple[str, ...]
    what: str
    why: str
    until: str
    dependent: Any


_ENTRIES: list[Entry] = []


def depends_on(target: str, *params: str, what: str, why: str, until: str) -> Callable[[_T], _T]:
    """Decorate a function or class with its entry; the function or class itself stays as it is."""

    def record(dependent: _T) -> _T:
        _ENTRIES.append(Entry(target, params, what, why, until, dependent))
        return dependent

    return record


def entries() -> tuple[Entry, ...]:
    """The entries of all modules that have been imported."""
    return tuple(_ENTRIES)


def all_entries() -> tuple[Entry, ...]:
    """The entries of the whole package, every module of which this imports."""
    for module in pkgutil.walk_packages(sglang_orthrus.__path__, f"{sglang_orthrus.__name__}."):
        import_module(module.name)
    return entries()
