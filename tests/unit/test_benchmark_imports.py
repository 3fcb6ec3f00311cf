"""Tests build on the benchmarks, and the benchmarks on what they share: no imports the other way."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.imports import imported

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    file.relative_to(ROOT) for folder in ("benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_nothing_imports_the_tests(file: Path) -> None:
    assert not [name for name in imported(ROOT / file) if name.split(".")[0] == "tests"]


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[:2] == ("benchmarks", "common")], ids=str)
def test_what_is_shared_imports_no_benchmark(file: Path) -> None:
    others = [name for name in imported(ROOT / file) if name.startswith("benchmarks.")]
    assert all(name.split(".")[1] == "common" for name in others), others


@pytest.mark.parametrize("file", [file for file in FILES if file.parts[0] == "examples"], ids=str)
def test_examples_import_no_benchmarks(file: Path) -> None:
    assert not [name for name in imported(ROOT / file) if name.split(".")[0] == "benchmarks"]


def test_nothing_changes_the_import_path() -> None:
    folders = ("sglang_orthrus", "benchmarks", "examples", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py") if file != Path(__file__)]
    assert not [str(file) for file in files if "sys.path" in file.read_text()]
