"""The ledger of private symbols: every entry holds for the installed libraries, and none is missing."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sglang_orthrus
from sglang_orthrus.compat.ledger import Entry, all_entries
from tests.kernels import importable_kernels

pytestmark = pytest.mark.contract

ENTRIES = all_entries()
PACKAGE = Path(sglang_orthrus.__path__[0])
ROOMS = sorted(path for path in PACKAGE.rglob("*.py") if PACKAGE / "compat" not in path.parents)
_BY_NAME = ("getattr", "setattr", "hasattr", "delattr")
_PRIVATE_NAME = re.compile(r"\b_[a-z]\w+")


def _name(entry: Entry) -> str:
    return f"{entry.dependent.__qualname__} on {entry.target}"


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """Some symbols are SGLang's kernels, or stand beside them."""
    with importable_kernels():
        yield


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
    if names := _PRIVATE_NAME.findall(entry.what):
        source = inspect.getsource(importlib.import_module(entry.target.partition(":")[0]))
        assert [name for name in names if not re.search(rf"\b{name}\b", source)] == []


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
    named: dict[str, set[str]] = {}
    bases: dict[type, list[type]] = {}
    for entry in ENTRIES:
        names = set(re.findall(r"\w+", f"{entry.target.rpartition(':')[2]} {entry.what}"))
        named.setdefault(entry.dependent.__qualname__.partition(".")[0], set()).update(names)
        if inspect.isclass(entry.dependent):
            owner: Any = pkgutil.resolve_name(re.sub(r"(:\w+)\..*", r"\1", entry.target))
            if inspect.isclass(owner) and issubclass(entry.dependent, owner):
                bases.setdefault(entry.dependent, []).append(owner)
    assert bases
    for ours, theirs in bases.items():
        overridden = set().union(*(_overridden(ours, base) for base in theirs))
        missing = overridden - named[ours.__name__]
        assert not missing, f"{ours.__name__} does not name {missing}"


def _is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _private(name: str) -> bool:
    return bool(re.fullmatch(r"_[a-zA-Z]\w*", name))


def _defined(tree: ast.Module) -> set[str]:
    """Functions, classes and attributes of `self` that a module defines, and what every NamedTuple has."""
    names = {"_asdict", "_fields", "_replace"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            names.add(node.attr)
    return names


def _foreign_private_names(source: str) -> set[str]:
    """Private names that a module reads or sets on objects other than its own, or imports from other packages."""
    tree = ast.parse(source)
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_own(node.value):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("sglang_orthrus"):
            names.update(alias.name for alias in node.names)
            names.update((node.module or "").split("."))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME:
            names.update(str(arg.value) for arg in node.args[1:2] if isinstance(arg, ast.Constant))
    return {name for name in names if _private(name)} - _defined(tree)


def test_private_names_are_found() -> None:
    source = """
from xgrammar.base import _core
from sglang._rust import server
class Ours:
    def __init__(self, other): self._mine = other._theirs
    def call(self): return self._mine._deep, super()._of_parent(), getattr(self, "_by_name", None), self._mine
    def copy(self, cls): return Ours()._mine, Ours()._replace(), cls._made
"""
    assert _foreign_private_names(source) == {"_core", "_rust", "_theirs", "_deep", "_of_parent", "_by_name"}


@pytest.mark.parametrize("path", ROOMS, ids=[str(path.relative_to(PACKAGE)) for path in ROOMS])
def test_private_names_outside_compat_have_an_entry_in_their_module(path: Path) -> None:
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    named = set[str]()
    for entry in ENTRIES:
        if entry.dependent.__module__ == module:
            named.update(re.findall(r"\w+", f"{entry.target} {entry.what}"))
    missing = _foreign_private_names(path.read_text(encoding="utf-8")) - named
    assert not missing, f"{module}: add entries with `depends_on` for {sorted(missing)}"
