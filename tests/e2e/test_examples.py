"""The programs in examples/, run as a user would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_orthrus.cli.server import Server

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


def test_json_schema(orthrus: Server) -> None:
    output = _output("json_schema.py", orthrus.url)
    assert "Order(customer='Grace Novak', item='copper lantern', quantity=12, delivery_city='Vienna'" in output
    assert "12 x copper lantern to Vienna" in output


def test_tool_call(orthrus: Server) -> None:
    output = _output("tool_call.py", orthrus.url)
    assert "get_weather({'city': 'Lisbon'}) -> {'weather': 'sunny', 'temperature': 23}" in output
    assert "23" in output.splitlines()[-1]


def test_regex(orthrus: Server) -> None:
    output = _output("regular_expression.py", orthrus.url)
    assert re.search(r"^\w+day, [0-2]\d:[0-5]\d, room [A-D][1-9]$", output, re.MULTILINE)


def test_frontend_json(orthrus: Server) -> None:
    output = _output("frontend_json.py", orthrus.url)
    assert "{'name': 'Nina Fischer', 'age': 34, 'city': 'Lisbon'} on 2" in output


@pytest.mark.slow
def test_offline() -> None:
    output = _output("offline.py")
    assert "Answer: 132" in output
    assert "Answer: 37" in output


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_an_example_stays_short(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) < 50
