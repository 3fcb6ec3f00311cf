"""The ledger of private symbols: every entry holds for the installed libraries, and none is missing."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from typing import Any

import pytest

from sglang_orthrus.compat.ledger import Entry, all_entries

pytestmark = pytest.mark.contract

ENTRIES = all_entries()
_PRIVATE_NAME = re.compile(r"\b_[a-z]\w+")


def _name(entry: Entry) -> str:
    return f"{entry.dependent.__qualname__} on {entry.target}"


each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=map(_name, ENTRIES))


@each_entry
def test_the_symbol_exists_with_our_parameters(entry: Entry) -> None:
    symbol = pkgutil.resolve_name(entry.target)
    if entry.params:
        parameters = inspect.signature(symbol).parameters
        assert set(entry.params) <= set(parameters), f"{entry.target} has {list(parameters)}"


@each_entry
def test_private_names_in_the_text_occur_beside_the_symbol(entry: Entry) -> None:
    """Such as attributes of instances, which no class has."""
    source = inspect.getsource(importlib.import_module(entry.target.partition(":")[0]))
    missing = [name for name in _PRIVATE_NAME.findall(entry.what) if not re.search(rf"\b{name}\b", source)]
    assert not missing


@each_entry
def test_an_entry_says_what_why_and_until_when(entry: Entry) -> None:
    texts = (entry.what, entry.why, entry.until)
    assert all(texts)
    assert not any(text.startswith("as above") for text in texts)


def test_no_dependent_names_a_symbol_twice() -> None:
    counts = Counter((entry.target, entry.dependent) for entry in ENTRIES)
    assert [key for key, count in counts.items() if count > 1] == []


def _overridden(ours: type, theirs: type) -> set[str]:
    """Methods and properties of theirs that our class defines anew."""
    return {
        name
        for name, value in vars(ours).items()
        if (callable(value) or isinstance(value, property)) and hasattr(theirs, name) and not name.startswith("__")
    }


def test_classes_that_override_methods_name_them() -> None:
    """In the entry of the class, or in entries of their own."""
    named: dict[type, set[str]] = {}
    bases: dict[type, list[type]] = {}
    for entry in ENTRIES:
        if inspect.isclass(entry.dependent):
            names = set(re.findall(r"\w+", f"{entry.target.rpartition(':')[2]} {entry.what}"))
            named.setdefault(entry.dependent, set()).update(names)
            owner: Any = pkgutil.resolve_name(re.sub(r"(:\w+)\..*", r"\1", entry.target))
            if inspect.isclass(owner) and issubclass(entry.dependent, owner):
                bases.setdefault(entry.dependent, []).append(owner)
    assert bases
    for ours, theirs in bases.items():
        overridden = set().union(*(_overridden(ours, base) for base in theirs))
        assert overridden <= named[ours], f"{ours.__name__} does not name {overridden - named[ours]}"
