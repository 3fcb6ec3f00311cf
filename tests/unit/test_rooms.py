"""Imports between the rooms of the package run one way: plugin, cli -> round -> the middle rooms -> what all share."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sglang_orthrus
from tests.imports import imported

PACKAGE = Path(sglang_orthrus.__file__).parent
SHARED = {"core", "config", "metrics", "ranks", "compat"}
MIDDLE = {"passes", "sampling", "grammar", "models", "server_args", "cpu"}
TOP = {"plugin", "cli", "__main__"}
MAX_LINES = 350
MAX_FUNCTION_LINES = 60


def allowed_from(room: str) -> set[str]:
    if room in SHARED:
        return SHARED
    if room in MIDDLE:
        return SHARED | {room}
    return SHARED | MIDDLE | {"round"} | (TOP if room in TOP else set())


def files() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(file: Path) -> Iterator[str]:
    """Names with two underscores, such as `__version__`, are in no room."""
    parts = (name.split(".") for name in imported(file))
    yield from (
        room
        for package, room, *_ in (part for part in parts if len(part) > 1)
        if package == PACKAGE.name and not room.startswith("__")
    )


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_nothing_above_or_beside_it(file: Path) -> None:
    assert set(imported_rooms(file)) <= allowed_from(room_of(file))


def test_every_room_is_known() -> None:
    assert {room_of(file) for file in files()} == SHARED | MIDDLE | TOP | {"round"}


@pytest.mark.parametrize("file", files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_fit_the_eye(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"
