"""The programs in examples/, run as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang_orthrus.server import Server

pytestmark = pytest.mark.e2e
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def _output(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


def test_chat(orthrus: Server) -> None:
    output = _output("chat.py", orthrus.url)
    assert "Answer: 39" in output
    assert "{'name': 'Nina Fischer', 'age': 34, 'city': 'Lisbon'}" in output


def test_frontend(orthrus: Server) -> None:
    output = _output("frontend.py", orthrus.url)
    assert all(answer in output for answer in ("Dublin", "pilot", "rabbit"))


def test_offline() -> None:
    output = _output("offline.py")
    assert "Answer: 132" in output
    assert "Answer: 37" in output


@pytest.mark.parametrize("name", ["chat.py", "frontend.py", "offline.py"])
def test_an_example_stays_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 50
