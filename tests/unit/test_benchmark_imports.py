"""Tests build on the benchmarks, and the benchmarks on what they share: no imports the other way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    file.relative_to(ROOT) for folder in ("benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")
)


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_imports_the_tests(file: Path) -> None:
    assert not [name for name in imported(file) if name.split(".")[0] == "tests"]


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[:2] == ("benchmarks", "common")], ids=str)
def test_what_is_shared_imports_no_benchmark(file: Path) -> None:
    others = [name for name in imported(file) if name.startswith("benchmarks.")]
    assert all(name.split(".")[1] == "common" for name in others), others


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "examples"], ids=str)
def test_examples_import_no_benchmarks(file: Path) -> None:
    assert not [name for name in imported(file) if name.split(".")[0] == "benchmarks"]


def test_nothing_changes_the_import_path() -> None:
    folders = ("sglang_orthrus", "benchmarks", "examples", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if file != Path(__file__)]
    assert not [str(file) for file in files if "sys.path" in file.read_text()]
